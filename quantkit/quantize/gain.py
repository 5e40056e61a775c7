"""Give back the energy that a least-squares code loses.

A code that minimises the squared error is the weights' conditional mean: shorter than the weights,
with an error that is orthogonal to the code but points against the weights. Rounding noise averages
out over columns. This part does not, since weights are aligned with what they respond to, and it
adds up from layer to layer. With

    gamma = (sum w x^2 / sum w x'^2) ^ gain

per super-block, gain 0 leaves least squares, 1/2 gives x' the energy of x, and 1 makes the error
orthogonal to the weights (for a conditional mean sum w x x' = sum w x'^2). The squared error grows
by little, from e to e / (1 - e) at gain 1. docs/decisions/0005 has what it does to KL divergence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.quantize.codec import Blocks, Codec, How, Importance, Tile
from quantkit.types import GgmlType

F32 = npt.NDArray[np.float32]

# Where a super-block's f16 scales lie, by type. IQ1_M's is in pieces.
_SCALES: dict[GgmlType, tuple[int, ...]] = {
    GgmlType.Q2_K: (80, 82),
    GgmlType.IQ1_S: (0,),
    GgmlType.IQ2_XXS: (0,),
    GgmlType.IQ2_XS: (0,),
    GgmlType.IQ2_S: (0,),
    GgmlType.IQ3_XXS: (0,),
    GgmlType.IQ3_S: (0,),
    GgmlType.TQ1_0: (52,),
    GgmlType.TQ2_0: (64,),
}


def encode_rows(codec: Codec, x: Tile, importance: Importance | None, how: How) -> Blocks:
    """Blocks u8[rows, row_bytes] of x f32[rows, cols], scales raised by `how.gain`.

    Types that lose next to nothing are left as they are, and so are super-blocks whose scale would
    leave f16.
    """
    blocks = codec.encode(x, importance, how)
    if not how.gain or not (codec.type in _SCALES or codec.type is GgmlType.IQ1_M):
        return blocks
    n, n_bytes = codec.type.block_size, codec.type.block_bytes
    gamma = _gamma(x, codec.decode(blocks), importance, n) ** np.float32(how.gain)
    raised = blocks.reshape(-1, n_bytes).copy()
    if codec.type is GgmlType.IQ1_M:
        pieces = raised[:, 48:56].copy().view("<u2")
        bits = np.bitwise_or.reduce(pieces >> 12 << _NIBBLES, 1).astype("<u2")
        bits = _times(bits, gamma)
        pieces = pieces & 0xFFF | (bits[:, np.newaxis] >> _NIBBLES & 15) << 12
        raised[:, 48:56] = pieces.astype("<u2").view(np.uint8)
    for at in _SCALES.get(codec.type, ()):
        bits = raised[:, at : at + 2].copy().view("<u2")[:, 0]
        raised[:, at : at + 2] = _times(bits, gamma)[:, np.newaxis].view(np.uint8)
    return raised.reshape(blocks.shape)


_NIBBLES = np.array([0, 4, 8, 12], np.uint16)
_MAX_GAMMA = np.float32(2)  # a super-block that lost three quarters of its energy


def _gamma(x: Tile, decoded: Tile, importance: Importance | None, n: int) -> F32:
    """sum w x^2 / sum w x'^2 of every super-block, at least 1."""
    wanted, kept = _energy(x, importance, n), _energy(decoded, importance, n)
    ratio = np.divide(wanted, kept, out=np.ones_like(kept), where=kept > 0)
    return np.asarray(np.clip(ratio, 1, _MAX_GAMMA), np.float32)


def _energy(x: Tile, importance: Importance | None, n: int) -> npt.NDArray[np.float64]:
    squares = np.square(x, dtype=np.float64)
    if importance is not None:
        squares *= importance
    return np.asarray(squares.reshape(-1, n).sum(1))


def _times(bits: npt.NDArray[np.uint16], gamma: F32) -> npt.NDArray[np.uint16]:
    """f16 bits of the scale times gamma; unchanged where that is infinite."""
    scale = bits.view(np.float16)
    with np.errstate(over="ignore"):
        product = (scale.astype(np.float32) * gamma).astype(np.float16)
    return np.where(np.isfinite(product), product, scale).view(np.uint16)
