"""The record of finished tiles that lets a killed run go on.

A text file: one line that identifies the job, then one line per event.

    {"journal": 1, "plan": "<digest>"}
    boot <id>               a run begins, on this boot of the machine
    tile <tensor> <n> <sha256>
    sync                    everything above is durable
    doubt                   a flush failed: what is not durable may be lost, and counts no more
    lost <tensor>           its file was cut or removed: nothing above counts of it
    seal                    all tiles are durable, the files are getting their final names

A tile's line is written after its bytes. If only the process died, the kernel still has both, so
every line counts. If the machine went down, lines after the last `sync` are not trusted: their
order on disk is unknown. The boot id tells the two apart. What is no line of these kinds was torn
by such a death and is passed over.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.run import fs

Done = dict[tuple[int, int], bytes]  # (tensor, tile) -> sha256 of the tile's bytes

_TILE = re.compile(r"tile (\d{1,9}) (\d{1,9}) ([0-9a-f]{64})")
_LOST = re.compile(r"lost (\d{1,9})")


class Journal:
    """An open journal: exclusive to this process, appended to by any thread.

    `done` holds the tiles that earlier runs finished; `sealed` says that it was all of them.
    """

    sealed = False

    def __init__(self, path: Path, plan_digest: str, *, restart: bool = False) -> None:
        self.path = path
        with fs.writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._lock = threading.Lock()
        try:
            self._claim()
            self.done = self._load(plan_digest, restart)
            self._append(f"boot {_boot_id()}\n")
        except BaseException:
            os.close(self._fd)
            raise

    def record(self, tensor: int, tile: int, digest: bytes) -> None:
        """Note that a tile's bytes are written."""
        self._append(f"tile {tensor} {tile} {digest.hex()}\n")

    def sync(self, *, seal: bool = False) -> None:
        """Note that everything recorded so far is durable; the caller has flushed the data."""
        self._append("sync\nseal\n" if seal else "sync\n")
        with fs.writing(self.path):
            os.fsync(self._fd)

    def doubt(self) -> None:
        """Note that a flush failed. The kernel may have dropped what it could not write."""
        with suppress(OutputError):
            self._append("doubt\n")

    def forget(self, tensors: Collection[int]) -> None:
        """Drop all tiles of some tensors, for later runs as well, durably."""
        self.done = {key: digest for key, digest in self.done.items() if key[0] not in tensors}
        if tensors:
            self._append("".join(f"lost {tensor}\n" for tensor in sorted(tensors)))
            with fs.writing(self.path):
                os.fsync(self._fd)

    def close(self) -> None:
        """Release the journal; it stays for the next run."""
        os.close(self._fd)

    def _claim(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that had it may have removed it as the lock went over to us.
            if not os.path.samestat(os.fstat(self._fd), self.path.stat()):
                raise BlockingIOError
        except OSError:
            raise OutputError(
                "another run is writing these files",
                where=str(self.path.parent),
                hint="wait for it, or choose another folder with -o",
            ) from None

    def _load(self, plan_digest: str, restart: bool) -> Done:
        text = _read_all(self._fd)
        complete = text[: text.rfind(b"\n") + 1]  # a torn last line is as good as none
        header = json.dumps({"journal": 1, "plan": plan_digest})
        lines = complete.decode("ascii", errors="replace").splitlines()
        if lines and not restart:
            if lines[0] != header:
                raise OutputError(
                    "an unfinished run with another source, recipe or layout is in this folder",
                    where=str(self.path),
                    hint="finish it with its own settings, or pass --restart to discard it",
                )
            with fs.writing(self.path):
                os.ftruncate(self._fd, len(complete))
                os.lseek(self._fd, 0, os.SEEK_END)
            self.sealed = "seal" in lines
            return _replay(lines[1:])
        with fs.writing(self.path):
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        self._append(header + "\n")
        return {}

    def _append(self, line: str) -> None:
        data = line.encode()
        with self._lock, fs.writing(self.path):
            while data:
                data = data[os.write(self._fd, data) :]


def _replay(lines: list[str]) -> Done:
    durable: Done = {}
    fresh: Done = {}
    boot = ""
    for line in lines:
        if found := _TILE.fullmatch(line):
            fresh[int(found[1]), int(found[2])] = bytes.fromhex(found[3])
        elif found := _LOST.fullmatch(line):
            for tiles in (durable, fresh):
                for key in [key for key in tiles if key[0] == int(found[1])]:
                    del tiles[key]
        elif line == "sync":
            durable |= fresh
            fresh = {}
        elif line == "doubt":
            fresh = {}
        elif line.startswith("boot "):
            if boot != line:  # the machine went down, not just the process
                fresh = {}
            boot = line
    if boot == f"boot {_boot_id()}":
        durable |= fresh
    return durable


def _read_all(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    parts = []
    while part := os.read(fd, 1 << 22):
        parts.append(part)
    return b"".join(parts)


def _boot_id() -> str:
    """Differs after every start of the machine; random where the system has no such id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return os.urandom(16).hex()
