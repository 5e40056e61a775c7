"""Rows of a GGUF tensor, straight from the checkpoint's weights: stacked, split, rearranged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.source.checkpoint import Checkpoint
from quantkit.source.packed import read_tile
from quantkit.types import Slab, SlabOp, TensorSpec

Tile = npt.NDArray[np.float32]  # [rows, cols]


def read_slab(checkpoint: Checkpoint, spec: TensorSpec, slab: int, first: int, last: int) -> Tile:
    """Output rows `first .. last` of slab number `slab`, f32[rows, cols]; a constant is slab 0.

    Raises as `read_tile` does.
    """
    if spec.constant:
        return np.array(spec.constant, np.float32).reshape(spec.grid)[first:last]
    source = spec.slabs[slab]
    if source.op is SlabOp.COPY:
        return _rows(checkpoint, source, source.row_begin + first, source.row_begin + last)
    whole = _rows(checkpoint, source, source.row_begin, source.row_end)
    return rearranged(whole, source.op)[first:last]


def read_rows(checkpoint: Checkpoint, spec: TensorSpec, begin: int, end: int) -> Tile:
    """Rows `begin .. end` of a GGUF tensor, leading axes flattened, f32[rows, cols]."""
    per_slab = spec.grid[0] // max(1, len(spec.slabs))
    parts = []
    while begin < end:
        slab, first = divmod(begin, per_slab)
        last = min(first + end - begin, per_slab)
        parts.append(read_slab(checkpoint, spec, slab, first, last))
        begin += last - first
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


_EVERY_SECOND: dict[SlabOp, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    SlabOp.EVEN_ROWS: lambda x: x[0::2],
    SlabOp.ODD_ROWS: lambda x: x[1::2],
    SlabOp.EVEN_COLUMNS: lambda x: x[:, 0::2],
    SlabOp.ODD_COLUMNS: lambda x: x[:, 1::2],
    SlabOp.EVEN_COLUMNS_AS_ROWS: lambda x: x[:, 0::2].T,
    SlabOp.ODD_COLUMNS_AS_ROWS: lambda x: x[:, 1::2].T,
}


def rearranged(x: npt.NDArray[Any], op: SlabOp) -> npt.NDArray[Any]:
    """The rows of a slab in the order that llama.cpp wants, values or blocks; see `SlabOp`."""
    n_rows, n_cols = x.shape
    if op is SlabOp.TRANSPOSE:
        return np.ascontiguousarray(x.T)
    if op is SlabOp.PLUS_ONE:
        return x + np.float32(1)
    if op in _EVERY_SECOND:
        return np.ascontiguousarray(_EVERY_SECOND[op](x))
    if op is SlabOp.INTERLEAVE:
        return x.reshape(2, n_rows // 2, n_cols).swapaxes(0, 1).reshape(n_rows, n_cols)
    if op is SlabOp.SPLIT_2D:
        return x.reshape(n_rows // 4, 2, 2, n_cols).swapaxes(0, 1).reshape(n_rows, n_cols)
    return x


def _rows(checkpoint: Checkpoint, slab: Slab, begin: int, end: int) -> Tile:
    if len(slab.weight.shape) == 1:  # a vector's rows are its elements
        return read_tile(checkpoint, slab.weight, 0, 1)[0, begin:end, np.newaxis]
    return read_tile(checkpoint, slab.weight, begin, end)
