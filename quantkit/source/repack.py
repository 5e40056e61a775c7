"""Weights whose values are those of a GGML type: their codes become blocks without rounding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.source.formats import codes, columns, fp4, int4, integers
from quantkit.source.formats.columns import Columns
from quantkit.source.formats.integers import Integers
from quantkit.source.formats.stored import Bytes, Source
from quantkit.types import GgmlType, Weight, WeightFormat

_BLOCK = 32


def repacks_to(weight: Weight) -> GgmlType | None:
    """The type whose levels a weight already has, if there is one.

    INT4 without zero points has Q4_0's and INT8 Q8_0's, where groups are multiples of 32 (also
    GPTQ's, if declared symmetric and in order); MXFP4 has MXFP4's. Whether a scale is an f16 too
    is seen when it is read.
    """
    layout = weight.layout
    if weight.format is WeightFormat.INT4_G32:
        return GgmlType.Q4_0
    if weight.format is WeightFormat.MXFP4:
        return GgmlType.MXFP4
    if weight.n_cols % _BLOCK:
        return None
    is_grid = (isinstance(layout, Integers) and layout.is_plain) or (
        isinstance(layout, Columns) and layout.symmetric
    )
    if not is_grid or layout.group_size % _BLOCK:
        return None
    return {4: GgmlType.Q4_0, 8: GgmlType.Q8_0}.get(layout.bits)


def repack(
    source: Source, weight: Weight, begin: int, end: int
) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Rows of a weight as blocks of `repacks_to(weight)`, and which blocks are not exact.

    Gives u8[rows, row bytes] and bool[rows, cols / 32]. The bytes of a block that is not exact
    (its scale is no f16, or its zero point is not the middle) are not valid, and the caller
    encodes it from `read_tile`. Decoding the others gives exactly `read_tile`. Raises as
    `read_tile` does.
    """
    if repacks_to(weight) is None:
        raise ValueError(f"{weight.name} is stored as {weight.format}, which no type holds exactly")
    match weight.format:
        case WeightFormat.INT4_G32:
            return int4.repack(source, weight, begin, end)
        case WeightFormat.MXFP4:
            blocks = fp4.repack(source, weight, begin, end)
            return blocks, np.zeros((end - begin, weight.n_cols // _BLOCK), np.bool_)
        case WeightFormat.GPTQ:
            return codes.blocks(columns.codes(source, weight, begin, end))
    return codes.blocks(integers.codes(source, weight, begin, end))
