"""Levels that are not whole numbers: the sixteen of IQ4 and those of E2M1 floats."""

from __future__ import annotations

from functools import cache

import torch

from quantkit.quantize.kernels.iq4 import LEVELS
from quantkit.quantize.torch._ops import Tensor

_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


@cache
def _iq4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(LEVELS).to(device), torch.from_numpy(_MIDDLES).to(device)


def iq4_code(t: Tensor) -> Tensor:
    """The code, i32, of the IQ4 level nearest to each value."""
    return torch.bucketize(t, _iq4_tables(t.device)[1], out_int32=True)


def iq4_level(t: Tensor) -> Tensor:
    """The IQ4 level nearest to each value."""
    return _iq4_tables(t.device)[0][iq4_code(t)]


def _e2m1_magnitude(t: Tensor) -> Tensor:
    # The levels are whole up to 4, then even, then multiples of 4; 12 is the last.
    a = t.abs().clamp_max_(12)
    q = torch.where(a > 8, (a * 0.25).round_() * 4, (a * 0.5).round_() * 2)
    return torch.where(a < 4, a.round(), q)


def e2m1_level(t: Tensor) -> Tensor:
    """The nearest of +-{0, 1, 2, 3, 4, 6, 8, 12}."""
    return torch.copysign(_e2m1_magnitude(t), t)


def e2m1_code(t: Tensor) -> Tensor:
    """The code, i32 in 0..15, of the nearest level; 8 is never used."""
    q = _e2m1_magnitude(t).int()
    code = torch.where(q > 4, (q + 4 >> 1).clamp_max_(7), q)
    return torch.where((t < 0) & (q > 0), code | 8, code)
