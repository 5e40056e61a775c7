"""Hidden states of all tokens: in memory, or in a file when they do not fit.

The file is read and written piece by piece rather than mapped, so that resident memory stays what
the pieces take.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from quantkit.run import fs

_PIECE = 16 << 20  # bytes moved at a time


class Rows(Protocol):
    """f32[n_rows, n_cols], on the CPU."""

    n_rows: int
    n_cols: int

    def read(self, begin: int, end: int) -> torch.Tensor:
        """A copy of rows `begin .. end`."""

    def write(self, begin: int, x: torch.Tensor) -> None:
        """Replace rows from `begin` on."""

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """A copy of the rows of index i64[n], ascending."""

    def add(self, index: torch.Tensor, x: torch.Tensor) -> None:
        """Add x f32[n, n_cols] to the rows of index i64[n], ascending and each only once."""


class RamRows:
    """Rows in memory."""

    def __init__(self, n_rows: int, n_cols: int) -> None:
        self.n_rows, self.n_cols = n_rows, n_cols
        self._x = torch.zeros(n_rows, n_cols)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """See `Rows`."""
        return self._x[begin:end].clone()

    def write(self, begin: int, x: torch.Tensor) -> None:
        """See `Rows`."""
        self._x[begin : begin + len(x)] = x

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """See `Rows`."""
        return self._x[index]

    def add(self, index: torch.Tensor, x: torch.Tensor) -> None:
        """See `Rows`."""
        self._x[index] += x


class FileRows:
    """Rows in a scratch file without a name: nothing is left behind, however the run ends."""

    def __init__(self, n_rows: int, n_cols: int, folder: Path) -> None:
        self.n_rows, self.n_cols = n_rows, n_cols
        self._where = folder / "hidden states"
        self._fd = fs.open_scratch(folder, n_rows * n_cols * 4)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """See `Rows`."""
        x = torch.empty(end - begin, self.n_cols)
        view = as_bytes(x)
        at = begin * self.n_cols * 4
        while view:
            with fs.writing(self._where):
                n_read = os.preadv(self._fd, [view[:_PIECE]], at)
                if n_read == 0:
                    raise OSError(errno.EIO, "the scratch file ends early")
            view, at = view[n_read:], at + n_read
        return x

    def write(self, begin: int, x: torch.Tensor) -> None:
        """See `Rows`."""
        fs.write_at(self._fd, as_bytes(x.contiguous()), begin * self.n_cols * 4, self._where)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """See `Rows`."""
        x = torch.empty(len(index), self.n_cols)
        for at, begin, end in _runs(index):
            x[at : at + end - begin] = self.read(begin, end)
        return x

    def add(self, index: torch.Tensor, x: torch.Tensor) -> None:
        """See `Rows`."""
        for at, begin, end in _runs(index):
            self.write(begin, self.read(begin, end) + x[at : at + end - begin])


def as_bytes(x: torch.Tensor) -> memoryview:
    """The memory of x f32[...], contiguous and possibly empty."""
    return x.view(-1).view(torch.uint8).numpy().data


def _runs(index: torch.Tensor) -> list[tuple[int, int, int]]:
    """Consecutive stretches of an ascending index: (place in the index, first, last + 1)."""
    ids = index.numpy()
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    starts = np.concatenate(([0], cuts))
    ends = np.concatenate((cuts, [len(ids)]))
    return [
        (int(a), int(ids[a]), int(ids[b - 1]) + 1) for a, b in zip(starts, ends, strict=True) if b
    ]


def rows_within(folder: Path, *, in_memory: bool) -> Callable[[int, int], Rows]:
    """What makes rows: in memory, or in the folder."""
    return RamRows if in_memory else partial(FileRows, folder=folder)
