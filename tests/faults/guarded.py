"""The command line in this process, with what it took and what it touched."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.cli import main

MAX_SECONDS = 5.0  # of all threads' work, so that a busy machine does not fail the tests
MAX_WAIT = 250.0
MAX_GROWTH = 256 << 20

_opened: list[tuple[str, bool]] | None = None


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, Path)):
        path, mode, flags = arguments
        writes = bool(int(flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))  # type: ignore[call-overload]
        _opened.append((os.path.abspath(os.fsdecode(str(path))), writes or "w" in str(mode)))


sys.addaudithook(_audit)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, what it said, CPU seconds, growth of memory in bytes.

    `read` and `written` are the paths that were opened for either.
    """

    code: int
    out: str
    err: str
    seconds: float
    growth: int
    read: frozenset[str]
    written: frozenset[str]


def command(*arguments: object) -> Ended:
    """`quantkit arguments...`, as its entry point runs it."""
    global _opened  # noqa: PLW0603  (a hook cannot be taken back, only told to pass)
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["quantkit", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (1, 2, 15)}
    before, begun, clock = _reset_peak(), time.process_time(), time.monotonic()
    _opened = []
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _exit_code()
    finally:
        opened, _opened = _opened, None
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    seconds = time.process_time() - begun
    assert time.monotonic() - clock < MAX_WAIT
    return Ended(
        code,
        out.getvalue(),
        err.getvalue(),
        seconds,
        _status("VmHWM") - before,
        frozenset(path for path, writes in opened if not writes),
        frozenset(path for path, writes in opened if writes),
    )


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("the entry point returned")


def _reset_peak() -> int:
    """Resident bytes now, from where on the peak is counted anew; where Linux lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str, pid: int | str = "self") -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


@dataclass(frozen=True)
class Apart:
    """How a command ended in a process of its own: exit code, stderr, CPU seconds, peak bytes.

    The peak is of everything resident, the interpreter and its libraries included.
    """

    code: int
    err: str
    seconds: float
    peak: int


def apart(*arguments: object) -> Apart:
    """`quantkit arguments...` in a process of its own.

    Where others crowd the caches, CPU time doubles: of up to three tries the quickest counts.
    """
    ended = _apart(*arguments)
    for _ in range(2):
        if ended.seconds < MAX_SECONDS:
            break
        ended = min(ended, _apart(*arguments), key=lambda each: each.seconds)
    return ended


def _apart(*arguments: object) -> Apart:
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
    )
    peak, begun = 0, time.monotonic()
    # What wait4 tells of the peak begins with that of the parent; the kernel's own mark only rises.
    while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        peak = max(peak, _status("VmHWM", process.pid))
        if time.monotonic() - begun > MAX_WAIT:
            process.kill()
        time.sleep(0.002)
    _, status, used = found
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    with process.stderr as said:
        err = said.read()
    return Apart(process.returncode, err, used.ru_utime + used.ru_stime, peak)


def assert_cheap(ended: Apart, usual: Apart) -> None:
    """Whatever came of it: no traceback, little time, and little memory above what is usual."""
    assert ended.code >= 0, ended
    assert "Traceback" not in ended.err
    assert ended.seconds < MAX_SECONDS, ended.seconds
    assert ended.peak - usual.peak < MAX_GROWTH, (ended.peak, usual.peak)


def assert_refused(
    ended: Ended, codes: Sequence[int], folder: Path, *, links: bool = False
) -> None:
    """One message, a documented code, little time and memory, and nothing outside `folder`.

    `links`: what is read may be a link that leads out.
    """
    assert ended.code in codes, ended
    assert "Traceback" not in ended.err
    errors = [line for line in ended.err.splitlines() if line.lower().startswith("error: ")]
    assert len(errors) == 1, ended.err
    assert all(c.isprintable() or c in "\n\t" for c in ended.err), ended.err
    assert ended.seconds < MAX_SECONDS, ended.seconds
    assert ended.growth < MAX_GROWTH, ended.growth
    assert_inside(ended, folder, links=links)


def assert_inside(ended: Ended, folder: Path, *, links: bool = False) -> None:
    """Nothing was written outside `folder`, and nothing read next to it."""
    home = folder.resolve()
    for path in ended.written:
        if "__pycache__" in path:  # modules and kernels, compiled when first used
            continue
        assert _is_below(Path(path), home), path
    for path in ended.read:
        near = Path(path).is_relative_to(home.parent) and not path.endswith((".pyc", ".py"))
        there = Path(path).is_relative_to(home) if links else _is_below(Path(path), home)
        assert not near or there, path


def _is_below(path: Path, folder: Path) -> bool:
    return str(path) == os.devnull or path.resolve().is_relative_to(folder)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
