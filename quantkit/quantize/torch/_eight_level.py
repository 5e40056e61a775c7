"""Quick estimates for codebooks with eight evenly spaced levels and four places (IQ3_S).

As in `kernels._eight_level`: the weights of a group are rounded freely, and a table tells which
entries lie up to two steps away at one place, or one step at two places.
"""

from __future__ import annotations

import torch

from quantkit.quantize.kernels._eight_level import LEVELS, PLACES, neighbour_tables
from quantkit.quantize.torch._ops import Tensor, total


def estimate(type_name: str, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """v(s) of blocks, see `_scales`: [blocks, ...] for weights [weights per block, blocks, ...]."""
    one, two = (
        torch.from_numpy(table.copy()).to(x.device) for table in neighbour_tables(type_name)
    )
    v = x.abs().reshape(-1, PLACES, *x.shape[1:]).transpose(0, 1)  # [places, groups, blocks, ...]
    w = w.reshape(-1, PLACES, *w.shape[1:]).transpose(0, 1)
    digit = (v * (torch.full_like(s, 0.5) / s) - 0.5).round_().clamp_(0, LEVELS - 1)
    level = digit * 2 + 1
    sw, wv = s * w, w * v
    saved = level * (wv + wv - sw * level)
    we = wv - sw * level
    # A step of k levels costs 4 s (k^2 sw - k we); the factor 4 s is applied in the end.
    costs = [sw + we, sw - we, (sw + sw + we) * 2, (sw + sw - we) * 2]
    worst = total(torch.maximum(costs[0], costs[1]))
    code = total(digit.int() << torch.arange(0, 12, 3, device=x.device).reshape(4, 1, 1, 1, 1))
    reached = one[code]
    least = torch.where(reached >> 16 > 0, 0.0, worst)
    for j in range(PLACES):
        for k in range(4):
            there = (reached >> (4 * j + k) & 1) == 1
            least = torch.where(there, torch.minimum(least, costs[k][j]), least)
    reached = two[code]
    bit = 0
    for i in range(PLACES):
        for j in range(i + 1, PLACES):
            for k in (0, 1):
                for m in (0, 1):
                    there = (reached >> bit & 1) == 1
                    cost = costs[k][i] + costs[m][j]
                    least = torch.where(there, torch.minimum(least, cost), least)
                    bit += 1
    return total(total(saved) - least * 4)
