"""Kimi's routed experts: symmetric INT4 in groups of 32, read by kernels of their own.

`w[r, c] = (u[r, c] - 8) * scale[r, c // 32]`, u the offset nibble, eight columns an int32 with the
first in the lowest bits; computed in f32, where it is exact for BF16 scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.source.formats.integers import check_stored_shape
from quantkit.source.formats.stored import Bytes, Source, Tile, kernels, read_floats, read_rows
from quantkit.types import Weight

_LARGEST = 8.0


def read(source: Source, weight: Weight, begin: int, end: int) -> Tile:
    """Rows as f32[rows, cols]; see `quantkit.source.packed.read_tile`."""
    packed, scales = _parts(source, weight, begin, end)
    tile = np.empty((end - begin, weight.n_cols), np.float32)
    kernels().expand_int4(
        packed.view(np.uint8).reshape(-1, 16), scales.ravel(), tile.reshape(-1, 32)
    )
    return tile


def repack(
    source: Source, weight: Weight, begin: int, end: int
) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Rows as Q4_0, u8[rows, cols / 32 * 18], and the blocks whose scale is no f16.

    Every BF16 from 2^-17 to 65280 is one.
    """
    packed, scales = _parts(source, weight, begin, end)
    n_rows, n_blocks = scales.shape
    blocks = np.empty((n_rows * n_blocks, 9), np.uint16)
    inexact = np.empty(n_rows * n_blocks, np.bool_)
    kernels().repack_q4_0(packed.reshape(-1, 4), scales.view(np.uint32).ravel(), blocks, inexact)
    return (
        blocks.view(np.uint8).reshape(n_rows, 18 * n_blocks),
        inexact.reshape(n_rows, n_blocks),
    )


def _parts(source: Source, weight: Weight, begin: int, end: int) -> tuple[npt.NDArray[Any], Tile]:
    """Packed words u32[rows, cols / 8] and scales f32[rows, cols / 32]."""
    if weight.scale is None:
        raise ValueError(f"{weight.name} has no scale")
    check_stored_shape(source, weight)
    packed = read_rows(source, weight.data, begin, end)
    return packed, read_floats(source, weight.scale, begin, end, weight.n_cols // 32, _LARGEST)
