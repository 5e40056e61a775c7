"""IQ1_S and IQ1_M: groups of 8 from a codebook of 2048 ternary vectors, shifted by +-1/8.

x = d (2 l + 1) (g +- 1/8). IQ1_S `d:f16 index[32] qh:u16[8]`: per 32 weights qh holds bits 8..10 of
the four indices, l in bits 12..14 and the shift (1 = minus) in bit 15. IQ1_M `index[32] qh[16]
scales:u16[4]`: per 8 weights a nibble of qh holds bits 8..10 of the index and the shift; `scales`
holds 3 bits of l per 16 weights and in its top nibbles d as f16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.grids import grid
from quantkit.quantize.kernels._common import read_f16
from quantkit.quantize.kernels._three_level_super import Plan, ThreeLevelCode
from quantkit.types import GgmlType

_DELTA = np.float32(0.125)
_SHIFTS = (0.125, -0.125)
_IQ1_S = ThreeLevelCode("IQ1_S", 8, 7, _SHIFTS, True, (0.8, 2.0), 1.0)
_IQ1_M = ThreeLevelCode("IQ1_M", 16, 7, _SHIFTS, False, (0.7, 2.4), 1.0)
_PLANS: dict[Effort, Plan] = {
    "fast": Plan(n_samples=6, shallow=1, deep=2, rounds=1),
    "default": Plan(n_samples=8, shallow=1, deep=2, rounds=2),
    "best": Plan(n_samples=24, shallow=3, deep=4, rounds=4),
}
# Where four 3-bit numbers lie in a 16-bit word.
_THREES = np.array([0, 3, 6, 9], np.uint16)
_FOURS = np.array([0, 4, 8, 12], np.uint16)


def _pack_s(bits: npt.NDArray, l: npt.NDArray, entries: npt.NDArray, minus: npt.NDArray) -> Blocks:
    qh = np.bitwise_or.reduce((entries >> 8).reshape(-1, 8, 4) << _THREES, 2)
    qh |= l.astype(np.uint16) << 12 | minus[:, ::4].astype(np.uint16) << 15
    out = np.empty((len(bits), 50), np.uint8)
    out[:, :2] = bits[:, np.newaxis].view(np.uint8)
    out[:, 2:34] = entries & 255
    out[:, 34:] = qh.view(np.uint8)
    return out


def _decode_s(blocks: Blocks) -> Tile:
    block = blocks.reshape(-1, 50)
    qh = np.ascontiguousarray(block[:, 34:]).view(np.uint16)
    scale = read_f16(block, 0) * (2 * (qh >> 12 & 7) + 1).astype(np.float32)
    shift = np.where(qh >> 15, -_DELTA, _DELTA)
    high = (qh[..., np.newaxis] >> _THREES & 7).reshape(-1, 32)
    levels = grid("IQ1_S")[block[:, 2:34] | high << 8].reshape(-1, 8, 32)
    return (scale[..., np.newaxis] * (levels + shift[..., np.newaxis])).reshape(len(blocks), -1)


def _pack_m(bits: npt.NDArray, l: npt.NDArray, entries: npt.NDArray, minus: npt.NDArray) -> Blocks:
    qh = (entries >> 8).astype(np.uint8) | minus << 3
    scales = np.bitwise_or.reduce(l.reshape(-1, 4, 4).astype(np.uint16) << _THREES, 2)
    scales |= (bits[:, np.newaxis] >> _FOURS & 15) << 12
    out = np.empty((len(bits), 56), np.uint8)
    out[:, :32] = entries & 255
    out[:, 32:48] = qh[:, ::2] | qh[:, 1::2] << 4
    out[:, 48:] = scales.view(np.uint8)
    return out


def _decode_m(blocks: Blocks) -> Tile:
    block = blocks.reshape(-1, 56)
    scales = np.ascontiguousarray(block[:, 48:]).view(np.uint16)
    d = np.bitwise_or.reduce(scales >> 12 << _FOURS, 1).view(np.float16).astype(np.float32)
    l = (scales[..., np.newaxis] >> _THREES & 7).reshape(-1, 16, 1)
    scale = d[:, np.newaxis, np.newaxis] * (2 * l + 1).astype(np.float32)
    qh = np.stack([block[:, 32:48] & 15, block[:, 32:48] >> 4], -1).reshape(-1, 32)
    shift = np.where(qh >> 3, -_DELTA, _DELTA)
    levels = grid("IQ1_M")[block[:, :32] | (qh & np.uint16(7)) << 8] + shift[..., np.newaxis]
    return (scale * levels.reshape(-1, 16, 16)).reshape(len(blocks), -1)


def _encoder(
    code: ThreeLevelCode, pack: Callable[..., Blocks]
) -> Callable[[Tile, Importance | None, How], Blocks]:
    def encode(x: Tile, importance: Importance | None, how: How) -> Blocks:
        found = code.search(x, importance, how.weighting, _PLANS[how.effort])
        return pack(*found).reshape(len(x), -1)

    return encode


CODECS = (
    Codec(GgmlType.IQ1_S, _encoder(_IQ1_S, _pack_s), _decode_s),
    Codec(GgmlType.IQ1_M, _encoder(_IQ1_M, _pack_m), _decode_m),
)
