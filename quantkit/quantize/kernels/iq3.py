"""IQ3_XXS and IQ3_S: groups of 4 from codebooks of eight magnitudes, with signs.

IQ3_XXS `d:f16 index[64] u32[8]`, x = d (l + 1/2) / 2 * g * sign; per 32 weights the u32 holds four
7-bit signs, each for 8 weights of which an even number is minus, and l. IQ3_S `d:f16 index[64]
qh[8] signs[32] scales[4]`, x = d (2 l + 1) * g * sign; bit 8 of the index in qh, l a nibble per 32.
"""

from __future__ import annotations

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.grids import even_signs, grid, signs_of
from quantkit.quantize.kernels._codebook_super import CodebookCode, Plan
from quantkit.quantize.kernels._common import read_f16
from quantkit.types import GgmlType

_IQ3_XXS = CodebookCode("IQ3_XXS", 8, 4, True, (1.2, 4.2), 4.0)
_IQ3_S = CodebookCode("IQ3_S", 8, 4, False, (1.2, 3.8), 1.0)
_PLANS: dict[Effort, Plan] = {
    "fast": Plan(n_samples=8, rounds=1),
    "default": Plan(n_samples=12, rounds=2),
    "best": Plan(n_samples=24, rounds=4, n_tries=64),
}
# Where four 7-bit signs lie in a word; the top 4 bits of the word are l.
_SEVENS = np.array([0, 7, 14, 21], np.uint32)


def _encode_xxs(x: Tile, importance: Importance | None, how: How) -> Blocks:
    bits, l, entries, signs = _IQ3_XXS.search(x, importance, how.weighting, _PLANS[how.effort])
    words = (signs.reshape(-1, 8, 4) & np.uint32(127)) << _SEVENS
    words = np.bitwise_or.reduce(words, 2) | l.astype(np.uint32) << 28
    out = np.empty((len(bits), 98), np.uint8)
    out[:, :2] = bits[:, np.newaxis].view(np.uint8)
    out[:, 2:66] = entries
    out[:, 66:] = words.view(np.uint8)
    return out.reshape(len(x), -1)


def _decode_xxs(blocks: Blocks) -> Tile:
    block = blocks.reshape(-1, 98)
    words = np.ascontiguousarray(block[:, 66:]).view(np.uint32)
    l = (words >> 28).astype(np.float32)
    scale = read_f16(block, 0) * (np.float32(0.5) + l) * np.float32(0.5)
    levels = grid("IQ3_XXS")[block[:, 2:66]].reshape(-1, 8, 32)
    signs = even_signs(words[..., np.newaxis] >> _SEVENS & 127).reshape(-1, 8, 32)
    return (scale[..., np.newaxis] * levels * signs).reshape(len(blocks), -1)


def _encode_s(x: Tile, importance: Importance | None, how: How) -> Blocks:
    bits, l, entries, signs = _IQ3_S.search(x, importance, how.weighting, _PLANS[how.effort])
    out = np.empty((len(bits), 110), np.uint8)
    out[:, :2] = bits[:, np.newaxis].view(np.uint8)
    out[:, 2:66] = entries & 255
    out[:, 66:74] = np.packbits(entries >> 8, axis=1, bitorder="little")
    out[:, 74:106] = signs
    out[:, 106:] = l[:, ::2] | l[:, 1::2] << 4
    return out.reshape(len(x), -1)


def _decode_s(blocks: Blocks) -> Tile:
    block = blocks.reshape(-1, 110)
    high = np.unpackbits(block[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
    packed = block[:, 106:]
    l = np.stack([packed & 15, packed >> 4], -1).reshape(-1, 8).astype(np.float32)
    scale = read_f16(block, 0) * (1 + 2 * l)
    levels = grid("IQ3_S")[block[:, 2:66] | high << 8].reshape(-1, 8, 32)
    signs = signs_of(block[:, 74:106]).reshape(-1, 8, 32)
    return (scale[..., np.newaxis] * levels * signs).reshape(len(blocks), -1)


CODECS = (
    Codec(GgmlType.IQ3_XXS, _encode_xxs, _decode_xxs),
    Codec(GgmlType.IQ3_S, _encode_s, _decode_s),
)
