"""Least-squares fits of one scale, or of scale and base, to every block.

Tensors are laid out as `_ops` says: `x` f32[size, ...] normalised, results f32[...]. Each function
does what its namesake among the numba kernels (`kernels._tile`) does, candidate by candidate.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from quantkit.quantize.torch._ops import (
    HUGE,
    TINY,
    Level,
    Tensor,
    inverse,
    near_f16,
    over,
    reciprocal,
    total,
    weighty_peak,
)

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def residual(x: Tensor, w: Tensor, d: Tensor, inv: Tensor, level: Level) -> tuple[Tensor, ...]:
    """sum w r^2, sum w r q, sum w q^2 with q = level(x * inv) and r = x - d q."""
    q = level(x * inv)
    r = x - d * q
    wq = w * q
    return total((w * r).mul_(r)), total(wq * r), total(wq.mul_(q))


def error(x: Tensor, w: Tensor, d: Tensor, level: Level) -> Tensor:
    """sum w r^2 alone."""
    r = x - level(x * inverse(d)).mul_(d)
    return total((w * r).mul_(r))


def scan(x: Tensor, w: Tensor, level: Level, ks: npt.NDArray[Any]) -> Tensor:
    """The best scale d for x ~ d * level: each d = peak / k, refitted by least squares."""
    peak = weighty_peak(x, w)
    best = torch.full_like(peak, HUGE)
    scale = torch.zeros_like(peak)
    for k in ks:
        d = peak * reciprocal(k)
        rr, rq, qq = residual(x, w, d, over(float(k), peak), level)
        step = rq / qq.clamp_min(TINY)
        after = rr - rq * step
        # Of scales that fit a lattice but for rounding, the first is kept.
        better = after < best - d * d * qq * 1e-7
        best = torch.where(better, after, best)
        scale = torch.where(better, d + step, scale)
    return scale


def polish(x: Tensor, w: Tensor, level: Level, scale: Tensor, up: Tensor, refits: int) -> Tensor:
    """Round a scale to f16; then recode and refit `refits` times and keep the best f16."""
    best = torch.full_like(scale, HUGE)
    chosen = near_f16(scale, up)
    for _ in range(refits):
        d = near_f16(scale, up)
        rr, rq, qq = residual(x, w, d, inverse(d), level)
        better = rr < best
        best = torch.where(better, rr, best)
        chosen = torch.where(better, d, chosen)
        scale = d + rq / qq.clamp_min(TINY)
    return chosen


def pick(x: Tensor, w: Tensor, level: Level, up: Tensor, ks: npt.NDArray[Any]) -> Tensor:
    """The best of the f16 nearest to peak / k: no refit, for codes finer than f16 rounds."""
    peak = weighty_peak(x, w)
    best = torch.full_like(peak, HUGE)
    chosen = torch.zeros_like(peak)
    for k in ks:
        d = near_f16(peak * reciprocal(k), up)
        rr = error(x, w, d, level)
        better = rr < best
        best = torch.where(better, rr, best)
        chosen = torch.where(better, d, chosen)
    return chosen


def residual_affine(x: Tensor, w: Tensor, top: float, d: Tensor, m: Tensor, inv: Tensor) -> Sums:
    """Weighted sums of r^2, r, r q, q, q^2 with r = x - m - d q.

    The codes are q = clamp((x - m) * inv, 0, top).
    """
    v = x - m
    q = (v * inv).round_().clamp_(0, top)
    r = v.sub_(d * q)
    wr, wq = w * r, w * q
    return total(wr * r), total(wr), total(wr.mul_(q)), total(wq), total(wq.mul_(q))


def error_affine(x: Tensor, w: Tensor, top: float, d: Tensor, m: Tensor) -> Tensor:
    """sum w r^2 of coding blocks as d q + m with the nearest q in 0..top."""
    v = x - m
    r = v - (v * inverse(d)).round_().clamp_(0, top).mul_(d)
    return total((w * r).mul_(r))


def affine_step(sums: Sums, w1: Tensor, m: Tensor, bounded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares step (a, b) to (d + a, m + b) for fixed codes, and the error after it.

    `bounded` keeps m + b <= 0.
    """
    rr, r1, rq, q1, qq = sums
    qq = qq.clamp_min(TINY)
    det = qq * w1 - q1 * q1
    flat = det <= qq * 1e-6 * w1
    b = torch.where(flat, 0.0, (r1 * qq - rq * q1) / torch.where(flat, 1.0, det))
    if bounded:
        b = torch.minimum(b, -m)
    a = (rq - b * q1) / qq
    after = rr - a * rq * 2 - b * r1 * 2 + a * a * qq + a * b * q1 * 2 + b * b * w1
    return a, b, after


def fit_affine(
    x: Tensor, w: Tensor, top: float, tries: npt.NDArray[Any], bounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (d, m) for x ~ d q + m with q in 0..top before any rounding, and sum w.

    Each row (k, a) of `tries` lays k steps over the range of the weights that count, of which a
    share a is cut off below where k exceeds `top`, and is followed by a least-squares step. Of
    tries that differ by no more than rounding, as on weights that lie on a lattice, the first wins.
    """
    w1 = total(w)
    counts = w > 0
    low = torch.where(counts, x, HUGE).amin(0)
    high = torch.where(counts, x, -HUGE).amax(0)
    low = torch.where(w1 > 0, low, x.amin(0))
    high = torch.where(w1 > 0, high, x.amax(0))
    if bounded:
        low = low.clamp_max(0)
    span = (high - low).clamp_min_(TINY)
    margin = w1 * span * span * 1e-8
    best = torch.full_like(span, HUGE)
    scale = torch.zeros_like(span)
    base = low
    for k, share in tries:
        d = span * reciprocal(k)
        m = low + (span - d * top) * float(share)
        if bounded:
            m = m.clamp_max_(0)
        sums = residual_affine(x, w, top, d, m, over(float(k), span))
        a, b, after = affine_step(sums, w1, m, bounded)
        better = after < best - margin
        best = torch.where(better, after, best)
        scale = torch.where(better, d + a, scale)
        base = torch.where(better, m + b, base)
    return scale, base, w1


def polish_affine(
    x: Tensor, w: Tensor, top: float, start: tuple[Tensor, Tensor, Tensor], up: Tensor, refits: int
) -> tuple[Tensor, Tensor]:
    """Round (d, m) to f16; then recode and refit `refits` times and keep the best pair."""
    scale, base, w1 = start
    best = torch.full_like(scale, HUGE)
    chosen_d = near_f16(scale, up)
    chosen_m = near_f16(base, up)
    for _ in range(refits):
        d, m = near_f16(scale, up), near_f16(base, up)
        sums = residual_affine(x, w, top, d, m, inverse(d))
        better = sums[0] < best
        best = torch.where(better, sums[0], best)
        chosen_d = torch.where(better, d, chosen_d)
        chosen_m = torch.where(better, m, chosen_m)
        a, b, _ = affine_step(sums, w1, m, bounded=False)
        scale, base = d + a, m + b
    return chosen_d, chosen_m
