"""Choosing the scales of i-quant super-blocks from samples of what each scale can save.

The formulas are told in `kernels._scales`: a block at scale s saves s v(s) with v convex, so a few
samples of v per block tell which unit and which multipliers to take. Tensors are laid out as `_ops`
says: samples f32[samples, blocks, rows, super-blocks], weights f32[256, rows, super-blocks].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.quantize.codec import Importance, Weighting
from quantkit.quantize.torch._ops import (
    F16_MAX,
    HUGE,
    SUPER,
    TINY,
    Tensor,
    blocks_of,
    exponent_of,
    power,
    total,
)

LOWEST = -HUGE
_FAINT = 1e-15  # no f16 scale reaches down to such weights


@dataclass(frozen=True, slots=True)
class Supers:
    """Super-blocks over powers of two, f32[256, rows, super-blocks], to peaks in [0.5, 1).

    `w` are error weights, [256, 1 or rows, super-blocks]; `power` f32[rows, super-blocks] is what
    was divided out and `alive` tells which are not too faint to encode at all.
    """

    v: Tensor
    w: Tensor
    power: Tensor
    alive: Tensor


def load(x: Tensor, importance: Importance | None, weighting: Weighting, c: float) -> Supers:
    """`x` f32[rows, cols] with error weights of a weighting; `c` is the type's in llama.cpp's form.

    Importance has a peak of 1 in each super-block and a floor of 1e-8, which decides only between
    choices that importance calls equal; it is uniform where it is zero all over.
    """
    v = blocks_of(x, SUPER)
    peak = v.abs().amax(0)
    alive = peak >= _FAINT
    # Faint super-blocks get any weights that do not divide by zero: their codes are not used.
    v = torch.where(alive, v, 1.0)
    biased = torch.where(alive, exponent_of(peak) + 1, 127).clamp_max_(254)
    v.mul_(power(255 - biased)).mul_(0.5)
    q = np.ones(x.shape[1], np.float32) if importance is None else importance
    spans = q.reshape(-1, SUPER)
    peaks = spans.max(axis=1, keepdims=True)
    scaled = np.maximum(spans / np.where(peaks > 0, peaks, np.float32(1)), np.float32(1e-8))
    spans = np.where(peaks > 0, scaled, np.float32(1))
    w = torch.from_numpy(np.ascontiguousarray(spans.T[:, np.newaxis])).to(x.device)
    if weighting != "importance":
        squares = v * v
        floor = total(squares) * float(np.float32(c / SUPER))
        root = squares.add_(floor).sqrt_()
        w = (root.sqrt_() if weighting == "blend" else root).mul_(w)
    return Supers(v, w, power(biased), alive)


def per_block(t: Tensor, n_blocks: int) -> Tensor:
    """[256, ...] -> [weights per block, n_blocks, ...]."""
    return t.reshape(n_blocks, -1, *t.shape[1:]).transpose(0, 1)


def lay_samples(
    x: Tensor, w: Tensor, span: npt.NDArray[Any], n_samples: int
) -> tuple[Tensor, Tensor]:
    """(first, step) of the samples of each block: over `span` times a typical magnitude.

    `x` and `w` are f32[weights per block, blocks, ...]; the magnitude is
    sqrt(rms * sum w |x|^3 / sum w x^2).
    """
    magnitude = x.abs()
    squares = w * magnitude * magnitude
    w1, w2, w3 = total(w), total(squares), total(squares * magnitude)
    w2 = w2.clamp_min(TINY)
    centre = ((w2 / w1).sqrt() * (w3 / w2)).sqrt().clamp_min_(1e-9)
    width = float((span[1] - span[0]) / np.float32(n_samples - 1))
    return centre * float(span[0]), centre * width


def fit_parabolas(values: Tensor, first: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """(best, bend) of parabolas peak - bend (s - best)^2 for what each block saves."""
    s = first
    top = torch.full_like(first, LOWEST)
    left, right, last = top, top, top
    chosen = first
    for value in values:
        gain = s * value
        better = gain > top
        right = torch.where(better, LOWEST, torch.where(right == LOWEST, gain, right))
        left = torch.where(better, last, left)
        top = torch.where(better, gain, top)
        chosen = torch.where(better, s, chosen)
        last = gain
        s = s + step
    fall = (top - left) + (top - right)
    inside = (left > LOWEST) & (right > LOWEST) & (fall > 0)
    shift = (right - left) / torch.where(inside, fall, 1.0) * 0.5
    best = torch.where(inside, step * shift + chosen, chosen)
    # At the end of the samples: the parabola of fixed entries, which save nothing at s = 0.
    fixed = top.clamp_min(0) / (chosen * chosen)
    return best, torch.where(inside, fall * 0.5 / (step * step), fixed)


def fit_unit(best: Tensor, bend: Tensor, tries: npt.NDArray[Any], top: float) -> Tensor:
    """The unit with which the parabolas of all blocks lose least, out of `tries` times the peak."""
    peak = best.amax(0).clamp_min(0)
    least = torch.full_like(peak, HUGE)
    chosen = torch.zeros_like(peak)
    for factor in tries:
        unit = peak * float(factor)
        multiplier = ((best * unit.reciprocal() - 1) * 0.5).round_().clamp_(0, top)
        gap = (multiplier + multiplier + 1) * unit - best
        loss = total(gap * gap * bend)
        better = loss < least
        least = torch.where(better, loss, least)
        chosen = torch.where(better, unit, chosen)
    return chosen


def find_sags(values: Tensor) -> Tensor:
    """How far v lies below its chord from sample k to k + 1, at t of the way: sag * t (1 - t)."""
    bends = (values[:-2] - values[1:-1]) - (values[1:-1] - values[2:])
    return (torch.cat([bends[:1], bends]) + torch.cat([bends, bends[-1:]])) * 0.25


def choose_multipliers(
    values: Tensor,
    sags: Tensor,
    first: Tensor,
    step: Tensor,
    best: Tensor,
    unit: Tensor,
    top: float,
) -> Tensor:
    """For a given unit the whole l <= `top` of every block that saves most, off the samples."""
    per_step = step.reciprocal()
    middle = ((best / unit - 1) * 0.5).round_()
    most = torch.full_like(best, LOWEST)
    chosen = middle
    for d in (-1, 0, 1):
        candidate = (middle + d).clamp(0, top)
        s = unit * (candidate + candidate + 1)
        t = (s - first) * per_step
        k = t.clamp(0, len(values) - 2).long()
        t = t - k
        low = values.gather(0, k[None])[0]
        high = values.gather(0, k[None] + 1)[0]
        sag = sags.gather(0, k[None])[0] * t.clamp(0, 1)
        gain = s * (sag * (t - 1) + ((high - low) * t + low))
        better = gain > most
        most = torch.where(better, gain, most)
        chosen = torch.where(better, candidate, chosen)
    return chosen


def storable(unit: Tensor, power_: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The unit as f16 can hold it, and the stored scale unit * power * factor."""
    d = (unit.clamp_min(0) * factor * power_).clamp_max(F16_MAX).half().float()
    return d / torch.full_like(d, factor) / power_, d


# Entries and what goes with them, and the sums b and a that a refit of the unit needs, for whole
# multipliers and a unit.
Settle = Callable[[Tensor, Tensor], tuple[tuple[Tensor, ...], Tensor, Tensor]]


def refine(
    supers: Supers,
    values: Tensor,
    layout: tuple[Tensor, Tensor],
    tries: npt.NDArray[Any],
    form: tuple[float, float],
    rounds: int,
    settle: Settle,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(d, l, found) of the round that saves most; all zero where nothing is saved.

    `values` are the samples that `layout` = (first, step) laid out; `form` is (largest l, stored
    scale / unit). `settle(l, unit)` gives what was found, with rows and super-blocks in its last
    two dimensions, and the sums of m b and m^2 a for m = 2 l + 1.
    """
    top, factor = form
    best, bend = fit_parabolas(values, *layout)
    sags = find_sags(values)
    unit, d = storable(fit_unit(best, bend, tries, top), supers.power, factor)
    alive = supers.alive
    most = torch.zeros_like(unit)
    kept: tuple[Tensor, ...] = ()
    for _ in range(rounds):
        alive = alive & (unit != 0)
        unit = torch.where(alive, unit, 1.0)
        multiplier = choose_multipliers(values, sags, *layout, best, unit, top)
        found, b, a = settle(multiplier, unit)
        unit, d = storable(b * 0.5 / a.clamp_min(TINY), supers.power, factor)
        saved = unit * (b - unit * a)
        better = alive & (saved > most)
        most = torch.where(better, saved, most)
        new = (d, multiplier, *found)
        old = kept or tuple(torch.zeros_like(t) for t in new)
        kept = tuple(torch.where(better, n, o) for n, o in zip(new, old, strict=True))
    return kept[0], kept[1], kept[2:]
