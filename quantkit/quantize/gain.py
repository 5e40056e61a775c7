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
from quantkit.quantize.layout import rescaled
from quantkit.types import GgmlType

F32 = npt.NDArray[np.float32]

# Types of few levels under f16 scales: others lose next to nothing.
RAISED = frozenset(
    {
        GgmlType.Q2_K,
        GgmlType.IQ1_S,
        GgmlType.IQ1_M,
        GgmlType.IQ2_XXS,
        GgmlType.IQ2_XS,
        GgmlType.IQ2_S,
        GgmlType.IQ3_XXS,
        GgmlType.IQ3_S,
        GgmlType.TQ1_0,
        GgmlType.TQ2_0,
    }
)
_MAX_GAMMA = np.float32(2)  # a super-block that lost three quarters of its energy


def encode_rows(codec: Codec, x: Tile, importance: Importance | None, how: How) -> Blocks:
    """Blocks u8[rows, row_bytes] of x f32[rows, cols], scales raised by `how.gain`.

    Types that lose next to nothing are left as they are, and so are super-blocks whose scale would
    leave f16.
    """
    blocks = codec.encode(x, importance, how)
    if not how.gain or codec.type not in RAISED:
        return blocks
    n = codec.type.block_size
    gamma = _gamma(x, codec.decode(blocks), importance, n).reshape(len(x), x.shape[1] // n)
    return rescaled(codec.type, blocks, gamma ** np.float32(how.gain))


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
