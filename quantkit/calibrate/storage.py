"""Files of importance statistics: open while anyone reads them, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG

import numpy as np
import numpy.typing as npt

from quantkit.calibrate.statistics import F64, Sums, check_finite
from quantkit.container.names import escaped
from quantkit.errors import GgufError, NonFiniteError
from quantkit.run.fs import open_sized, partial_of, publish, remove, write_at, writing

MAX_VALUES = 1 << 23  # of a weight: three times those of 384 experts of 7168 columns

_MAX_BYTES = 32 << 30  # twenty times what a model of 10^12 weights needs
_MAX_COUNT = 2.0**53
_STEP = 1 << 18  # values read at a time
_F32_MAX = float(np.finfo(np.float32).max)


class OpenFile:
    """A file that is open as long as anyone may read from it. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.where = escaped(str(path))
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            stat = os.fstat(self._fd)
        except OSError as error:
            raise GgufError(f"cannot be read: {error.strerror}", where=self.where) from error
        if not S_ISREG(stat.st_mode):
            raise GgufError("not a regular file", where=self.where)
        self.n_bytes = stat.st_size
        if self.n_bytes > _MAX_BYTES:
            raise GgufError(f"{self.n_bytes} bytes are too many for an imatrix", where=self.where)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def bytes(self, begin: int, n: int, where: str) -> bytearray:
        """`n` bytes from `begin` on, which the caller knows to be within the file."""
        data = bytearray(n)
        view, at = memoryview(data), begin
        while view:
            try:
                n_read = os.preadv(self._fd, [view], at)
            except OSError as error:
                raise GgufError(f"cannot be read: {error.strerror}", where=where) from error
            if not n_read:
                raise GgufError("the file shrank while it was read", where=where)
            view, at = view[n_read:], at + n_read
        return data

    def f32s(self, begin: int, n: int, where: str) -> F64:
        """`n` values from `begin` on."""
        values = np.empty(n)
        for first in range(0, n, _STEP):
            n_step = min(_STEP, n - first)
            data = self.bytes(begin + 4 * first, 4 * n_step, where)
            values[first : first + n_step] = np.frombuffer(data, "<f4")
        return values


@contextmanager
def new_file(path: Path, n_bytes: int) -> Iterator[Callable[[bytes | memoryview, int], None]]:
    """Write bytes at places of a file that gets its name when all went well, or is not left."""
    unfinished = partial_of(path)
    remove(unfinished)  # of a run that was killed; what is not written to shall be 0
    fd = open_sized(unfinished, n_bytes)
    try:
        yield lambda data, at: write_at(fd, data, at, path)
        with writing(path):
            os.fsync(fd)
    except BaseException:
        remove(unfinished)
        raise
    finally:
        os.close(fd)
    publish(path)


def as_f32(values: F64, *, where: str) -> npt.NDArray[np.float32]:
    """Little-endian f32 of the same shape; refuses what is not finite or does not fit."""
    check_finite(np.atleast_2d(values), where=where)
    if values.max() > _F32_MAX:
        raise NonFiniteError(f"{values.max()} is more than an f32 can hold", where=where)
    return values.astype("<f4")


def check_sums(sums: Sums, where: str) -> None:
    """Refuse what no sum of squares and no count can be."""
    check_finite(sums.sum2, where=where)
    counts = sums.counts
    if not np.isfinite(counts).all() or (counts % 1).any() or counts.max() > _MAX_COUNT:
        raise GgufError("counts are no numbers of tokens", where=where)
    if (counts < 0).any() or (sums.sum2 < 0).any():
        raise GgufError("a sum of squares or a count is negative", where=where)
    if sums.sum2[counts == 0].any():
        raise GgufError("sums over no tokens at all are not 0", where=where)
