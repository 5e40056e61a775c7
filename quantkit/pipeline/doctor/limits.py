"""What the system lets this process have: cores and memory, under control groups of either kind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
_MAX_BYTES = 1 << 20
_NO_LIMIT = 1 << 60  # version 1 says a number near 2^63 for none


def n_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(proc: Path = PROC, root: Path = CGROUP) -> float | None:
    """Cores' worth of time that the control groups grant, the least of all above; None for all."""
    quotas = []
    for folder in _groups("cpu", proc, root):
        if found := re.fullmatch(r"(\d+) (\d+)\s*", _text(folder / "cpu.max")):
            quotas.append(int(found[1]) / max(1, int(found[2])))
        period = _number(folder / "cpu.cfs_period_us")
        quota = _number(folder / "cpu.cfs_quota_us")
        if period and quota and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_available(proc: Path = PROC, root: Path = CGROUP) -> int | None:
    """Bytes that can be had: the machine's, or what a control group leaves; None if unknown.

    What a group's files hold in the page cache counts as free, for it is given back.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(proc / "meminfo"), re.MULTILINE)
    left = [1024 * int(found[1])] if found else []
    for folder in _groups("memory", proc, root):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is not None and limit < _NO_LIMIT:
            cached = re.findall(
                r"^(?:total_)?(?:in)?active_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE
            )
            left.append(max(0, limit - (used or 0) + sum(map(int, cached[-2:]))))
    return min(left, default=None)


def load_of_others() -> float | None:
    """Mean number of processes that wanted a core over the last minute; None where not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _groups(controller: str, proc: Path, root: Path) -> Iterator[Path]:
    """Folders of this process's group and those above it, in either hierarchy."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = root / "unified" if (root / "unified").is_dir() else root
        elif controller in controllers.split(","):
            base = root / controllers if (root / controllers).is_dir() else root / controller
        else:
            continue
        names = [name for name in path.split("/") if name not in ("", ".", "..")]
        for depth in range(len(names), -1, -1):
            yield base.joinpath(*names[:depth])


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES).decode("ascii", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"-?\d{1,19}", text) else None
