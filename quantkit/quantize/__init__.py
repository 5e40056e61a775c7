"""Encoding weights into GGUF blocks: a registry of codecs and the kernels behind it."""

from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt

from quantkit.errors import NonFiniteError, UsageError
from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile, Weighting
from quantkit.quantize.codec import codec_of as _codec_of
from quantkit.quantize.gain import encode_rows
from quantkit.types import GgmlType

__all__ = ["Effort", "Weighting", "decode", "encode"]


def encode(
    x: npt.ArrayLike,
    type_name: str,
    importance: npt.ArrayLike | None = None,
    effort: Effort = "default",
    weighting: Weighting = "importance",
    gain: float = 0.0,
) -> Blocks:
    """Encode `x` f32[rows, cols] as blocks of a GGUF type, u8[rows, row_bytes].

    `importance` f32[cols] is the imatrix, the mean square of each column's input. `effort` is how
    hard to search: `fast`, `default` or `best`. `gain`, 0 to 1, gives back energy that low-bit
    codes lose: 0 has the least error, 1 does best in a model (see `quantize.gain`). Rows are
    independent of each other.

    Raises `UsageError` for an unknown type, effort or weighting, for a gain beyond 0 to 1 and for
    a shape that does not fit the type; `NonFiniteError`, naming [row, col], for NaN or infinity in
    `x` or `importance`.
    """
    codec = _named(type_name)
    if effort not in get_args(Effort):
        raise UsageError(f"unknown effort {effort!r}", hint=f"one of {get_args(Effort)}")
    if weighting not in get_args(Weighting):
        raise UsageError(f"unknown weighting {weighting!r}", hint=f"one of {get_args(Weighting)}")
    if not 0 <= gain <= 1:
        raise UsageError(f"a gain of {gain}", hint="from 0 to 1")
    tile = np.ascontiguousarray(x, np.float32)
    if tile.ndim != 2 or tile.shape[1] % codec.type.block_size:
        raise UsageError(
            f"{type_name} needs rows of a multiple of {codec.type.block_size} weights,"
            f" got shape {tile.shape}",
            hint="pass a 2-D array, or choose a type with a smaller block",
        )
    check_finite(tile)
    q = None if importance is None else _checked_importance(importance, tile.shape[1])
    return encode_rows(codec, tile, q, How(effort, weighting, gain))


def decode(blocks: npt.ArrayLike, type_name: str) -> Tile:
    """Decode `blocks` u8[rows, row_bytes] of a GGUF type to f32[rows, cols], bit-equal to ggml.

    Raises `UsageError` for an unknown type or a row that is not a whole number of blocks.
    """
    codec = _named(type_name)
    stored = np.ascontiguousarray(blocks)
    if stored.dtype != np.uint8 or stored.ndim != 2 or stored.shape[1] % codec.type.block_bytes:
        raise UsageError(
            f"{type_name} needs uint8 rows of a multiple of {codec.type.block_bytes} bytes,"
            f" got {stored.dtype} of shape {stored.shape}"
        )
    if not len(stored):
        cols = stored.shape[1] // codec.type.block_bytes * codec.type.block_size
        return np.empty((0, cols), np.float32)
    return codec.decode(stored)


def check_finite(x: npt.NDArray[np.float32], *, where: str = "") -> None:
    """Raise `NonFiniteError` with the index of the first NaN or infinity in `x`."""
    # Minimum and maximum let NaN through, so two quick passes see everything.
    if not x.size or (np.isfinite(x.min()) and np.isfinite(x.max())):
        return
    index = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
    raise NonFiniteError(
        f"{x[index]} at {list(index)}",
        where=where,
        hint="the source holds a damaged weight; fetch the file again or leave the tensor out",
    )


def _named(type_name: str) -> Codec:
    if type_name not in GgmlType.__members__:
        raise UsageError(
            f"unknown type {type_name!r}", hint="names are those of GGUF: Q4_K, IQ2_XXS, ..."
        )
    return _codec_of(GgmlType[type_name])


def _checked_importance(importance: npt.ArrayLike, cols: int) -> Importance:
    q = np.ascontiguousarray(importance, np.float32)
    if q.shape != (cols,):
        raise UsageError(f"importance has shape {q.shape}, expected ({cols},)")
    check_finite(q, where="importance")
    if cols and q.min() < 0:
        raise UsageError(
            f"importance is negative at [{int(q.argmin())}]",
            hint="an imatrix holds mean squares",
        )
    return q
