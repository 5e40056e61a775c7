"""Rotary position embedding: of adjacent pairs or of halves, as the architecture has it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, pi

import torch

from quantkit.forward.hyper import Hyper, Rope
from quantkit.forward.weights import Weights


@dataclass(frozen=True, slots=True)
class Angles:
    """cos and sin f32[n_pos, n_dims / 2], and whether pairs are halves apart."""

    cos: torch.Tensor
    sin: torch.Tensor
    halves: bool

    def until(self, n_pos: int) -> Angles:
        """Those of the first positions."""
        return Angles(self.cos[:n_pos], self.sin[:n_pos], self.halves)


@dataclass(frozen=True, slots=True)
class Turns:
    """Angles of a model's layers, and of those with a window where they have their own."""

    full: Angles
    local: Angles

    @classmethod
    def of(cls, weights: Weights, hyper: Hyper, n_pos: int, device: torch.device) -> Turns:
        """For positions `0 .. n_pos`, with the model's own frequency divisors."""
        full = angles(hyper.rope, n_pos, _divisors(weights, hyper.rope, n_pos), device)
        local = hyper.local_rope
        return cls(full, angles(local, n_pos, None, device) if local else full)


def _divisors(weights: Weights, rope: Rope, n_pos: int) -> torch.Tensor | None:
    """`rope_freqs`, or the set of LongRoPE that a context of `n_pos` tokens runs with."""
    length = "long" if n_pos > rope.n_original else "short"
    for name in ("rope_freqs.weight", f"rope_factors_{length}.weight"):
        if name in weights:
            return torch.from_numpy(weights.read(name, 0, 1)[0])
    return None


def angles(rope: Rope, n_pos: int, divisors: torch.Tensor | None, device: torch.device) -> Angles:
    """cos and sin of positions `0 .. n_pos`; `divisors` f32[n_dims / 2] are `rope_freqs.weight`.

    Computed in f64 and rounded once.
    """
    i = torch.arange(rope.n_dims // 2, dtype=torch.float64)
    frequencies = rope.theta ** (-2 * i / rope.n_dims)
    if divisors is not None:
        frequencies = frequencies / divisors.double()
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "yarn":
        ramp = _ramp(rope, i)
        frequencies = frequencies * (1 - ramp) + frequencies / rope.factor * ramp
    turns = torch.outer(torch.arange(n_pos, dtype=torch.float64), frequencies)
    cos, sin = turns.cos() * rope.magnitude, turns.sin() * rope.magnitude
    return Angles(cos.float().to(device), sin.float().to(device), rope.halves)


def rotate(x: torch.Tensor, turns: Angles) -> torch.Tensor:
    """Rotate the first dimensions of x f32[n_pos, n_heads, dim], pair j by angle j.

    Pair j is (2j, 2j + 1), or (j, n/2 + j) of the n rotated dimensions where they are halves.
    """
    cos, sin = turns.cos[:, None, :], turns.sin[:, None, :]
    n_dims = 2 * cos.shape[-1]
    if turns.halves:
        a, b = x[..., : n_dims // 2], x[..., n_dims // 2 : n_dims]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        a, b = x[..., 0:n_dims:2], x[..., 1:n_dims:2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return turned if n_dims == x.shape[-1] else torch.cat((turned, x[..., n_dims:]), -1)


def _ramp(rope: Rope, i: torch.Tensor) -> torch.Tensor:
    """0 where a frequency is kept, 1 where it is interpolated (YaRN, 3.2)."""

    def place(beta: float) -> float:
        return rope.n_dims * log(rope.n_original / (beta * 2 * pi)) / (2 * log(rope.theta))

    low, high = place(rope.beta_fast), place(rope.beta_slow)
    if rope.whole_steps:
        low, high = floor(low), ceil(high)
    low, high = max(0, low), min(rope.n_dims - 1, high)
    return ((i - low) / max(high - low, 0.001)).clamp(0, 1)
