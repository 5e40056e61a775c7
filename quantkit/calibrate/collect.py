"""The observer of a forward pass that adds up squared inputs, layer by layer into files.

Sums are made span by span: those of a weight's row over a span's tokens are added in f64 and
rounded to the f32 that a file holds, and the spans' are added in f64 in their order. So it makes no
difference whether one process has seen all spans, or several have, each some of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from quantkit.calibrate.imatrix import read_imatrix, write_imatrix
from quantkit.calibrate.statistics import F64, Statistics, Sums, add, added, check_finite
from quantkit.calibrate.storage import as_f32
from quantkit.container.names import shown

# An expert with fewer tokens of its own also sees a sample of all tokens. Shrinkage gives that
# sample the weight of some 64 tokens, so beyond this count it would hardly be heard.
_STARVED = 512

_ROWS = 64  # squared at a time on a CPU, so that they stay in the cache


@dataclass(slots=True)
class _Table:
    """Sums by weight name; weights with one input, such as gate and up, share theirs."""

    sums: dict[str, Sums] = field(default_factory=dict)
    priors: dict[str, Sums] = field(default_factory=dict)


# (weights with the same input, row, number of rows): squares and tokens of the span at work
_Open = dict[tuple[tuple[str, ...], int, int], tuple[F64, int]]


class Collector:
    """Holds the sums of the layer at work and of no other; see `Observer`.

    The spans' sums are added up, or kept apart where their number is given: then `enter` is told
    numbers below that.
    """

    def __init__(self, n_apart: int | None = None) -> None:
        self._n_apart = n_apart
        self._tables = self._empty()
        self._span = 0
        self._sums: _Open = {}
        self._priors: _Open = {}

    def enter(self, span: int) -> None:
        """What is seen from now on is of this span."""
        if span != self._span:
            self._fold()
            self._span = span

    def see(self, names: tuple[str, ...], x: torch.Tensor, row: int = 0, n_rows: int = 1) -> None:
        """See `Observer`."""
        _see(self._sums, (names, row, n_rows), x)

    def wants_prior(self, name: str, n_tok: int) -> bool:
        """See `Observer`."""
        return n_tok < _STARVED

    def see_prior(self, name: str, x: torch.Tensor, row: int, n_rows: int) -> None:
        """See `Observer`."""
        _see(self._priors, ((name,), row, n_rows), x)

    def save(self, *paths: Path) -> None:
        """Write what was seen since the last save as imatrix files, and forget it.

        One file, or one for each of the spans that are kept apart.
        """
        self._fold()
        for path, table in zip(paths, self._tables, strict=True):
            write_imatrix(path, Statistics(sums=table.sums, priors=table.priors))
        self._tables = self._empty()

    def arrays(self) -> dict[str, npt.NDArray[np.float64]]:
        """Nothing: between layers all is in files; see `Memory`."""
        return {}

    def restore(self, arrays: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """See `Memory`."""

    def _empty(self) -> list[_Table]:
        return [_Table() for _ in range(self._n_apart or 1)]

    def _fold(self) -> None:
        """Add the sums of the span at work, as a file would hold them."""
        table = self._tables[0 if self._n_apart is None else self._span]
        for into, seen in ((table.sums, self._sums), (table.priors, self._priors)):
            for (names, row, n_rows), (squares, n_tok) in seen.items():
                first, *others = names
                sum2 = as_f32(squares, where=f"tensor {shown(first)}")
                add(into, first, sum2, n_tok, row=row, n_rows=n_rows)
                for name in others:
                    into[name] = into[first]
            seen.clear()


def fold_files(paths: Sequence[Path], output: Path) -> None:
    """Add up what a `Collector` that keeps spans apart has written, in the order of the spans.

    Gives the file that one which adds them up would have written. One file is open at a time.
    """
    table = _Table()
    for path in paths:
        part = read_imatrix(path)
        for into, theirs in ((table.sums, part.sums), (table.priors, part.priors)):
            for name in theirs:
                mine = {name: into[name]} if name in into else {}
                into[name] = added([mine, theirs])[name]
    write_imatrix(output, Statistics(sums=table.sums, priors=table.priors))


def _see(seen: _Open, key: tuple[tuple[str, ...], int, int], x: torch.Tensor) -> None:
    squares = _squares(x)
    check_finite(squares[np.newaxis], where=f"tensor {shown(key[0][0])}")
    before, n_tok = seen.get(key, (0.0, 0))
    seen[key] = before + squares, n_tok + len(x)


def _squares(x: torch.Tensor) -> F64:
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(_ROWS if x.device.type == "cpu" else max(1, len(x))):
        total += part.square().sum(0, dtype=torch.float64)
    sums: F64 = total.cpu().numpy()
    return sums
