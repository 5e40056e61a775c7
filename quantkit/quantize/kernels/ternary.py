"""TQ1_0, TQ2_0, Q1_0 and Q2_0: one to two bits a weight under one f16 scale.

TQ1_0 `qs[48] qh[4] d` per 256, x = d (t - 1), five base-3 digits t in a byte: elements m + 32 n in
byte m < 32, 160 + m + 16 n in byte 32 + m, and 240 + m + 4 n (four digits) in qh[m].
TQ2_0 `qs[64] d` per 256, x = d (code - 1), element 128 h + m + 32 n at bits 2 n of byte 32 h + m.
Q2_0 `d qs[16]` per 64, x = d (code - 1), four consecutive elements a byte.
Q1_0 `d qs[16]` per 128, x = +d where the bit is set, else -d.
Two bits hold four codes, so TQ2_0 and Q2_0 have the levels -1, 0, 1 and 2 (times d of either sign).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.kernels._common import helper, kernel, prepared, read_f16
from quantkit.quantize.kernels._simd import (
    absolute,
    bits_of,
    float_of,
    fma,
    lane,
    largest,
    load8,
    mask_bits,
    maximum,
    minimum,
    rint,
    splat8,
    store,
    total,
)
from quantkit.quantize.kernels._tile import (
    HUGE,
    LANES,
    TINY,
    codes,
    inverse,
    near_f16,
    normalise,
    put_f16,
    reciprocal,
    scale_fitters,
    transpose,
    weight_tiles,
    weighty_peak,
)
from quantkit.types import GgmlType

# Bit i of a byte moved to bit 2 i.
_SPREAD = np.array([int(f"{i:b}", 4) for i in range(256)], np.int32)


@helper
def _nearest(t: Any, low: Any, high: Any) -> Any:
    return maximum(minimum(rint(t), high), low)


_residual, _scan, _polish = scale_fitters(_nearest)


@helper
def _load(row: np.ndarray, importance: np.ndarray, begin: int, x: np.ndarray, w: np.ndarray) -> Any:
    """A block and its weights, the block scaled to a peak in [1, 4), the weights to at most 1."""
    peak = splat8(np.float32(0.0))
    most = peak
    for i in range(0, x.size, 8):
        peak = maximum(peak, absolute(load8(row, begin + i)))
        most = maximum(most, load8(importance, begin + i))
    exponent = minimum(maximum(bits_of(splat8(largest(peak))) >> 23, 67), 253)
    down = float_of((254 - exponent) << 23)
    heaviest = largest(most)
    for i in range(0, x.size, 8):
        store(x, i, load8(row, begin + i) * down)
        weight = load8(importance, begin + i) / heaviest
        store(w, i, weight if heaviest > 0.0 else splat8(np.float32(1.0)))
    peak = largest(weighty_peak(x, w, x.size // 8))
    return splat8(peak), float_of(exponent << 23)


@helper
def _sums(x: np.ndarray, w: np.ndarray) -> Any:
    """sum w |x| and sum w, in every lane."""
    wx = splat8(np.float32(0.0))
    w1 = wx
    for i in range(0, x.size, 8):
        v = load8(w, i)
        wx = fma(v, absolute(load8(x, i)), wx)
        w1 = w1 + v
    return splat8(total(wx)), splat8(total(w1))


@helper
def _fit(x: np.ndarray, w: np.ndarray, bounds: Any, extent: Any, search: Any) -> Any:
    """The best f16 scale: multiples of the peak and of the mean magnitude, refitted, polished."""
    of_peak, of_mean, refits = search
    peak, up = extent
    wx, w1 = _sums(x, w)
    mean = wx / w1
    best = np.float32(HUGE)
    scale = mean
    for j in range(of_peak.size + of_mean.size):
        inside = j < of_peak.size
        d = peak * of_peak[j] if inside else mean * of_mean[j - of_peak.size]
        rr, rq, qq = _residual(x, w, x.size // 8, bounds, d, inverse(d))
        p, q = total(rq), max(total(qq), TINY)
        after = total(rr) - p * p / q
        if after < best:
            best = after
            scale = d + p / q
    best = np.float32(HUGE)
    chosen = scale
    for _ in range(refits):
        d = near_f16(scale, up)
        rr, rq, qq = _residual(x, w, x.size // 8, bounds, d, inverse(d))
        error = total(rr)
        if error < best:
            best = error
            chosen = d
        scale = d + total(rq) / max(total(qq), TINY)
    return lane(chosen * up, 0)


@helper
def _digits(row: np.ndarray, begin: int, step: int, inv: Any) -> Any:
    """Five base-3 digits per lane as a byte: the fraction of 256 that decoding multiplies up."""
    one, two = np.float32(1.0), np.float32(2.0)
    value = codes(load8(row, begin), np.float32(0.0), inv, one, two)
    for n in range(1, 5):
        digit = codes(load8(row, begin + n * step), np.float32(0.0), inv, one, two)
        value = value * 3 + digit
    return (value * 256 + 242) / 243


@helper
def _put_tq1(out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any) -> None:
    inv = reciprocal(d)
    for m in range(0, 32, 8):
        store(out, at + m, _digits(row, begin + m, 32, inv))
    for m in range(0, 16, 8):
        store(out, at + 32 + m, _digits(row, begin + 160 + m, 16, inv))
    for m in range(4):
        value = np.int32(0)
        for n in range(4):
            t = np.rint(row[begin + 240 + m + 4 * n] * inv)
            value = value * 3 + np.int32(max(min(t, 1.0), -1.0)) + 1
        out[at + 48 + m] = (value * 3 * 256 + 242) // 243
    put_f16(out, at + 52, d)


@helper
def _put_tq2(out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any) -> None:
    inv = reciprocal(d)
    one, three = np.float32(1.0), np.float32(3.0)
    for m in range(0, 64, 8):
        e = begin + 128 * (m // 32) + m % 32
        packed = codes(load8(row, e), np.float32(0.0), inv, one, three)
        for n in range(1, 4):
            q = codes(load8(row, e + 32 * n), np.float32(0.0), inv, one, three)
            packed = packed | (q << (2 * n))
        store(out, at + m, packed)
    put_f16(out, at + 64, d)


@helper
def _put_q2(out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any) -> None:
    inv = reciprocal(d)
    one, three = np.float32(1.0), np.float32(3.0)
    put_f16(out, at, d)
    for i in range(8):
        q = codes(load8(row, begin + 8 * i), np.float32(0.0), inv, one, three)
        pair = _SPREAD[mask_bits((q & 1) > 0)] | _SPREAD[mask_bits(q > 1)] << 1
        out[at + 2 + 2 * i] = pair & 255
        out[at + 3 + 2 * i] = pair >> 8


@kernel
def _encode_levels(
    x: np.ndarray, importance: np.ndarray, high: Any, search: Any, out: np.ndarray
) -> None:
    """TQ1_0 and TQ2_0: levels -1..high."""
    size = 256
    blocks = x.shape[1] // size
    block_bytes = out.shape[1] // blocks
    block = np.empty(size, np.float32)
    w = np.empty(size, np.float32)
    bounds = (splat8(np.float32(-1.0)), splat8(high))
    for r in range(x.shape[0]):
        for b in range(blocks):
            begin, at = b * size, b * block_bytes
            extent = _load(x[r], importance, begin, block, w)
            d = _fit(block, w, bounds, extent, search)
            if high > 1.0:
                _put_tq2(out[r], at, x[r], begin, d)
            else:
                _put_tq1(out[r], at, x[r], begin, d)


@kernel
def _encode_two_bits(
    x: np.ndarray, weights: np.ndarray, ks: np.ndarray, refits: int, out: np.ndarray
) -> None:
    """Q2_0, eight blocks side by side."""
    size = 64
    blocks = x.shape[1] // size
    tile = np.empty(LANES * size, np.float32)
    bounds = (splat8(np.float32(-1.0)), splat8(np.float32(2.0)))
    for r in range(x.shape[0]):
        for first in range(0, blocks, LANES):
            count = min(LANES, blocks - first)
            transpose(x[r], first * size, count, size, tile, 0)
            up = normalise(tile, size)
            w = weights[first * size : (first + LANES) * size]
            scale = _scan(tile, w, size, bounds, ks)
            d = up * _polish(tile, w, size, bounds, scale, up, refits)
            for b in range(count):
                _put_q2(out[r], (first + b) * 18, x[r], (first + b) * size, lane(d, b))


@kernel
def _encode_signs(x: np.ndarray, importance: np.ndarray, out: np.ndarray) -> None:
    """Q1_0: the best scale under signs is the weighted mean magnitude."""
    block = np.empty(128, np.float32)
    w = np.empty(128, np.float32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 128):
            begin, at = b * 128, b * 18
            _, up = _load(x[r], importance, begin, block, w)
            wx, w1 = _sums(block, w)
            put_f16(out[r], at, lane(near_f16(wx / w1, up) * up, 0))
            for i in range(16):
                out[r, at + 2 + i] = mask_bits(load8(block, 8 * i) >= 0.0)


def _f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# Multiples of the peak and of the mean magnitude to try as d, and rounds of polish. Weights that
# lie on the levels already are met by the peak, or by half of it where the top level is 2.
_TERNARY: dict[Effort, Any] = {
    "fast": (_f32(1), _f32(1.2, 1.6, 2.1), 1),
    "default": (_f32(1), _f32(1, 1.3, 1.6, 1.9, 2.3), 2),
    "best": (_f32(1), np.linspace(0.5, 4, 40).astype(np.float32), 3),
}
_TWO_BITS: dict[Effort, Any] = {
    "fast": (_f32(0.5, -0.5, 1), _f32(1.25, -1.25), 1),
    "default": (_f32(0.5, -0.5, 1), _f32(1.1, 1.45, -1.1, -1.45), 1),
    "best": (_f32(0.5, -0.5, 1), np.r_[0.5:3:30j, -0.5:-3:30j].astype(np.float32), 3),
}
# Steps from zero to the peak and rounds of polish, likewise.
_STEPS: dict[Effort, tuple[np.ndarray, int]] = {
    "fast": (_f32(1, 2, -2, 2.7, -2.7), 0),
    "default": (_f32(1, 1.6, 2, 2.5, 3.1, 4, 5.5, -1.6, -2, -2.5, -3.1, -4, -5.5), 1),
    "best": (np.r_[1, 1.3:8:40j, -1.3:-8:40j, 2, -2].astype(np.float32), 3),
}


def _columns(importance: Importance | None, x: Tile) -> Importance:
    w = np.ones(x.shape[1]) if importance is None else importance
    return np.ascontiguousarray(w, np.float32)


def _encode_tq(
    type_: GgmlType, high: int, searches: dict[Effort, Any]
) -> Callable[[Tile, Importance | None, How], Blocks]:
    def encode(x: Tile, importance: Importance | None, how: How) -> Blocks:
        x, out = prepared(x, type_)
        q = _columns(importance, x)
        _encode_levels(x, q, np.float32(high), searches[how.effort], out)
        return out

    return encode


def _encode_q2(x: Tile, importance: Importance | None, how: How) -> Blocks:
    x, out = prepared(x, GgmlType.Q2_0)
    w = weight_tiles(importance, x.shape[1], 64, 64)
    _encode_two_bits(x, w, *_STEPS[how.effort], out)
    return out


def _encode_q1(x: Tile, importance: Importance | None, how: How) -> Blocks:
    x, out = prepared(x, GgmlType.Q1_0)
    _encode_signs(x, _columns(importance, x), out)
    return out


def _trits(b: np.ndarray, n: int) -> np.ndarray:
    """The first n digits of every byte, u8[..., bytes] -> u8[..., n * bytes], digit by digit."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:n, None]
    rest = (b[:, None, :] * powers).astype(np.uint16)
    return (rest * 3 >> 8).reshape(len(b), -1)


def _decode_tq1(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 54)
    t = np.concatenate(
        [_trits(b[:, :32], 5), _trits(b[:, 32:48], 5), _trits(b[:, 48:52], 4)], axis=1
    )
    return ((t.astype(np.float32) - 1) * read_f16(b, 52)).reshape(len(blocks), -1)


def _decode_tq2(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 66)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    q = (b[:, :64].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)
    return ((q.astype(np.float32) - 1) * read_f16(b, 64)).reshape(len(blocks), -1)


def _decode_q2(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 18)
    q = (b[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1, 64)
    return ((q.astype(np.float32) - 1) * read_f16(b, 0)).reshape(len(blocks), -1)


def _decode_q1(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 18)
    plus = np.unpackbits(b[:, 2:], axis=1, bitorder="little").astype(bool)
    d = read_f16(b, 0)
    return np.where(plus, d, -d).reshape(len(blocks), -1)


CODECS = (
    Codec(GgmlType.TQ1_0, _encode_tq(GgmlType.TQ1_0, 1, _TERNARY), _decode_tq1),
    Codec(GgmlType.TQ2_0, _encode_tq(GgmlType.TQ2_0, 2, _TWO_BITS), _decode_tq2),
    Codec(GgmlType.Q2_0, _encode_q2, _decode_q2),
    Codec(GgmlType.Q1_0, _encode_q1, _decode_q1),
)
