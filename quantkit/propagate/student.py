"""The weights of the run that is being quantised: what is done already, and the rest as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from quantkit.forward.weights import Tile, Weights
from quantkit.quantize.codec import Blocks, codec_of
from quantkit.types import GgmlType, Kv

Nearest = Callable[[str, Tile, int], Tile]


class StudentWeights:
    """`Weights` over another model's: rows that were put here decode, others are the teacher's.

    `nearest(name, rows f32, matrix)` gives what becomes of rows of tensors that are rounded without
    looking at inputs, or the rows themselves.
    """

    def __init__(self, teacher: Weights, nearest: Nearest) -> None:
        self._teacher, self._nearest = teacher, nearest
        self._blocks: dict[tuple[str, int], tuple[GgmlType, Blocks]] = {}

    @property
    def kvs(self) -> Mapping[str, Kv]:
        """See `Weights`."""
        return self._teacher.kvs

    def __contains__(self, name: str) -> bool:
        return name in self._teacher

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self._teacher.shape(name)

    def type(self, name: str) -> GgmlType:
        """See `Weights`. Inputs are not rounded here, so all count as F32."""
        return GgmlType.F32

    def read(self, name: str, begin: int, end: int) -> Tile:
        """See `Weights`. Rows of an expert or a head lie within one matrix of the tensor."""
        n_rows = self._matrix_rows(name)
        parts = []
        while begin < end:
            matrix, first = divmod(begin, n_rows)
            last = min(first + end - begin, n_rows)
            parts.append(self._read(name, matrix, first, last))
            begin += last - first
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def put(self, name: str, matrix: int, type_: GgmlType, blocks: Blocks) -> None:
        """A whole matrix of a tensor is done."""
        self._blocks[name, matrix] = type_, blocks

    def forget(self, name: str, matrix: int) -> None:
        """A matrix is not needed any more."""
        self._blocks.pop((name, matrix), None)

    def clear(self) -> None:
        """Nothing of what was put is needed any more."""
        self._blocks.clear()

    def _matrix_rows(self, name: str) -> int:
        shape = self.shape(name)
        return 1 if len(shape) == 1 else shape[-2]

    def _read(self, name: str, matrix: int, first: int, last: int) -> Tile:
        if (name, matrix) in self._blocks:
            type_, blocks = self._blocks[name, matrix]
            return codec_of(type_).decode(blocks[first:last])
        begin = matrix * self._matrix_rows(name) + first
        rows = self._teacher.read(name, begin, begin + last - first)
        return self._nearest(name, rows, matrix)
