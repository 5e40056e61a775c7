"""ggml's GGUF parser in a process of its own, which hostile files may crash.

Run as a program it reads, again and again, eight bytes of length and a file; it answers each with a
line of JSON: null, or [alignment, kvs, tensors] as `tests.container.ggml.Parsed` has them.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REFUSED, CRASHED = "refused", "crashed"


class GgmlChild:
    """Verdicts of `gguf_init_from_file`; a new process after every crash."""

    def __init__(self) -> None:
        self.n_crashes = 0
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.ggml_child"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def parse(self, content: bytes) -> str | tuple[int, list[Any], list[Any]]:
        """What ggml finds in a file, REFUSED or CRASHED."""
        ask, answer = self._process.stdin, self._process.stdout
        assert ask is not None
        assert answer is not None
        try:
            ask.write(struct.pack("<Q", len(content)) + content)
            ask.flush()
            line = answer.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self.close()
            self.n_crashes += 1
            self._start()
            return CRASHED
        found = json.loads(line)
        return REFUSED if found is None else (found[0], found[1], found[2])

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._process.kill()
        self._process.wait()


def main() -> None:
    from tests.container import ggml

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        while head := sys.stdin.buffer.read(8):
            file.seek(0)
            file.truncate()
            file.write(sys.stdin.buffer.read(struct.unpack("<Q", head)[0]))
            file.flush()
            found = ggml.parse_file(file.name)
            answer = None
            if found is not None:
                kvs = [(key.hex(), type_, item) for key, type_, item in found.kvs]
                tensors = [(name.hex(), *rest) for name, *rest in found.tensors]
                answer = [found.alignment, kvs, tensors]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
