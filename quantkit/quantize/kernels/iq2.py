"""IQ2_XXS, IQ2_XS, IQ2_S: groups of 8 from codebooks of the magnitudes 8, 25, 43, with signs.

x = d (l + 1/2) / 4 * g * sign. IQ2_XXS `d:f16 {index:u8[4] u32}[8]`, per 32 weights: the u32 holds
four 7-bit signs and l. IQ2_XS `d:f16 u16[32] scales[8]`: 9 bits of index and 7 of signs per 8
weights, l as a nibble per 16. IQ2_S `d:f16 index[32] signs[32] qh[8] scales[8]`: bits 8 and 9 of
the index in qh. Seven bits stand for eight signs, of which an even number is minus.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.grids import even_signs, grid, signs_of
from quantkit.quantize.kernels import _codebook_super as exhaustive
from quantkit.quantize.kernels import _three_level_super as outward
from quantkit.quantize.kernels._common import read_f16
from quantkit.types import GgmlType

_SPAN = (1.0, 3.2)
_IQ2_XXS = exhaustive.CodebookCode("IQ2_XXS", 8, 8, True, _SPAN, 8.0, 1.0)
_IQ2_XS = exhaustive.CodebookCode("IQ2_XS", 16, 8, True, _SPAN, 8.0, 1.0)
_IQ2_S = exhaustive.CodebookCode("IQ2_S", 16, 8, False, _SPAN, 8.0)
_IQ2_S_OUTWARD = outward.ThreeLevelCode("IQ2_S", 16, 15, (0.0,), False, _SPAN, 8.0)
_PLANS: dict[Effort, exhaustive.Plan] = {
    "fast": exhaustive.Plan(n_samples=8, rounds=1),
    "default": exhaustive.Plan(n_samples=12, rounds=2),
    "best": exhaustive.Plan(n_samples=24, rounds=4, n_tries=64),
}
_OUTWARD_PLANS: dict[Effort, outward.Plan] = {
    "fast": outward.Plan(n_samples=10, shallow=2, deep=3, rounds=1),
    "default": outward.Plan(n_samples=12, shallow=3, deep=4, rounds=2),
}


# Where four 7-bit signs lie in a word; the top 4 bits of the word are l.
_SEVENS = np.array([0, 7, 14, 21], np.uint32)


def _decoded(
    rows: int, d: npt.NDArray, l: npt.NDArray, levels: npt.NDArray, signs: npt.NDArray
) -> Tile:
    """d (l + 1/2) / 4 * level * sign, rounded in this order; l u8[supers, blocks]."""
    scale = d * (np.float32(0.5) + l.astype(np.float32)) * np.float32(0.25)
    parts = (*l.shape, -1)
    return (scale[..., np.newaxis] * levels.reshape(parts) * signs.reshape(parts)).reshape(rows, -1)


def _nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """u8[n, k] -> u8[n, 2 k], low nibbles first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def _encode_xxs(x: Tile, importance: Importance | None, how: How) -> Blocks:
    bits, l, entries, signs = _IQ2_XXS.search(x, importance, how.weighting, _PLANS[how.effort])
    words = (signs.reshape(-1, 8, 4) & np.uint32(127)) << _SEVENS
    words = np.bitwise_or.reduce(words, 2) | l.astype(np.uint32) << 28
    out = np.empty((len(bits), 66), np.uint8)
    out[:, :2] = bits[:, np.newaxis].view(np.uint8)
    pairs = [entries.astype(np.uint8).reshape(-1, 8, 4), words[..., np.newaxis].view(np.uint8)]
    out[:, 2:] = np.concatenate(pairs, 2).reshape(-1, 64)
    return out.reshape(len(x), -1)


def _decode_xxs(blocks: Blocks) -> Tile:
    block = blocks.reshape(-1, 66)
    pairs = block[:, 2:].reshape(-1, 8, 8)
    words = np.ascontiguousarray(pairs[..., 4:]).view(np.uint32)
    levels = grid("IQ2_XXS")[pairs[..., :4]]
    signs = even_signs(words >> _SEVENS & 127)
    return _decoded(len(blocks), read_f16(block, 0), words[..., 0] >> 28, levels, signs)


def _encode_xs(x: Tile, importance: Importance | None, how: How) -> Blocks:
    bits, l, entries, signs = _IQ2_XS.search(x, importance, how.weighting, _PLANS[how.effort])
    out = np.empty((len(bits), 74), np.uint8)
    out[:, :2] = bits[:, np.newaxis].view(np.uint8)
    out[:, 2:66] = (entries | (signs & np.uint16(127)) << 9).view(np.uint8)
    out[:, 66:] = l[:, ::2] | l[:, 1::2] << 4
    return out.reshape(len(x), -1)


def _decode_xs(blocks: Blocks) -> Tile:
    block = blocks.reshape(-1, 74)
    words = np.ascontiguousarray(block[:, 2:66]).view(np.uint16)
    levels = grid("IQ2_XS")[words & 511]
    signs = even_signs(words >> 9)
    return _decoded(len(blocks), read_f16(block, 0), _nibbles(block[:, 66:]), levels, signs)


def _encode_s(x: Tile, importance: Importance | None, how: How) -> Blocks:
    if how.effort in _OUTWARD_PLANS:
        plan = _OUTWARD_PLANS[how.effort]
        bits, l, entries, _ = _IQ2_S_OUTWARD.search(x, importance, how.weighting, plan)
        signs = np.packbits(x.reshape(-1, 8) < 0, axis=1, bitorder="little").reshape(-1, 32)
    else:
        bits, l, entries, signs = _IQ2_S.search(x, importance, how.weighting, _PLANS[how.effort])
    high = (entries >> 8).reshape(-1, 8, 4) << np.array([0, 2, 4, 6], np.uint16)
    out = np.empty((len(bits), 82), np.uint8)
    out[:, :2] = bits[:, np.newaxis].view(np.uint8)
    out[:, 2:34] = entries & 255
    out[:, 34:66] = signs
    out[:, 66:74] = np.bitwise_or.reduce(high, 2)
    out[:, 74:] = l[:, ::2] | l[:, 1::2] << 4
    return out.reshape(len(x), -1)


def _decode_s(blocks: Blocks) -> Tile:
    block = blocks.reshape(-1, 82)
    high = block[:, 66:74, np.newaxis] >> np.array([0, 2, 4, 6], np.uint8) & 3
    entries = block[:, 2:34] | high.reshape(-1, 32).astype(np.uint16) << 8
    signs = signs_of(block[:, 34:66])
    l = _nibbles(block[:, 74:])
    return _decoded(len(blocks), read_f16(block, 0), l, grid("IQ2_S")[entries], signs)


CODECS = (
    Codec(GgmlType.IQ2_XXS, _encode_xxs, _decode_xxs),
    Codec(GgmlType.IQ2_XS, _encode_xs, _decode_xs),
    Codec(GgmlType.IQ2_S, _encode_s, _decode_s),
)
