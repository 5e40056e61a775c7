"""What a run tells while it works. The command line's bar, lines and JSON are views of it."""

from __future__ import annotations

from typing import Literal, Protocol

Unit = Literal["bytes", "tokens"]


def size(n_bytes: float) -> str:
    """Bytes for people: 383.42 GB, 18.2 MB, 512 bytes."""
    for unit, scale, digits in (("TB", 1e12, 3), ("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 0)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.{digits}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def unit_of(n_bytes: float) -> tuple[str, float]:
    """The unit, and its bytes, of an axis whose smallest size is `n_bytes`."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((unit for unit in units if n_bytes >= unit[1]), ("bytes", 1.0))


def weights(count: int) -> str:
    """Numbers of weights for people: 1.026 T, 21.4 M, 512."""
    for unit, scale, digits in (("T", 1e12, 3), ("B", 1e9, 2), ("M", 1e6, 1), ("k", 1e3, 0)):
        if count >= scale:
            return f"{count / scale:,.{digits}f} {unit}"
    return str(count)


def files(count: int) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} file" + ("s" if count != 1 else "")


class Reporter(Protocol):
    """Listens to a run. Calls come from the thread that runs the pipeline."""

    def stage(self, name: str, detail: str) -> None:
        """A stage is finished; one line of what came of it."""

    def begin(self, title: str, total: int, n_done: int, unit: Unit = "bytes") -> None:
        """Long work starts: `total` bytes or tokens in all, of which `n_done` were done before."""

    def advance(self, n: float) -> None:
        """So many more are done."""

    def end(self) -> None:
        """The long work is over, well or badly."""

    def warn(self, text: str) -> None:
        """Something the user should know."""


class Silent:
    """A reporter that says nothing."""

    def stage(self, name: str, detail: str) -> None:
        """See `Reporter`."""

    def begin(self, title: str, total: int, n_done: int, unit: Unit = "bytes") -> None:
        """See `Reporter`."""

    def advance(self, n: float) -> None:
        """See `Reporter`."""

    def end(self) -> None:
        """See `Reporter`."""

    def warn(self, text: str) -> None:
        """See `Reporter`."""
