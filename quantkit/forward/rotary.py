"""Rotary position embedding of adjacent pairs, as llama.cpp stores q and k for it."""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch

from quantkit.forward.hyper import Rope

Angles = tuple[torch.Tensor, torch.Tensor]  # cos, sin: f32[n_pos, n_dims / 2]


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
    return cos.float().to(device), sin.float().to(device)


def rotate(x: torch.Tensor, cos_sin: Angles) -> torch.Tensor:
    """Rotate the first dimensions of x f32[n_pos, n_heads, dim], pair (2j, 2j+1) by angle j."""
    cos, sin = (part[:, None, :] for part in cos_sin)
    n_dims = 2 * cos.shape[-1]
    even, odd = x[..., 0:n_dims:2], x[..., 1:n_dims:2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return turned if n_dims == x.shape[-1] else torch.cat((turned, x[..., n_dims:]), -1)


def _ramp(rope: Rope, i: torch.Tensor) -> torch.Tensor:
    """0 where a frequency is kept, 1 where it is interpolated (YaRN, 3.2)."""

    def place(beta: float) -> float:
        return rope.n_dims * log(rope.n_original / (beta * 2 * pi)) / (2 * log(rope.theta))

    low = max(0, floor(place(rope.beta_fast)))
    high = min(rope.n_dims - 1, ceil(place(rope.beta_slow)))
    return ((i - low) / max(high - low, 0.001)).clamp(0, 1)
