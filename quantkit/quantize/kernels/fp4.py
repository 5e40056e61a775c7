"""MXFP4 and NVFP4: 4-bit floats (E2M1) under a scale that is itself a small float.

The levels are +-{0, 1, 2, 3, 4, 6, 8, 12}, twice the E2M1 values, in codes 0..7 and 8..15.
MXFP4 `e:u8 qs[16]` per 32 weights, x = level 2^(e - 128); byte j holds element j in its low and
j + 16 in its high nibble. NVFP4 `s:u8[4] qs[32]` per 64 weights, x = level ue4m3(s) / 2 for every
16 of them; byte 8 k + j holds elements j and j + 8 of group k.

There are so few scales that the best is found by trying all that can win.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.kernels._common import helper, kernel, prepared
from quantkit.quantize.kernels._simd import (
    absolute,
    as_f32,
    as_i32,
    bits_of,
    float_of,
    lane,
    load8,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    store,
)
from quantkit.quantize.kernels._tile import (
    HUGE,
    LANES,
    normalise,
    reciprocal,
    scale_pickers,
    transpose,
    weight_tiles,
    weighty_peak,
)
from quantkit.types import GgmlType


@helper
def _magnitude(t: Any) -> Any:
    # The levels are whole up to 4, then even, then multiples of 4; 12 is the last.
    a = minimum(absolute(t), np.float32(12.0))
    q = select(a > 8.0, rint(a * 0.25) * 4.0, rint(a * 0.5) * 2.0)
    return select(a < 4.0, rint(a), q)


@helper
def _level(t: Any, low: Any, high: Any) -> Any:
    q = _magnitude(t)
    return select(t < 0.0, -1.0 * q, q)


@helper
def _code(t: Any) -> Any:
    q = as_i32(_magnitude(t))
    code = select(q > 4, minimum((q + 4) >> 1, 7), q)
    return select(t < 0.0, code | select(q > 0, 8, q), code)


_error, _pick = scale_pickers(_level)


@helper
def _put_codes(out: np.ndarray, at: int, row: np.ndarray, begin: int, half: int, d: Any) -> None:
    inv = reciprocal(d)
    for i in range(0, half, 8):
        low = _code(load8(row, begin + i) * inv)
        high = _code(load8(row, begin + i + half) * inv)
        store(out, at + i, low | (high << 4))


@kernel
def _encode_mx(x: np.ndarray, weights: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> None:
    """`offsets` are exponents to try, counted from the one that puts the peak in [8, 16) levels."""
    size = 32
    blocks = x.shape[1] // size
    tile = np.empty(LANES * size, np.float32)
    none = (splat8(np.float32(0.0)), splat8(np.float32(0.0)))
    for r in range(x.shape[0]):
        for first in range(0, blocks, LANES):
            count = min(LANES, blocks - first)
            transpose(x[r], first * size, count, size, tile, 0)
            up = normalise(tile, size)
            w = weights[first * size : (first + LANES) * size]
            peak = weighty_peak(tile, w, size)
            down = (bits_of(up) >> 23) - 127
            middle = (bits_of(peak) >> 23) - (127 + 3)
            best = splat8(HUGE)
            chosen = middle
            for offset in offsets:
                # Within reach of normal numbers, and such that 12 of them are no infinity.
                exponent = minimum(maximum(middle + offset + down, -126), 124) - down
                d = float_of((exponent + 127) << 23)
                error = _error(tile, w, size, none, d)
                better = error < best
                best = select(better, error, best)
                chosen = select(better, exponent, chosen)
            exponent = chosen + down
            d = float_of((exponent + 127) << 23)
            for b in range(count):
                at = (first + b) * 17
                out[r, at] = lane(exponent, b) + 128
                _put_codes(out[r], at + 1, x[r], (first + b) * size, 16, lane(d, b))


@helper
def _ue4m3(code: Any) -> Any:
    """The value of codes 0..126: 4 bits of exponent with bias 7, 3 of mantissa."""
    return select(code < 8, as_f32(code) * np.float32(2**-9), float_of((code + (120 << 3)) << 20))


@helper
def _ue4m3_below(v: Any) -> Any:
    """The largest code whose value is not above `v`, for 0 <= v."""
    v = minimum(v, np.float32(448.0))
    return select(v < np.float32(2**-6), as_i32(v * np.float32(2**9)), (bits_of(v) >> 20) - 960)


@kernel
def _encode_nv(x: np.ndarray, weights: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> None:
    """`offsets` are scale codes to try, counted from the one that puts the peak at level 12."""
    size = 16
    blocks = x.shape[1] // size
    tile = np.empty(LANES * size, np.float32)
    none = (splat8(np.float32(0.0)), splat8(np.float32(0.0)))
    for r in range(x.shape[0]):
        for first in range(0, blocks, LANES):
            count = min(LANES, blocks - first)
            transpose(x[r], first * size, count, size, tile, 0)
            up = normalise(tile, size)
            w = weights[first * size : (first + LANES) * size]
            peak = weighty_peak(tile, w, size)
            middle = _ue4m3_below(peak * up * np.float32(1 / 6))
            best = splat8(HUGE)
            chosen = middle
            for offset in offsets:
                code = minimum(maximum(middle + offset, 0), 126)
                error = _error(tile, w, size, none, _ue4m3(code) * 0.5 / up)
                better = error < best
                best = select(better, error, best)
                chosen = select(better, code, chosen)
            d = _ue4m3(chosen) * 0.5
            for b in range(count):
                block, k = (first + b) // 4, (first + b) % 4
                out[r, block * 36 + k] = lane(chosen, b)
                at = block * 36 + 4 + 8 * k
                _put_codes(out[r], at, x[r], (first + b) * size, 8, lane(d, b))


_MX_OFFSETS: dict[Effort, np.ndarray] = {
    "fast": np.array([0, 1], np.int32),
    "default": np.array([0, 1, -1, -2], np.int32),
    "best": np.array([0, 1, -1, -2, -3], np.int32),
}
_NV_OFFSETS: dict[Effort, np.ndarray] = {
    "fast": np.array([0, 1, 2, 5], np.int32),
    "default": np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -2, -3], np.int32),
    "best": np.arange(-12, 16, dtype=np.int32),
}


def _encode_mx_blocks(x: Tile, importance: Importance | None, how: How) -> Blocks:
    x, out = prepared(x, GgmlType.MXFP4)
    _encode_mx(x, weight_tiles(importance, x.shape[1], 32, 32), _MX_OFFSETS[how.effort], out)
    return out


def _encode_nv_blocks(x: Tile, importance: Importance | None, how: How) -> Blocks:
    x, out = prepared(x, GgmlType.NVFP4)
    _encode_nv(x, weight_tiles(importance, x.shape[1], 16, 16), _NV_OFFSETS[how.effort], out)
    return out


_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_UE4M3 = np.array(
    [
        (c & 7) * 2.0**-9 if c & 0x78 == 0 else (8 + (c & 7)) * 2.0 ** ((c >> 3 & 15) - 10)
        for c in range(256)
    ],
    np.float32,
)
_UE4M3[0x7F] = 0  # the NaN of the format


def _decode_mx(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 17)
    scale = np.ldexp(np.float32(1.0), b[:, :1].astype(np.int32) - 128)
    levels = _LEVELS[np.concatenate([b[:, 1:] & 15, b[:, 1:] >> 4], axis=1)]
    return (levels * scale).reshape(len(blocks), -1)


def _decode_nv(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 36)
    scale = _UE4M3[b[:, :4]] * np.float32(0.5)
    codes = b[:, 4:].reshape(-1, 4, 8)
    levels = _LEVELS[np.concatenate([codes & 15, codes >> 4], axis=2)]
    return (levels * scale[:, :, None]).reshape(len(blocks), -1)


CODECS = (
    Codec(GgmlType.MXFP4, _encode_mx_blocks, _decode_mx),
    Codec(GgmlType.NVFP4, _encode_nv_blocks, _decode_nv),
)
