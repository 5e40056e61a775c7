"""Tiles of 8 blocks side by side, and the least-squares passes over them.

A tile holds 8 blocks of a row transposed: element i of block b lies at `8 * i + b`, so that one
vector holds the same element of all blocks. Each block of a tile is scaled by a power of two to
magnitudes around 1, which no sum of squares can overflow and which rounds nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.kernels._common import f16_bits, helper
from quantkit.quantize.kernels._simd import (
    absolute,
    as_i32,
    bits_of,
    f16_near,
    float_of,
    fma,
    load8,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    sqrt,
    store,
    transpose8,
)

LANES = 8
F16_MAX = np.float32(65504.0)
TINY = np.float32(1e-30)
HUGE = np.float32(3e38)


@helper
def transpose(
    row: np.ndarray, begin: int, blocks: int, size: int, tile: np.ndarray, at: int
) -> None:
    """Blocks of `size` from `row[begin:]` into the lanes of `tile[at:]`; zeros beside the last."""
    if blocks == LANES:
        for i in range(0, size, LANES):
            transpose8(row, begin + i, size, tile, at + LANES * i)
        return
    for b in range(LANES):
        for i in range(size):
            tile[at + LANES * i + b] = row[begin + b * size + i] if b < blocks else 0.0


def weight_tiles(importance: np.ndarray | None, cols: int, size: int, span: int) -> np.ndarray:
    """The importance of a row's columns in tiles of blocks of `size`, zeros beside the last block.

    Every `span` weights that share a scale are brought to a maximum of 1; those without any
    importance get uniform weights, for they must be encoded all the same.
    """
    w = np.ones(cols, np.float32) if importance is None else importance
    spans = w.reshape(-1, span)
    peaks = spans.max(axis=1, keepdims=True)
    spans = np.where(peaks > 0, spans / np.where(peaks > 0, peaks, np.float32(1)), np.float32(1))
    blocks = cols // size
    tiles = np.zeros((-(-blocks // LANES), LANES, size), np.float32)
    tiles.reshape(-1, size)[:blocks] = spans.reshape(-1, size)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1)).reshape(-1)


def root_mean_squares(x: np.ndarray, span: int, c: float) -> np.ndarray:
    """sqrt(c mean(x^2)) of every `span` columns, f32[rows, spans]: see `ggml_weights`."""
    mean = np.square(x.reshape(len(x), -1, span), dtype=np.float64).mean(axis=2)
    return np.minimum(np.sqrt(c * mean), HUGE).astype(np.float32)


NO_ROOTS = np.zeros((0, 0), np.float32)  # weights are the importance alone


@helper
def normalise(x: np.ndarray, size: int) -> Any:
    """Scale each block of a tile to a peak in [1, 4); gives the powers of two.

    Blocks below 2^-60 count as zero: their scale would be far below the smallest f16.
    """
    peak = splat8(np.float32(0.0))
    for i in range(size):
        peak = maximum(peak, absolute(load8(x, LANES * i)))
    exponent = minimum(maximum(bits_of(peak) >> 23, 67), 253)
    up = float_of(exponent << 23)
    down = float_of((254 - exponent) << 23)
    for i in range(size):
        store(x, LANES * i, load8(x, LANES * i) * down)
    return up


@helper
def weighty_peak(x: np.ndarray, w: np.ndarray, size: int) -> Any:
    """The largest magnitude of each block among weights that count, or of all if none does."""
    peak = splat8(np.float32(0.0))
    dead = peak
    for i in range(size):
        v = absolute(load8(x, LANES * i))
        counts = load8(w, LANES * i) > 0.0
        peak = maximum(peak, select(counts, v, 0.0 * v))
        dead = maximum(dead, v)
    return maximum(select(peak > 0.0, peak, dead), TINY)


@helper
def ggml_weights(x: np.ndarray, importance: np.ndarray, size: int, rms: Any, w: np.ndarray) -> None:
    """llama.cpp's weights q sqrt(c mean(x^2) + x^2) of a normalised tile into `w`.

    `rms` is sqrt(c mean(x^2)) over the span that the type prescribes, in the tile's units.
    """
    floor = minimum(rms, np.float32(1e15))
    floor = floor * floor
    for i in range(size):
        v = load8(x, LANES * i)
        store(w, LANES * i, load8(importance, LANES * i) * sqrt(fma(v, v, floor)))


@helper
def near_f16(d: Any, up: Any) -> Any:
    """The f16 nearest to `d * up`, divided by `up` again: scales as they will be stored."""
    stored = f16_near(maximum(minimum(d * up, F16_MAX), -F16_MAX))
    return stored / up


@helper
def inverse(d: Any) -> Any:
    """1 / d, and 0 for 0."""
    return select(d == 0.0, splat8(np.float32(0.0)), np.float32(1.0) / d)


def scale_fitters(level: Any) -> Any:
    """(residual, scan, polish): least-squares fits of one scale to each block of a tile.

    `level(t, low, high)` gives the level nearest to `t` in every lane; a type whose levels are
    not the integers low..high ignores the bounds.
    """

    @helper
    def residual(x: np.ndarray, w: np.ndarray, size: int, bounds: Any, d: Any, inv: Any) -> Any:
        # sum w r^2, sum w r q, sum w q^2 for q = level(x * inv) and r = x - d q
        low, high = bounds
        rr = splat8(np.float32(0.0))
        rq = rr
        qq = rr
        minus = -1.0 * d
        for i in range(size):
            v = load8(x, LANES * i)
            q = level(v * inv, low, high)
            r = fma(q, minus, v)
            wq = load8(w, LANES * i) * q
            rr = fma(load8(w, LANES * i) * r, r, rr)
            rq = fma(wq, r, rq)
            qq = fma(wq, q, qq)
        return rr, rq, qq

    @helper
    def scan(x: np.ndarray, w: np.ndarray, size: int, bounds: Any, ks: np.ndarray) -> Any:
        """The best scale d for x ~ d * level: each d = peak / k, refitted by least squares."""
        peak = weighty_peak(x, w, size)
        best = splat8(HUGE)
        scale = splat8(np.float32(0.0))
        for k in ks:
            d = peak * (np.float32(1.0) / k)
            rr, rq, qq = residual(x, w, size, bounds, d, k / peak)
            step = rq / maximum(qq, TINY)
            after = rr - rq * step
            # Of scales that fit a lattice but for rounding, the first is kept.
            better = after < best - d * d * qq * np.float32(1e-7)
            best = select(better, after, best)
            scale = select(better, d + step, scale)
        return scale

    @helper
    def polish(
        x: np.ndarray, w: np.ndarray, size: int, bounds: Any, scale: Any, up: Any, refits: int
    ) -> Any:
        """Round a scale to f16; then recode and refit `refits` times and keep the best f16."""
        best = splat8(HUGE)
        chosen = near_f16(scale, up)
        for _ in range(refits):
            d = near_f16(scale, up)
            rr, rq, qq = residual(x, w, size, bounds, d, inverse(d))
            better = rr < best
            best = select(better, rr, best)
            chosen = select(better, d, chosen)
            scale = d + rq / maximum(qq, TINY)
        return chosen

    return residual, scan, polish


def scale_pickers(level: Any) -> Any:
    """(error, pick): judging given scales of each block of a tile; `level` as above."""

    @helper
    def error(x: np.ndarray, w: np.ndarray, size: int, bounds: Any, d: Any) -> Any:
        # sum w r^2 alone
        low, high = bounds
        rr = splat8(np.float32(0.0))
        minus = -1.0 * d
        inv = inverse(d)
        for i in range(size):
            v = load8(x, LANES * i)
            r = fma(level(v * inv, low, high), minus, v)
            rr = fma(load8(w, LANES * i) * r, r, rr)
        return rr

    @helper
    def pick(x: np.ndarray, w: np.ndarray, size: int, bounds: Any, up: Any, ks: np.ndarray) -> Any:
        """The best of the f16 nearest to peak / k: no refit, for codes finer than f16 rounds."""
        peak = weighty_peak(x, w, size)
        best = splat8(HUGE)
        chosen = splat8(np.float32(0.0))
        for k in ks:
            d = near_f16(peak * (np.float32(1.0) / k), up)
            rr = error(x, w, size, bounds, d)
            better = rr < best
            best = select(better, rr, best)
            chosen = select(better, d, chosen)
        return chosen

    return error, pick


@helper
def residual_affine(
    x: np.ndarray, w: np.ndarray, size: int, top: Any, d: Any, m: Any, inv: Any
) -> Any:
    """Sums over q = clamp((x - m) * inv, 0, top) and r = x - m - d q, weighted by w.

    r^2, r, r q, q, q^2: what a least-squares step in (d, m) needs.
    """
    rr = splat8(np.float32(0.0))
    r1 = rr
    rq = rr
    q1 = rr
    qq = rr
    minus = -1.0 * d
    for i in range(size):
        v = load8(x, LANES * i) - m
        q = maximum(minimum(rint(v * inv), top), np.float32(0.0))
        r = fma(q, minus, v)
        u = load8(w, LANES * i)
        wr = u * r
        wq = u * q
        rr = fma(wr, r, rr)
        r1 = r1 + wr
        rq = fma(wr, q, rq)
        q1 = q1 + wq
        qq = fma(wq, q, qq)
    return rr, r1, rq, q1, qq


@helper
def affine_step(sums: Any, w1: Any, m: Any, bounded: bool) -> Any:
    """Least-squares step (a, b) to (d + a, m + b) for fixed codes, and the error after it.

    `bounded` keeps m + b <= 0.
    """
    rr, r1, rq, q1, qq = sums
    qq = maximum(qq, TINY)
    det = qq * w1 - q1 * q1
    flat = det <= np.float32(1e-6) * qq * w1
    det = select(flat, splat8(np.float32(1.0)), det)
    b = select(flat, (r1 - rq * q1 / qq) * np.float32(0.0), (r1 * qq - rq * q1) / det)
    if bounded:
        b = minimum(b, -1.0 * m)
    a = (rq - b * q1) / qq
    error = rr - a * rq * 2.0 - b * r1 * 2.0 + a * a * qq + a * b * q1 * 2.0 + b * b * w1
    return a, b, error


@helper
def fit_affine(
    x: np.ndarray, w: np.ndarray, size: int, top: Any, tries: np.ndarray, bounded: bool
) -> Any:
    """The best (d, m) for x ~ d q + m with q in 0..top, before any rounding.

    Each row (k, a) of `tries` lays k steps over the range of the weights that count, of which a
    share a is cut off below where k exceeds `top`, and is followed by a least-squares step. Of
    tries that differ by no more than rounding, as on weights that lie on a lattice, the first wins.
    """
    low = splat8(HUGE)
    high = -1.0 * low
    dead_low, dead_high = low, high
    w1 = splat8(np.float32(0.0))
    for i in range(size):
        v = load8(x, LANES * i)
        u = load8(w, LANES * i)
        low = minimum(low, select(u > 0.0, v, low))
        high = maximum(high, select(u > 0.0, v, high))
        dead_low = minimum(dead_low, v)
        dead_high = maximum(dead_high, v)
        w1 = w1 + u
    low, high = select(w1 > 0.0, low, dead_low), select(w1 > 0.0, high, dead_high)
    if bounded:
        low = minimum(low, np.float32(0.0))
    span = maximum(high - low, TINY)
    margin = w1 * span * span * np.float32(1e-8)
    best = splat8(HUGE)
    scale = splat8(np.float32(0.0))
    base = low
    for j in range(tries.shape[0]):
        k = tries[j, 0]
        d = span * (np.float32(1.0) / k)
        m = low + (span - d * top) * tries[j, 1]
        if bounded:
            m = minimum(m, np.float32(0.0))
        sums = residual_affine(x, w, size, top, d, m, k / span)
        a, b, error = affine_step(sums, w1, m, bounded)
        better = error < best - margin
        best = select(better, error, best)
        scale = select(better, d + a, scale)
        base = select(better, m + b, base)
    return scale, base, w1


@helper
def polish_affine(
    x: np.ndarray, w: np.ndarray, size: int, top: Any, start: Any, up: Any, refits: int
) -> Any:
    """Round (d, m) to f16; then recode and refit `refits` times and keep the best pair."""
    scale, base, w1 = start
    best = splat8(HUGE)
    chosen_d = near_f16(scale, up)
    chosen_m = near_f16(base, up)
    for _ in range(refits):
        d = near_f16(scale, up)
        m = near_f16(base, up)
        sums = residual_affine(x, w, size, top, d, m, inverse(d))
        better = sums[0] < best
        best = select(better, sums[0], best)
        chosen_d = select(better, d, chosen_d)
        chosen_m = select(better, m, chosen_m)
        a, b, _error = affine_step(sums, w1, m, False)
        scale = d + a
        base = m + b
    return chosen_d, chosen_m


@helper
def error_affine(x: np.ndarray, w: np.ndarray, size: int, top: Any, d: Any, m: Any) -> Any:
    """sum w r^2 of coding a tile as d q + m with the nearest q in 0..top."""
    rr = splat8(np.float32(0.0))
    minus = -1.0 * d
    inv = inverse(d)
    for i in range(size):
        v = load8(x, LANES * i) - m
        q = maximum(minimum(rint(v * inv), top), np.float32(0.0))
        r = fma(q, minus, v)
        rr = fma(load8(w, LANES * i) * r, r, rr)
    return rr


@helper
def codes(v: Any, m: Any, inv: Any, offset: Any, top: Any) -> Any:
    """clamp(rint((v - m) * inv) + offset, 0, top) as integers."""
    return as_i32(maximum(minimum(rint((v - m) * inv) + offset, top), np.float32(0.0)))


@helper
def put_f16(out: np.ndarray, at: int, value: Any) -> None:
    """Store an f16, little endian."""
    bits = f16_bits(value)
    out[at] = bits & 255
    out[at + 1] = bits >> 8


@helper
def reciprocal(d: Any) -> Any:
    """1 / d of a scalar, and 0 for 0."""
    return np.float32(0.0) if d == 0.0 else np.float32(1.0) / d
