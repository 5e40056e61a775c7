"""Codebooks of three levels and eight places: IQ1_S, IQ1_M and, below effort `best`, IQ2_S.

As in `kernels._three_level`: each weight is rounded freely, then every subset of the places of
least regret, with and without one place more, takes its second nearest level; a table tells which
combinations are entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantkit.quantize.codec import How, Importance
from quantkit.quantize.grids import grid
from quantkit.quantize.kernels._three_level import (
    IS_ENTRY,
    NEVER,
    PLACES,
    POWERS,
    entry_table,
    levels_of,
    steps_table,
)
from quantkit.quantize.kernels._three_level_super import Plan, ThreeLevelCode
from quantkit.quantize.torch._ops import Tensor, total
from quantkit.quantize.torch._scales import lay_samples, load, per_block, refine

_NEVER = int(NEVER)
_NEVER_COST = 2.0**127  # its bits as a float


class _Book:
    """A codebook on a device: its tables, and its levels with each of the shifts."""

    def __init__(self, code: ThreeLevelCode, device: torch.device) -> None:
        self.shared = code.shared
        self.shifts = torch.tensor(code.shifts, dtype=torch.float32, device=device)
        levels, shifts = levels_of(code.name), np.array(code.shifts, np.float32)
        self.shifted = [[float(level + shift) for level in levels] for shift in shifts]
        self.points = torch.from_numpy(grid(code.name).copy()).to(device)
        self.steps = torch.from_numpy(steps_table(code.name).copy()).to(device)
        self.entries = torch.from_numpy(entry_table(code.name).astype(np.int32)).to(device)
        self.powers = torch.from_numpy(POWERS).to(device)

    def change(self, key: Tensor) -> Tensor:
        """What the step named in a key's low bits adds to the code."""
        step = self.powers[key >> 1 & 7]
        return torch.where(key & 1 == 0, -step, step)

    def find(self, sw: Tensor, u: Tensor, levels: list[float], depth: int) -> tuple[Tensor, Tensor]:
        """(what the best entries save, their codes), f32 and i32 of one dimension less.

        `sw` is scale times weight and `u` = 2 w x, both f32[8, ...]; `levels` are the three
        values that the codebook's digits stand for, rising.
        """
        free, saved, keys = self._round_freely(sw, u, levels)
        cost, code, closed = torch.zeros_like(saved)[None], free[None], free[None] * 0 - 1
        last = free * 0 - 1
        for _ in range(depth):
            last = torch.where(keys > last, keys, _NEVER).amin(0)
            regret = (last & -16).view(torch.float32)
            change = self.change(last)
            hole = 3 << (last & 14)
            cost = torch.cat([cost, cost + regret])
            code = torch.cat([code, code + change])
            closed = torch.cat([closed, closed - hole])
        open_steps = self.steps[code] & closed
        key = torch.full_like(code, _NEVER)
        for j in range(PLACES):
            there = open_steps >> (keys[j] & 15) & 1 == 1
            key = torch.where(there, torch.minimum(key, keys[j]), key)
        least, which = (cost + (key & -16).view(torch.float32)).min(0, keepdim=True)
        key, code = key.gather(0, which)[0], code.gather(0, which)[0]
        least = least[0]
        is_entry = self.steps[free] >> IS_ENTRY > 0
        # Hardly ever is none of those tried an entry.
        none = ~is_entry & (least >= _NEVER_COST)
        chosen = torch.where(is_entry | none, free, code + self.change(key))
        regrets = total((keys & -16).view(torch.float32))
        lost = torch.where(is_entry, 0.0, torch.where(none, regrets, least))
        return saved - lost, chosen

    def _round_freely(
        self, sw: Tensor, u: Tensor, levels: list[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Free rounding: its code, what it saves, and a key for each place.

        A key holds the place's regret and, in its low bits, the step 2 j + up.
        """
        l0, l1, l2 = (np.float32(level) for level in levels)
        c1, c2 = l1 - l0, l2 - l1
        k1, k2 = -(l1 + l0) * c1, -(l2 + l1) * c2
        d1 = sw * float(k1) + u * float(c1)  # level 1 saves so much more than level 0
        d2 = sw * float(k2) + u * float(c2)
        shape = (PLACES,) + (1,) * (u.dim() - 1)
        digits = (d1 > 0).int() + (d2 > 0).int()
        code = total(digits * self.powers.reshape(shape))
        saved = total((u - sw * float(l1)) * float(l1) + d2.clamp_min(0) - d1.clamp_max(0))
        d = torch.where(d2.abs() < d1.abs(), d2, d1)
        place = torch.arange(0, 2 * PLACES, 2, dtype=torch.int32, device=u.device).reshape(shape)
        keys = d.abs().view(torch.int32) & -16 | place + (d <= 0)
        return code, saved, keys

    def settle(self, w: Tensor, u: Tensor, s: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """(v of the blocks at scales `s`, codes, shift numbers); see `_scales`.

        `w` and `u` are f32[8, groups, blocks, ...], `s` is f32[blocks, ...].
        """
        sw = s * w
        found = [self.find(sw, u, levels, depth) for levels in self.shifted]
        if len(found) == 1:
            saved, code = found[0]
            return total(saved), code, torch.zeros_like(code, dtype=torch.uint8)
        ahead = found[1][0] - found[0][0]
        # Which of two shifts is better, for a whole block or for each of its groups.
        gain = total(ahead) if self.shared else ahead
        second = (gain > 0).expand_as(ahead)
        more = gain.clamp_min(0) if self.shared else total(gain.clamp_min(0))
        code = torch.where(second, found[1][1], found[0][1])
        return total(found[0][0]) + more, code, second.to(torch.uint8)


def search(
    code: ThreeLevelCode, x: Tensor, importance: Importance | None, how: How, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, l, entries, shift numbers) of every super-block of `x` f32[rows, cols].

    d is f32[rows, super-blocks]; the others put their blocks or groups before these dimensions.
    """
    supers = load(x, importance, how.weighting, code.c)
    book = _Book(code, x.device)
    x_blocks = per_block(supers.v, code.n_blocks)
    w_blocks = per_block(supers.w.expand_as(supers.v), code.n_blocks)
    signed = len(code.shifts) > 1
    span = np.array(code.span, np.float32) / np.float32(max(map(max, book.shifted)))
    first, step = lay_samples(x_blocks, w_blocks, span, plan.n_samples)
    w = w_blocks.reshape(-1, PLACES, *w_blocks.shape[1:]).transpose(0, 1).contiguous()
    v = x_blocks.reshape(-1, PLACES, *x_blocks.shape[1:]).transpose(0, 1)
    u = (w + w) * (v if signed else v.abs())
    sampled = [book.settle(w, u, step * k + first, plan.shallow)[0] for k in range(plan.n_samples)]

    def settle(multiplier: Tensor, unit: Tensor) -> Any:
        m = multiplier * 2 + 1
        _, codes, shift = book.settle(w, u, m * unit, plan.deep)
        entries = book.entries[codes]
        level = book.points[entries].movedim(-1, 0) + book.shifts[shift.int()]
        b, a = total(total(u * level)), total(total(w * level * level))
        # Groups of a block stand side by side, as in a row.
        found = tuple(t.transpose(0, 1).flatten(0, 1) for t in (entries.short(), shift))
        return found, total(b * m), total(a * m * m)

    tries = np.geomspace(0.7, 1.6, plan.n_tries).astype(np.float32) / (2 * code.top + 1)
    form = (float(code.top), code.factor)
    d, multiplier, (entries, shift) = refine(
        supers, torch.stack(sampled), (first, step), tries, form, plan.rounds, settle
    )
    return d, multiplier, entries, shift
