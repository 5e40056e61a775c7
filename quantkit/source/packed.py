"""Tiles of logical weights, in whatever format they are stored, as f32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from quantkit.source import repack as repacking
from quantkit.source.formats import bitsandbytes, columns, fp4, fp8, int4, integers, plain
from quantkit.source.group import group_weights
from quantkit.source.repack import repacks_to
from quantkit.types import Weight, WeightFormat

if TYPE_CHECKING:
    from quantkit.source.checkpoint import Checkpoint

__all__ = ["group_weights", "read_tile", "repack", "repacks_to"]

Tile = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_READERS = {
    WeightFormat.F32: plain.read,
    WeightFormat.F16: plain.read,
    WeightFormat.BF16: plain.read,
    WeightFormat.INT4_G32: int4.read,
    WeightFormat.INT4: integers.read,
    WeightFormat.INT: integers.read,
    WeightFormat.FP8_BLOCK: fp8.read,
    WeightFormat.FP8: fp8.read,
    WeightFormat.MXFP4: fp4.read,
    WeightFormat.NVFP4: fp4.read,
    WeightFormat.GPTQ: columns.read,
    WeightFormat.AWQ: columns.read,
    WeightFormat.BNB_4BIT: bitsandbytes.read_4bit,
}


def read_tile(checkpoint: Checkpoint, weight: Weight, row_begin: int, row_end: int) -> Tile:
    """Rows `row_begin .. row_end` of a weight as f32[rows, cols].

    Rows are counted with all leading axes flattened; a vector is one row. Values are exact where
    the product of code and scale is an f32, and that product rounded once elsewhere; see
    `docs/source-formats.md`. Raises `NonFiniteError` for NaN and infinity among the values or
    their scales, also where a finite scale is so large that its largest level would overflow
    f32, and `SourceError` if the file cannot be read.
    """
    _check_rows(weight, row_begin, row_end)
    if weight.format is WeightFormat.INT8 and weight.layout is None:
        return bitsandbytes.read_int8(checkpoint, weight, row_begin, row_end)
    reader = _READERS.get(weight.format, integers.read)
    return reader(checkpoint, weight, row_begin, row_end)


def repack(
    checkpoint: Checkpoint, weight: Weight, row_begin: int, row_end: int
) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """See `quantkit.source.repack.repack`."""
    _check_rows(weight, row_begin, row_end)
    return repacking.repack(checkpoint, weight, row_begin, row_end)


def _check_rows(weight: Weight, row_begin: int, row_end: int) -> None:
    if not 0 <= row_begin <= row_end <= weight.n_rows:
        raise ValueError(f"rows {row_begin}..{row_end} of {weight.name}, {weight.n_rows} rows")
