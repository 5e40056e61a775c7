"""Super-blocks of 256: sub-block scales are small integers times one or two f16.

A super-block is one tile of 8 sub-blocks of 32, or two tiles of 8 sub-blocks of 16, transposed as
in `_tile`. The search works on what is decoded: for a trial value of the f16 scales it scores
integer sub-scales with every code chosen anew, then refits the f16 scales to those codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.kernels._common import helper
from quantkit.quantize.kernels._simd import (
    absolute,
    bits_of,
    float_of,
    fma,
    largest,
    load8,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    store,
    total,
)
from quantkit.quantize.kernels._tile import (
    HUGE,
    LANES,
    TINY,
    error_affine,
    fit_affine,
    inverse,
    near_f16,
    residual_affine,
    transpose,
)

SUPER = 256


@helper
def load_super(row: np.ndarray, begin: int, size: int, x: np.ndarray) -> Any:
    """A super-block as tiles with a peak in [1, 4); gives the power of two that was divided out."""
    for at in range(0, SUPER, LANES * size):
        transpose(row, begin + at, LANES, size, x, at)
    peak = splat8(np.float32(0.0))
    for i in range(0, SUPER, LANES):
        peak = maximum(peak, absolute(load8(x, i)))
    exponent = minimum(maximum(bits_of(splat8(largest(peak))) >> 23, 67), 253)
    down = float_of((254 - exponent) << 23)
    for i in range(0, SUPER, LANES):
        store(x, i, load8(x, i) * down)
    return float_of(exponent << 23)


@helper
def face_down(x: np.ndarray, size: int) -> Any:
    """Negate a super-block that mostly lies above zero; gives the sign to put back on d and dmin.

    Affine codes rise from -dmin m <= 0, so a sub-block of large positive weights would waste most
    of them between zero and its smallest weight.
    """
    upright = splat8(np.float32(0.0))
    turned = upright
    for at in range(0, SUPER, LANES * size):
        low = load8(x, at)
        high = low
        for i in range(at + LANES, at + LANES * size, LANES):
            v = load8(x, i)
            low = minimum(low, v)
            high = maximum(high, v)
        span = high - minimum(low, np.float32(0.0))
        upright = fma(span, span, upright)
        span = maximum(high, np.float32(0.0)) - low
        turned = fma(span, span, turned)
    if total(turned) >= total(upright):
        return np.float32(1.0)
    for i in range(0, SUPER, LANES):
        store(x, i, -1.0 * load8(x, i))
    return np.float32(-1.0)


@helper
def _weigh(w: np.ndarray, size: int, w1: np.ndarray) -> None:
    """The sum of weights of every sub-block."""
    for at in range(0, w1.size, LANES):
        s = splat8(np.float32(0.0))
        for i in range(at * size, (at + LANES) * size, LANES):
            s = s + load8(w, i)
        store(w1, at, s)


@helper
def _extreme(ideal: np.ndarray, w1: np.ndarray) -> Any:
    """The value of largest magnitude among sub-blocks that count; there is one at least."""
    top = np.float32(0.0)
    for b in range(ideal.size):
        if w1[b] > 0.0 and abs(ideal[b]) > abs(top):
            top = ideal[b]
    return splat8(top)


@helper
def _first_f16(extreme: Any, limit: Any, up: Any) -> Any:
    """The f16 nearest to extreme / limit, but no zero as long as `extreme` itself is no zero.

    Weights around 1e-5 would be lost in types whose f16 is multiplied by sub-scale and code.
    """
    exact = extreme * (np.float32(1.0) / limit)
    d = near_f16(exact, up)
    least = np.float32(2.0**-24) / up
    lost = (d == 0.0) & (absolute(extreme) > least * 0.5)
    return select(lost, select(exact < 0.0, -1.0 * least, least), d)


@helper
def _clamped(v: Any, limit: Any) -> Any:
    return maximum(minimum(rint(v), limit), np.float32(0.0))


@helper
def search_affine(
    x: np.ndarray, w: np.ndarray, size: int, up: Any, form: Any, search: Any, found: np.ndarray
) -> Any:
    """Find d, dmin and the integers (s, m) of x ~ d s q - dmin m with q in 0..top.

    `form` is (top, limit), `search` is (tries, starts, moves, rounds). `found` f32[2, sub-blocks]
    receives s and m, both in 0..limit; d and dmin, f16 values in the units of the normalised
    tiles, are returned.

    tries: as in `fit_affine`, for the first guess of every sub-block.
    starts: (fd, fm) pairs; d = fd * (largest sub-scale) / limit, dmin alike.
    moves: (ds, dm) steps around the rounded sub-scales that are tried with all codes anew.
    rounds: how often d and dmin are refitted to the best codes.
    """
    top, limit = form
    tries, starts, moves, rounds = search
    subs = SUPER // size
    ideal = np.empty((2, subs), np.float32)
    w1 = np.empty(subs, np.float32)
    _weigh(w, size, w1)
    for at in range(0, subs, LANES):
        a, b = at * size, (at + LANES) * size
        scale, base, _ = fit_affine(x[a:b], w[a:b], size, top, tries, True)
        store(ideal[0], at, maximum(scale, np.float32(0.0)))
        store(ideal[1], at, maximum(-1.0 * base, np.float32(0.0)))
    now = np.empty((2, subs), np.float32)
    best = np.float32(HUGE)
    best_d = splat8(np.float32(0.0))
    best_dmin = best_d
    for j in range(starts.shape[0]):
        d = _first_f16(_extreme(ideal[0], w1) * starts[j, 0], limit, up)
        dmin = _first_f16(_extreme(ideal[1], w1) * starts[j, 1], limit, up)
        for at in range(0, subs, LANES):
            store(now[0], at, _clamped(load8(ideal[0], at) * inverse(d), limit))
            store(now[1], at, _clamped(load8(ideal[1], at) * inverse(dmin), limit))
        for _ in range(rounds):
            error, step_d, step_dmin = _round_affine(x, w, size, form, d, dmin, moves, now, w1)
            if error < best:
                best = error
                best_d = d
                best_dmin = dmin
                for at in range(0, subs, LANES):
                    store(found[0], at, load8(now[0], at))
                    store(found[1], at, load8(now[1], at))
            d = near_f16(d + step_d, up)
            dmin = near_f16(dmin + step_dmin, up)
    return best_d, best_dmin


@helper
def _round_affine(
    x: np.ndarray,
    w: np.ndarray,
    size: int,
    form: Any,
    d: Any,
    dmin: Any,
    moves: np.ndarray,
    now: np.ndarray,
    w1: np.ndarray,
) -> Any:
    """Improve (s, m) of all sub-blocks for fixed d and dmin; the error and the refit of both."""
    top, limit = form
    # Normal equations of the step in (d, -dmin): regressors s q and m, target r.
    aa = splat8(np.float32(0.0))
    ab = aa
    bb = aa
    ar = aa
    br = aa
    rr = aa
    for at in range(0, SUPER // size, LANES):
        tile, weight = x[at * size : (at + LANES) * size], w[at * size : (at + LANES) * size]
        s0, m0 = load8(now[0], at), load8(now[1], at)
        s, m = s0, m0
        if moves.shape[0] > 1:
            least = splat8(HUGE)
            for j in range(moves.shape[0]):
                s1 = maximum(minimum(s0 + moves[j, 0], limit), np.float32(0.0))
                m1 = maximum(minimum(m0 + moves[j, 1], limit), np.float32(0.0))
                error = error_affine(tile, weight, size, top, d * s1, -1.0 * (dmin * m1))
                better = error < least
                least = select(better, error, least)
                s = select(better, s1, s)
                m = select(better, m1, m)
            store(now[0], at, s)
            store(now[1], at, m)
        scale = d * s
        sums = residual_affine(tile, weight, size, top, scale, -1.0 * (dmin * m), inverse(scale))
        rr = rr + sums[0]
        ar = fma(s, sums[2], ar)
        br = fma(m, sums[1], br)
        aa = fma(s * s, sums[4], aa)
        ab = fma(s * m, sums[3], ab)
        bb = fma(m * m, load8(w1, at), bb)
    a2, b2 = maximum(splat8(total(aa)), TINY), splat8(total(bb))
    c = splat8(total(ab))
    p, q = splat8(total(ar)), splat8(total(br))
    det = a2 * b2 - c * c
    flat = det <= np.float32(1e-6) * a2 * b2
    det = select(flat, splat8(np.float32(1.0)), det)
    step_m = select(flat, splat8(np.float32(0.0)), (q * a2 - p * c) / det)
    step_d = (p - step_m * c) / a2
    return total(rr), step_d, -1.0 * step_m


def scaled_searcher(residual: Any, scan: Any, error_of: Any) -> Any:
    """A function that finds d and integer sub-scales s of x ~ d s level."""

    @helper
    def improve(
        x: np.ndarray,
        w: np.ndarray,
        size: int,
        form: Any,
        d: Any,
        moves: np.ndarray,
        now: np.ndarray,
    ) -> Any:
        # Better s of all sub-blocks for a fixed d; the error and the least-squares step of d.
        levels, least_s, most_s = form
        rr = splat8(np.float32(0.0))
        sr = rr
        ss = rr
        for at in range(0, SUPER // size, LANES):
            a, b = at * size, (at + LANES) * size
            middle = load8(now, at)
            s = middle
            if moves.size > 1:
                least = splat8(HUGE)
                for move in moves:
                    trial = maximum(minimum(middle + move, most_s), least_s)
                    error = error_of(x[a:b], w[a:b], size, levels, d * trial)
                    better = error < least
                    least = select(better, error, least)
                    s = select(better, trial, s)
                store(now, at, s)
            scale = d * s
            sums = residual(x[a:b], w[a:b], size, levels, scale, inverse(scale))
            rr = rr + sums[0]
            sr = fma(s, sums[1], sr)
            ss = fma(s * s, sums[2], ss)
        return total(rr), splat8(total(sr)) / maximum(splat8(total(ss)), TINY)

    @helper
    def search(
        x: np.ndarray,
        w: np.ndarray,
        size: int,
        up: Any,
        form: Any,
        plan: Any,
        found: np.ndarray,
    ) -> Any:
        """The f16 d in the units of the normalised tiles; `found` receives s.

        `form` is (levels, least s, most s), `plan` is (ks, starts, moves, rounds): see `scan` and
        `search_affine`. A start f puts the largest sub-scale at 1 / f of the range, a negative one
        at the other end of it.
        """
        levels, least_s, most_s = form
        ks, starts, moves, rounds = plan
        subs = SUPER // size
        ideal = np.empty(subs, np.float32)
        now = np.empty(subs, np.float32)
        w1 = np.empty(subs, np.float32)
        for at in range(0, subs, LANES):
            a, b = at * size, (at + LANES) * size
            store(ideal, at, scan(x[a:b], w[a:b], size, levels, ks))
        _weigh(w, size, w1)
        extreme = _extreme(ideal, w1)
        best = np.float32(HUGE)
        best_d = splat8(np.float32(0.0))
        for start in starts:
            end = most_s if start > 0.0 else least_s
            d = _first_f16(extreme * abs(start), end, up)
            for at in range(0, subs, LANES):
                s = rint(load8(ideal, at) * inverse(d))
                store(now, at, maximum(minimum(s, most_s), least_s))
            for _ in range(rounds):
                error, step = improve(x, w, size, form, d, moves, now)
                if error < best:
                    best = error
                    best_d = d
                    for at in range(0, subs, LANES):
                        store(found, at, load8(now, at))
                d = near_f16(d + step, up)
        return best_d

    return search
