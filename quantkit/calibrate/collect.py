"""The observer of a forward pass that adds up squared inputs, layer by layer into files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from quantkit.calibrate.imatrix import write_imatrix
from quantkit.calibrate.statistics import Statistics, Sums, add

# An expert with fewer tokens of its own also sees a sample of all tokens. Shrinkage gives that
# sample the weight of some 64 tokens, so beyond this count it would hardly be heard.
_STARVED = 512

_ROWS = 64  # squared at a time on a CPU, so that they stay in the cache


class Collector:
    """Holds the sums of the layer at work and of no other; see `Observer`.

    Squares are added in f64. Weights with one input, such as gate and up, share one array.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Sums] = {}
        self._priors: dict[str, Sums] = {}

    def see(self, names: tuple[str, ...], x: torch.Tensor, row: int = 0, n_rows: int = 1) -> None:
        """See `Observer`."""
        first, *others = names
        add(self._sums, first, _squares(x), len(x), row=row, n_rows=n_rows)
        for name in others:
            self._sums[name] = self._sums[first]

    def wants_prior(self, name: str, n_tok: int) -> bool:
        """See `Observer`."""
        return n_tok < _STARVED

    def see_prior(self, name: str, x: torch.Tensor, row: int, n_rows: int) -> None:
        """See `Observer`."""
        add(self._priors, name, _squares(x), len(x), row=row, n_rows=n_rows)

    def save(self, path: Path) -> None:
        """Write what was seen since the last save as an imatrix, and forget it."""
        write_imatrix(path, Statistics(sums=self._sums, priors=self._priors))
        self._sums, self._priors = {}, {}

    def arrays(self) -> dict[str, npt.NDArray[np.float64]]:
        """Nothing: between layers all is in files; see `Memory`."""
        return {}

    def restore(self, arrays: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """See `Memory`."""


def _squares(x: torch.Tensor) -> npt.NDArray[np.float64]:
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(_ROWS if x.device.type == "cpu" else max(1, len(x))):
        total += part.square().sum(0, dtype=torch.float64)
    sums: npt.NDArray[np.float64] = total.cpu().numpy()
    return sums
