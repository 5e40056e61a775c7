"""Super-blocks of 256: sub-block scales are small integers times one or two f16.

Tensors are f32[size, sub-blocks, rows, super-blocks], normalised; see `_ops`. The searches are
those of `kernels._super`: for a trial value of the f16 scales, integer sub-scales are scored with
every code chosen anew, then the f16 scales are refitted to those codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.quantize.torch._fit import (
    error,
    error_affine,
    fit_affine,
    residual,
    residual_affine,
    scan,
)
from quantkit.quantize.torch._ops import (
    HUGE,
    TINY,
    Level,
    Tensor,
    inverse,
    near_f16,
    total,
)

Array = npt.NDArray[Any]


def face_down(x: Tensor) -> Tensor:
    """-1 for super-blocks that mostly lie above zero, else 1: the sign to put on weights, d, dmin.

    Affine codes rise from -dmin m <= 0, so a sub-block of large positive weights would waste most
    of them between zero and its smallest weight.
    """
    low, high = x.amin(0), x.amax(0)
    upright = total((high - low.clamp_max(0)).square())
    turned = total((high.clamp_min(0) - low).square())
    return torch.where(turned >= upright, 1.0, -1.0)


def _extreme(ideal: Tensor, w1: Tensor) -> Tensor:
    """The value of largest magnitude among sub-blocks that count."""
    magnitude = torch.where(w1 > 0, ideal.abs(), 0.0)
    top, where = magnitude.max(0, keepdim=True)
    return torch.where(top > 0, ideal.gather(0, where), 0.0)[0]


def _first_f16(extreme: Tensor, limit: float, up: Tensor) -> Tensor:
    """The f16 nearest to extreme / limit, but no zero as long as `extreme` itself is no zero.

    Weights around 1e-5 would be lost in types whose f16 is multiplied by sub-scale and code.
    """
    exact = extreme * float(np.float32(1) / np.float32(limit))
    d = near_f16(exact, up)
    least = torch.full_like(up, 2.0**-24) / up
    lost = (d == 0) & (extreme.abs() > least * 0.5)
    return torch.where(lost, torch.where(exact < 0, -least, least), d)


def search_affine(
    x: Tensor,
    w: Tensor,
    up: Tensor,
    top: float,
    limit: float,
    plan: tuple[Array, Array, Array, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, dmin, s, m) of x ~ d s q - dmin m with q in 0..top, s and m in 0..limit.

    d and dmin are f16 values in the units of `x`. `plan` is (tries, starts, moves, rounds), see
    `kernels._super.search_affine`.
    """
    tries, starts, moves, rounds = plan
    scale, base, w1 = fit_affine(x, w, top, tries, bounded=True)
    ideal_s, ideal_m = scale.clamp_min_(0), (-base).clamp_min_(0)
    best = torch.full_like(up, HUGE)
    found = (torch.zeros_like(up), torch.zeros_like(up), ideal_s * 0, ideal_m * 0)
    for start_d, start_m in starts:
        d = _first_f16(_extreme(ideal_s, w1) * float(start_d), limit, up)
        dmin = _first_f16(_extreme(ideal_m, w1) * float(start_m), limit, up)
        s = (ideal_s * inverse(d)).round_().clamp_(0, limit)
        m = (ideal_m * inverse(dmin)).round_().clamp_(0, limit)
        for _ in range(rounds):
            s, m = _move_affine(x, w, top, limit, d, dmin, moves, s, m)
            lost, step_d, step_dmin = _refit_affine(x, w, top, d, dmin, s, m, w1)
            better = lost < best
            best = torch.where(better, lost, best)
            found = _kept(better, (d, dmin, s, m), found)
            d, dmin = near_f16(d + step_d, up), near_f16(dmin + step_dmin, up)
    return found


def _kept(better: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> Any:
    return tuple(torch.where(better, a, b) for a, b in zip(new, old, strict=True))


def _move_affine(
    x: Tensor,
    w: Tensor,
    top: float,
    limit: float,
    d: Tensor,
    dmin: Tensor,
    moves: Array,
    s0: Tensor,
    m0: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best (s, m) of all sub-blocks within `moves` for fixed d and dmin."""
    if len(moves) == 1:
        return s0, m0
    least = torch.full_like(s0, HUGE)
    s, m = s0, m0
    for move_s, move_m in moves:
        s1 = (s0 + float(move_s)).clamp_(0, limit)
        m1 = (m0 + float(move_m)).clamp_(0, limit)
        lost = error_affine(x, w, top, d * s1, -(dmin * m1))
        better = lost < least
        least = torch.where(better, lost, least)
        s = torch.where(better, s1, s)
        m = torch.where(better, m1, m)
    return s, m


def _refit_affine(
    x: Tensor, w: Tensor, top: float, d: Tensor, dmin: Tensor, s: Tensor, m: Tensor, w1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The error, and the least-squares steps of d and dmin for the codes they lead to."""
    scale = d * s
    rr, r1, rq, q1, qq = residual_affine(x, w, top, scale, -(dmin * m), inverse(scale))
    # Normal equations of the step in (d, -dmin): regressors s q and m, target r.
    aa, bb, ab = total(s * s * qq).clamp_min_(TINY), total(m * m * w1), total(s * m * q1)
    ar, br = total(s * rq), total(m * r1)
    det = aa * bb - ab * ab
    flat = det <= aa * 1e-6 * bb
    step_m = torch.where(flat, 0.0, (br * aa - ar * ab) / torch.where(flat, 1.0, det))
    return total(rr), (ar - step_m * ab) / aa, -step_m


def search_scaled(
    x: Tensor,
    w: Tensor,
    up: Tensor,
    level: Level,
    ends: tuple[float, float],
    plan: tuple[Array, Array, Array, int],
) -> tuple[Tensor, Tensor]:
    """(d, s) of x ~ d s level with whole s within `ends`; d is an f16 in the units of `x`.

    `plan` is (ks, starts, moves, rounds), see `kernels._super.scaled_searcher`.
    """
    ks, starts, moves, rounds = plan
    least_s, most_s = ends
    ideal = scan(x, w, level, ks)
    extreme = _extreme(ideal, total(w))
    best = torch.full_like(up, HUGE)
    found = (torch.zeros_like(up), torch.zeros_like(ideal))
    for start in starts:
        d = _first_f16(extreme * abs(float(start)), most_s if start > 0 else least_s, up)
        s = (ideal * inverse(d)).round_().clamp_(least_s, most_s)
        for _ in range(rounds):
            s = _move_scaled(x, w, level, ends, d, moves, s)
            scale = d * s
            rr, rq, qq = residual(x, w, scale, inverse(scale), level)
            lost = total(rr)
            better = lost < best
            best = torch.where(better, lost, best)
            found = _kept(better, (d, s), found)
            step = total(s * rq) / total(s * s * qq).clamp_min_(TINY)
            d = near_f16(d + step, up)
    return found


def _move_scaled(
    x: Tensor,
    w: Tensor,
    level: Level,
    ends: tuple[float, float],
    d: Tensor,
    moves: Array,
    middle: Tensor,
) -> Tensor:
    """The best s of all sub-blocks within `moves` for a fixed d."""
    least = torch.full_like(middle, HUGE)
    s = middle
    for move in moves if len(moves) > 1 else ():
        trial = (middle + float(move)).clamp_(*ends)
        lost = error(x, w, d * trial, level)
        better = lost < least
        least = torch.where(better, lost, least)
        s = torch.where(better, trial, s)
    return s
