"""IQ4_NL and IQ4_XS: 4-bit codes for 16 unevenly spaced levels.

IQ4_NL `d:f16 qs[16]` per 32 weights, x = d T[code]. IQ4_XS per super-block of 256
`d:f16 scales_h:u16 scales_l[4] qs[128]`, x = d s T[code] with a 6-bit s in -32..31 per 32 weights.
Byte j of 16 holds element j in its low and j + 16 in its high nibble.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.kernels._common import helper, kernel, prepared, read_f16
from quantkit.quantize.kernels._simd import (
    as_i32,
    fma,
    lane,
    load8,
    lookup8,
    maximum,
    minimum,
    select,
    splat8,
    store,
)
from quantkit.quantize.kernels._super import SUPER, load_super, scaled_searcher
from quantkit.quantize.kernels._tile import (
    LANES,
    NO_ROOTS,
    ggml_weights,
    normalise,
    put_f16,
    reciprocal,
    root_mean_squares,
    scale_fitters,
    scale_pickers,
    transpose,
    weight_tiles,
)
from quantkit.types import GgmlType

SIZE = 32
LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# The nearest level by table: cut into 8 slices, 23 wide and open at the ends, no slice holds more
# than two of the midpoints between levels, and each has one. So a slice knows its first code and
# two midpoints.
_WIDTH, _BELOW = np.float32(1 / 23), np.float32(98.5 / 23)
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2
_EDGES = 23 * np.arange(1, 8) - 98.5
_SLICES = np.split(_MIDDLES, np.searchsorted(_MIDDLES, _EDGES))
_CODE = np.searchsorted(_MIDDLES, [inside[0] for inside in _SLICES]).astype(np.int32)
_MIDDLE1 = np.array([inside[0] for inside in _SLICES], np.float32)
_MIDDLE2 = np.array([[*inside, np.inf][1] for inside in _SLICES], np.float32)
_LEVEL0, _LEVEL1 = LEVELS[_CODE], LEVELS[_CODE + 1]
_LEVEL2 = np.append(LEVELS, np.float32(0))[_CODE + 2]


@helper
def _slice(t: Any) -> Any:
    return as_i32(maximum(minimum(fma(t, _WIDTH, _BELOW), np.float32(7.5)), np.float32(0.0)))


@helper
def _level(t: Any, low: Any, high: Any) -> Any:
    part = _slice(t)
    above1 = t > lookup8(load8(_MIDDLE1, 0), part)
    above2 = t > lookup8(load8(_MIDDLE2, 0), part)
    level = select(above1, lookup8(load8(_LEVEL1, 0), part), lookup8(load8(_LEVEL0, 0), part))
    return select(above2, lookup8(load8(_LEVEL2, 0), part), level)


@helper
def _code(t: Any) -> Any:
    part = _slice(t)
    above1 = t > lookup8(load8(_MIDDLE1, 0), part)
    above2 = t > lookup8(load8(_MIDDLE2, 0), part)
    return (
        lookup8(load8(_CODE, 0), part) + select(above1, 1, part * 0) + select(above2, 1, part * 0)
    )


_residual, _scan, _polish = scale_fitters(_level)
_error, _pick = scale_pickers(_level)
_search = scaled_searcher(_residual, _scan, _error)


@helper
def _put_codes(out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any) -> None:
    inv = reciprocal(d)
    for i in range(0, 16, 8):
        low = _code(load8(row, begin + i) * inv)
        high = _code(load8(row, begin + i + 16) * inv)
        store(out, at + i, low | (high << 4))


@kernel
def _encode_nl(
    x: np.ndarray,
    weights: np.ndarray,
    roots: np.ndarray,
    ks: np.ndarray,
    refits: int,
    out: np.ndarray,
) -> None:
    blocks = x.shape[1] // SIZE
    tile = np.empty(LANES * SIZE, np.float32)
    scratch = np.empty(LANES * SIZE, np.float32)
    rms = np.ones(LANES, np.float32)
    none = (splat8(np.float32(0.0)), splat8(np.float32(0.0)))
    for r in range(x.shape[0]):
        for first in range(0, blocks, LANES):
            count = min(LANES, blocks - first)
            transpose(x[r], first * SIZE, count, SIZE, tile, 0)
            up = normalise(tile, SIZE)
            w = weights[first * SIZE : (first + LANES) * SIZE]
            if roots.size:
                for b in range(count):
                    rms[b] = roots[r, first + b]
                ggml_weights(tile, w, SIZE, load8(rms, 0) / up, scratch)
                w = scratch
            scale = _scan(tile, w, SIZE, none, ks)
            d = up * _polish(tile, w, SIZE, none, scale, up, refits)
            for b in range(count):
                at = (first + b) * 18
                put_f16(out[r], at, lane(d, b))
                _put_codes(out[r], at + 2, x[r], (first + b) * SIZE, lane(d, b))


@kernel
def _encode_xs(
    x: np.ndarray, weights: np.ndarray, roots: np.ndarray, plan: Any, out: np.ndarray
) -> None:
    supers = x.shape[1] // SUPER
    tile = np.empty(SUPER, np.float32)
    scratch = np.empty(SUPER, np.float32)
    found = np.zeros(LANES, np.float32)
    none = (splat8(np.float32(0.0)), splat8(np.float32(0.0)))
    form = (none, np.float32(-32.0), np.float32(31.0))
    for r in range(x.shape[0]):
        for b in range(supers):
            begin, at = b * SUPER, b * 136
            up = load_super(x[r], begin, SIZE, tile)
            w = weights[begin : begin + SUPER]
            if roots.size:
                ggml_weights(tile, w, SIZE, roots[r, b] / up, scratch)
                w = scratch
            d = lane(up * _search(tile, w, SIZE, up, form, plan, found), 0)
            put_f16(out[r], at, d)
            high = np.int32(0)
            for k in range(8):
                high |= (np.int32(found[k]) + 32) >> 4 << (2 * k)
                _put_codes(out[r], at + 8 + 16 * k, x[r], begin + SIZE * k, d * found[k])
            out[r, at + 2] = high & 255
            out[r, at + 3] = high >> 8
            for k in range(4):
                s0, s1 = np.int32(found[2 * k]) + 32, np.int32(found[2 * k + 1]) + 32
                out[r, at + 4 + k] = (s0 & 15) | (s1 & 15) << 4


def _both_signs(low: float, high: float, n: int) -> np.ndarray:
    ks = np.linspace(low, high, n).astype(np.float32)
    return np.concatenate([ks, -ks])


_SCANS: dict[Effort, tuple[np.ndarray, int]] = {
    "fast": (_both_signs(95, 165, 8), 2),
    "default": (_both_signs(90, 180, 24), 3),
    "best": (_both_signs(80, 200, 80), 3),
}


def _plan(n: int, starts: list[float], radius: int, rounds: int) -> Any:
    moves = np.arange(-radius, radius + 1, dtype=np.float32)
    return _both_signs(90, 180, n), np.array(starts, np.float32), moves, rounds


_PLANS: dict[Effort, Any] = {
    "fast": _plan(8, [-1], 1, 1),
    "default": _plan(16, [-1, 1], 1, 2),
    "best": _plan(32, [-1, 1, -1.05, 1.05], 3, 3),
}


def _roots(x: Tile, how: How, span: int) -> np.ndarray:
    return root_mean_squares(x, span, 2.0) if how.weighting == "ggml" else NO_ROOTS


def _encode_nl_blocks(x: Tile, importance: Importance | None, how: How) -> Blocks:
    x, out = prepared(x, GgmlType.IQ4_NL)
    w = weight_tiles(importance, x.shape[1], SIZE, SIZE)
    _encode_nl(x, w, _roots(x, how, SIZE), *_SCANS[how.effort], out)
    return out


def _encode_xs_blocks(x: Tile, importance: Importance | None, how: How) -> Blocks:
    x, out = prepared(x, GgmlType.IQ4_XS)
    w = weight_tiles(importance, x.shape[1], SIZE, SUPER)
    _encode_xs(x, w, _roots(x, how, SUPER), _PLANS[how.effort], out)
    return out


def _levels_of(nibbles: np.ndarray) -> np.ndarray:
    """u8[..., 16] -> f32[..., 32]."""
    return LEVELS[np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)]


def _decode_nl(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 18)
    return (read_f16(b, 0) * _levels_of(b[:, 2:])).reshape(len(blocks), -1)


def _decode_xs(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 136)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = np.concatenate([b[:, 2:3] >> k & 3 for k in (0, 2, 4, 6)], axis=1)
    high = np.concatenate([high, *(b[:, 3:4] >> k & 3 for k in (0, 2, 4, 6))], axis=1)
    scale = read_f16(b, 0) * ((low | high << 4).astype(np.float32) - 32)
    levels = _levels_of(b[:, 8:].reshape(-1, 8, 16))
    return (scale[:, :, None] * levels).reshape(len(blocks), -1)


CODECS = (
    Codec(GgmlType.IQ4_NL, _encode_nl_blocks, _decode_nl),
    Codec(GgmlType.IQ4_XS, _encode_xs_blocks, _decode_xs),
)
