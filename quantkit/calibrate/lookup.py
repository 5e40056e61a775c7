"""Importance for the encoder, a tensor at a time: an imatrix of a large model is larger than it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

import numpy as np
import numpy.typing as npt

from quantkit.calibrate.coverage import check_shape, importance
from quantkit.calibrate.statistics import Statistics
from quantkit.types import TensorSpec

_KEPT_BYTES = 24 << 20  # of tensors whose tiles are in flight; the largest take 11 MB

Rows = npt.NDArray[np.float32]


class Lookup:
    """f32[m, cols] by tensor name: a row for each expert or head, or one for all. Thread-safe.

    Raises `GgufError` where the statistics of a tensor are those of another shape.
    """

    def __init__(self, statistics: Statistics, tensors: Iterable[TensorSpec]) -> None:
        self._statistics = statistics
        self._shapes = {spec.name: spec.shape for spec in tensors if len(spec.shape) > 1}
        for name in self.covered():
            check_shape(statistics, name, self._shapes[name])
        self._kept: OrderedDict[str, Rows | None] = OrderedDict()
        self._n_bytes = 0
        self._lock = Lock()

    def get(self, name: str) -> Rows | None:
        """What to weigh the tensor's columns with, None where nothing is known."""
        if name not in self._shapes or name not in self._statistics.sums:
            return None
        with self._lock:
            if name not in self._kept:
                rows = importance(self._statistics, name, self._shapes[name]).values
                self._kept[name] = rows
                self._n_bytes += _size(rows)
                while self._n_bytes > _KEPT_BYTES and len(self._kept) > 1:
                    self._n_bytes -= _size(self._kept.popitem(last=False)[1])
            return self._kept[name]

    def covered(self) -> list[str]:
        """Tensors that there are statistics of."""
        return [name for name in self._shapes if name in self._statistics.sums]


def _size(rows: Rows | None) -> int:
    return 0 if rows is None else rows.nbytes
