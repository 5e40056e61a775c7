"""Tiles of logical weights: plain ones, compressed-tensors INT4 and block FP8 to f32.

Formulas, as compressed-tensors and DeepSeek-V3 define their formats:

* INT4_G32: `w[r, c] = (u[r, c] - 8) * scale[r, c // 32]`, u the offset nibble, eight columns an
  int32 with the first in the lowest bits; computed in f32, where it is exact for BF16 scales.
* FP8_BLOCK: `w[r, c] = fp8[r, c] * scale_inv[r // block_rows, c // block_cols]`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.errors import NonFiniteError, SourceError
from quantkit.source.group import fp8_block_shape, group_weights
from quantkit.types import TensorRef, Weight, WeightFormat

if TYPE_CHECKING:
    from quantkit.source.checkpoint import Checkpoint

__all__ = ["group_weights", "read_tile", "repack_q4_0"]

Tile = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_NUMPY: dict[str, type[np.generic]] = {
    "F32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
    "I32": np.int32,
    "I64": np.int64,
    "F8_E4M3": np.uint8,
}
# The exponent that only NaN and infinity have, in the bits of each float.
_NONFINITE = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F}
_HINT = "download the file again; if its checksum is right, the model itself is broken"


def read_tile(checkpoint: Checkpoint, weight: Weight, row_begin: int, row_end: int) -> Tile:
    """Rows `row_begin .. row_end` of a weight as f32[rows, cols], exact for every format.

    Rows are counted with all leading axes flattened; a vector is one row. Raises
    `NonFiniteError` for NaN and infinity among the values or their scales, also where a finite
    scale is so large that its largest level would overflow f32, and `SourceError` if the file
    cannot be read.
    """
    _check_rows(weight, row_begin, row_end)
    match weight.format:
        case WeightFormat.INT4_G32:
            return _read_int4(checkpoint, weight, row_begin, row_end)
        case WeightFormat.FP8_BLOCK:
            return _read_fp8(checkpoint, weight, row_begin, row_end)
        case _:
            return _read_plain(checkpoint, weight.data, row_begin, row_end)


def repack_q4_0(
    checkpoint: Checkpoint, weight: Weight, row_begin: int, row_end: int
) -> tuple[Bytes, int, npt.NDArray[np.bool_]]:
    """Rows of an INT4_G32 weight as GGML Q4_0, without any rounding.

    Gives the blocks u8[rows, cols / 32 * 18], how many of them are inexact, and which:
    bool[rows, cols / 32]. A block is inexact if its scale is no f16, which every BF16 from 2^-17
    to 65280 is; its bytes are not valid and the caller encodes it from `read_tile`. Decoding the
    other blocks gives exactly `read_tile`. Raises as `read_tile` does.
    """
    if weight.format is not WeightFormat.INT4_G32:
        raise ValueError(f"{weight.name} is stored as {weight.format}, not as INT4")
    _check_rows(weight, row_begin, row_end)
    packed, scales = _int4_parts(checkpoint, weight, row_begin, row_end)
    n_rows, n_blocks = scales.shape
    blocks = np.empty((n_rows * n_blocks, 9), np.uint16)
    inexact = np.empty(n_rows * n_blocks, np.bool_)
    n_inexact = _kernels().repack_q4_0(
        packed.view(np.uint32).reshape(-1, 4), scales.view(np.uint32).ravel(), blocks, inexact
    )
    return (
        blocks.view(np.uint8).reshape(n_rows, 18 * n_blocks),
        int(n_inexact),
        inexact.reshape(n_rows, n_blocks),
    )


@cache
def _kernels() -> Any:
    """The numba kernels, imported only where weights are read: planning needs none."""
    return import_module("quantkit.source.expand")


def _check_rows(weight: Weight, row_begin: int, row_end: int) -> None:
    if not 0 <= row_begin <= row_end <= weight.n_rows:
        raise ValueError(f"rows {row_begin}..{row_end} of {weight.name}, {weight.n_rows} rows")


def _read_rows(checkpoint: Checkpoint, ref: TensorRef, begin: int, end: int) -> npt.NDArray[Any]:
    """Rows of a stored tensor, leading axes flattened; floats as the integers of their bits."""
    n_rows = prod(ref.shape[:-1])
    row_bytes = ref.n_bytes // n_rows
    raw = checkpoint.pread(ref, begin * row_bytes, (end - begin) * row_bytes)
    values = raw.view(_NUMPY[ref.dtype])
    return values.reshape(end - begin, ref.shape[-1] if ref.shape else 1)


def _read_plain(checkpoint: Checkpoint, ref: TensorRef, begin: int, end: int) -> Tile:
    stored = _read_rows(checkpoint, ref, begin, end)
    kernels = _kernels()
    if ref.dtype == "F32":
        tile = stored.view(np.float32)
        sound = kernels.all_finite(stored.ravel())
    elif ref.dtype == "F16":
        tile = np.empty(stored.shape, np.float32)
        sound = kernels.expand_f16(stored.ravel(), tile.ravel())
    else:
        tile = np.empty(stored.shape, np.float32)
        sound = kernels.expand_bf16(stored.ravel(), tile.view(np.uint32).ravel())
    if not sound:
        raise _nonfinite(ref, _nonfinite_codes(ref, stored), begin, "NaN or infinity")
    return tile


def _nonfinite_codes(ref: TensorRef, codes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    mask = _NONFINITE[ref.dtype]
    return np.asarray((codes & mask) == mask)


def _read_scales(
    checkpoint: Checkpoint, ref: TensorRef, begin: int, end: int, largest_level: float
) -> Tile:
    scales = _read_plain(checkpoint, ref, begin, end)
    too_large = np.abs(scales) > np.finfo(np.float32).max / np.float32(largest_level)
    if too_large.any():
        raise _nonfinite(ref, too_large, begin, "a scale that overflows f32")
    return scales


def _int4_parts(
    checkpoint: Checkpoint, weight: Weight, begin: int, end: int
) -> tuple[npt.NDArray[np.int32], Tile]:
    """Packed words i32[rows, cols / 8] and scales f32[rows, cols / 32]."""
    _check_stored_shape(checkpoint, weight)
    packed = _read_rows(checkpoint, weight.data, begin, end)
    return packed, _read_scales(checkpoint, _scale(weight), begin, end, largest_level=8)


def _read_int4(checkpoint: Checkpoint, weight: Weight, begin: int, end: int) -> Tile:
    packed, scales = _int4_parts(checkpoint, weight, begin, end)
    tile = np.empty((end - begin, weight.n_cols), np.float32)
    _kernels().expand_int4(
        packed.view(np.uint8).reshape(-1, 16), scales.ravel(), tile.reshape(-1, 32)
    )
    return tile


def _read_fp8(checkpoint: Checkpoint, weight: Weight, begin: int, end: int) -> Tile:
    block_rows, block_cols = fp8_block_shape(checkpoint.config)
    scale = _scale(weight)
    # Row -> row of the scale; each matrix of a stack begins with a block of its own.
    matrix, row = np.divmod(np.arange(begin, end), weight.shape[-2])
    scale_rows = matrix * scale.shape[-2] + row // block_rows
    tile = np.empty((end - begin, weight.n_cols), np.float32)
    if begin == end:
        return tile
    first, last = int(scale_rows[0]), int(scale_rows[-1])
    scales = _read_scales(checkpoint, scale, first, last + 1, largest_level=448)
    codes = _read_rows(checkpoint, weight.data, begin, end)
    sound = _kernels().expand_fp8(codes, scales, scale_rows - first, block_cols, tile)
    if not sound:
        raise _nonfinite(weight.data, _nonfinite_codes(weight.data, codes), begin, "NaN")
    return tile


def _check_stored_shape(checkpoint: Checkpoint, weight: Weight) -> None:
    """Compare `weight_shape` with the shapes of the tensors, once for a weight."""
    if weight.name in checkpoint.shapes_checked:
        return
    ref = checkpoint.tensors[weight.name + "_shape"]
    stored = _read_rows(checkpoint, ref, 0, 1)[0].tolist()
    if stored != list(weight.shape):
        raise SourceError(
            f"says {stored}, the packed tensor has {list(weight.shape)}",
            where=f"{ref.file}: {ref.name}",
            hint=_HINT,
        )
    checkpoint.shapes_checked.add(weight.name)


def _scale(weight: Weight) -> TensorRef:
    if weight.scale is None:
        raise ValueError(f"{weight.name} has no scale")
    return weight.scale


def _nonfinite(
    ref: TensorRef, bad: npt.NDArray[np.bool_], row_begin: int, what: str
) -> NonFiniteError:
    row, col = divmod(int(bad.argmax()), bad.shape[1])
    return NonFiniteError(
        f"holds {what} at [{row_begin + row}, {col}], and {int(bad.sum()) - 1} more in this tile",
        where=f"{ref.file}: {ref.name}",
        hint=_HINT,
    )
