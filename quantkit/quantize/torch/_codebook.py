"""Exhaustive search of a codebook: IQ2_XXS, IQ2_XS, IQ3_XXS, IQ3_S and, at `best`, IQ2_S.

With a = sum w g^2 and b = sum u g, u = 2 w |x|, an entry g of a group saves s (b - s a) at scale s;
all entries of all groups are products of matrices, in the full f32 that is torch's default. Where
the number of minus signs must be even and is odd, an entry pays for its cheapest wrong sign; see
`kernels._codebook`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantkit.quantize.codec import How, Importance
from quantkit.quantize.grids import grid
from quantkit.quantize.kernels._codebook_super import CodebookCode, Plan
from quantkit.quantize.torch._eight_level import estimate
from quantkit.quantize.torch._ops import Tensor, total
from quantkit.quantize.torch._scales import lay_samples, load, per_block, refine


class Book:
    """A codebook on a device, and the groups of some super-blocks that are coded with it."""

    def __init__(self, code: CodebookCode, v: Tensor, w: Tensor) -> None:
        self.even, self.places, self.n_blocks = code.even, code.places, code.n_blocks
        self.levels = torch.from_numpy(grid(code.name).copy()).to(v.device)  # [entries, places]
        self.both = torch.cat([self.levels, self.levels * self.levels], 1)
        self.w = w.expand_as(v)
        self.u = (w + w) * v.abs()
        minus = (v < 0).reshape(-1, 8, *v.shape[1:])
        self.odd = minus.sum(1) % 2 == 1  # [32, rows, super-blocks]
        self.n_groups = len(v) // self.places
        self.stride = 2 if self.even and self.places == 4 else 1  # groups that share signs

    def gains(self, group: int, s: Tensor) -> Tensor:
        """b - s a of every entry at scales `s` [(samples,) rows, super-blocks]: [entries, *s]."""
        part = slice(group * self.places, (group + 1) * self.places)
        u, w = self.u[part], self.w[part]
        if s.dim() > 2:
            u, w = u[:, None].expand(-1, *s.shape), w[:, None]
        products = torch.cat([u, w * -s]).flatten(1)
        return (self.both @ products).reshape(-1, *s.shape)

    def flips(self, first: int) -> list[Tensor]:
        """What one wrong sign costs every entry at least, for the groups that share signs."""
        return [self._flips(first + i) for i in range(self.stride)] if self.even else []

    def _flips(self, group: int) -> Tensor:
        u = self.u[group * self.places : (group + 1) * self.places]
        least = self.levels[:, 0, None, None] * u[0]
        for j in range(1, self.places):
            least = torch.minimum(least, self.levels[:, j, None, None] * u[j])
        return least.mul_(2)

    def sample(self, block: int, s: Tensor) -> Tensor:
        """v of a block at scales `s` f32[samples, rows, super-blocks]."""
        per = self.n_groups // self.n_blocks
        saved = torch.zeros_like(s)
        for first in range(block * per, (block + 1) * per, self.stride):
            flips = [flip[:, None] for flip in self.flips(first)]
            saved = saved + self._saved(first, s, flips)
        return saved

    def _saved(self, first: int, s: Tensor, flips: list[Tensor]) -> Tensor:
        """What the best entries save of the groups from `first` that share a byte of signs."""
        if self.stride == 1:
            return self._paid(first, s, flips).amax(0)
        left, right = self.gains(first, s), self.gains(first + 1, s)
        free = left.amax(0), right.amax(0)
        paid = left.sub_(flips[0]).amax(0), right.sub_(flips[1]).amax(0)
        odd = torch.maximum(free[0] + paid[1], paid[0] + free[1])
        return torch.where(self.odd[first // 2], odd, free[0] + free[1])

    def _paid(self, group: int, s: Tensor, flips: list[Tensor]) -> Tensor:
        """Gains less the wrong sign that groups of 8 with odd signs must have."""
        gains = self.gains(group, s)
        return gains.sub_(torch.where(self.odd[group], flips[0], 0.0)) if self.even else gains

    def settle(self, first: int, s: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Entries of the groups from `first` that share signs, and which have a wrong sign."""
        flips = self.flips(first)
        if self.stride == 1:
            wrong = self.odd[first] if self.even else torch.zeros_like(s, dtype=torch.bool)
            return [self._paid(first, s, flips).argmax(0)], [wrong]
        left, right = self.gains(first, s), self.gains(first + 1, s)
        free = left.max(0), right.max(0)
        paid = left.sub_(flips[0]).max(0), right.sub_(flips[1]).max(0)
        odd = self.odd[first // 2]
        # max gives (values, indices).
        pays_left = odd & (paid[0][0] + free[1][0] > free[0][0] + paid[1][0])
        pays = [pays_left, odd & ~pays_left]
        return [torch.where(pays[i], paid[i][1], free[i][1]) for i in range(2)], pays

    def products(self, group: int, entry: Tensor, pays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, a) of the chosen entries of a group, and the place of its wrong sign or 8."""
        part = slice(group * self.places, (group + 1) * self.places)
        level = self.levels[entry].permute(2, 0, 1)
        ug = self.u[part] * level
        cost, place = ug.min(0)
        b = total(ug) - torch.where(pays, cost + cost, 0.0)
        a = total(self.w[part] * level * level)
        return b, a, torch.where(pays, place + group * self.places % 8, 8)


def _settler(book: Book) -> Any:
    """`Settle` of a book: entries i16[groups, ...] and wrong signs u8[32, ...] to be toggled."""
    per = book.n_groups // book.n_blocks

    def settle(multiplier: Tensor, unit: Tensor) -> Any:
        entries, wrong = [], [torch.zeros_like(unit, dtype=torch.uint8) for _ in range(32)]
        b1, a1 = torch.zeros_like(unit), torch.zeros_like(unit)
        for first in range(0, book.n_groups, book.stride):
            m = multiplier[first // per] * 2 + 1
            chosen = zip(*book.settle(first, unit * m), strict=True)
            for group, (entry, pays) in enumerate(chosen, first):
                b, a, place = book.products(group, entry, pays)
                b1 = b1 + m * b
                a1 = a1 + m * m * a
                entries.append(entry.short())
                byte = group * book.places // 8
                wrong[byte] = wrong[byte] | torch.where(place < 8, 1 << place, 0).to(torch.uint8)
        return (torch.stack(entries), torch.stack(wrong)), b1, a1

    return settle


def sign_bytes(v: Tensor) -> Tensor:
    """[256, ...] -> u8[32, ...]: bit j of a byte is set where weight j of its 8 is negative."""
    minus = (v < 0).to(torch.uint8).reshape(-1, 8, *v.shape[1:])
    packed = minus[:, 0]
    for j in range(1, 8):
        packed = packed | minus[:, j] << j
    return packed


def search(
    code: CodebookCode, x: Tensor, importance: Importance | None, how: How, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, l, entries, signs) of every super-block of `x` f32[rows, cols].

    d is f32[rows, super-blocks]; the others put their blocks, groups or bytes before these two
    dimensions.
    """
    supers = load(x, importance, how.weighting, code.c)
    book = Book(code, supers.v, supers.w)
    span = np.array(code.span, np.float32) / grid(code.name).max()
    tries = np.geomspace(0.7, 1.6, plan.n_tries).astype(np.float32) / np.float32(31)
    blocks, weights = per_block(supers.v, code.n_blocks), per_block(book.w, code.n_blocks)
    first, step = lay_samples(blocks, weights, span, plan.n_samples)
    scales = torch.stack([step * k + first for k in range(plan.n_samples)])
    if code.name == "IQ3_S":
        values = torch.stack([estimate(code.name, blocks, weights, s) for s in scales])
    else:
        values = torch.stack([book.sample(i, scales[:, i]) for i in range(code.n_blocks)], 1)
    layout, form = (first, step), (15.0, code.factor)
    d, multiplier, (entries, wrong) = refine(
        supers, values, layout, tries, form, plan.rounds, _settler(book)
    )
    # A super-block that saves nothing is all zero.
    signs = torch.where(d > 0, sign_bytes(supers.v), 0)
    return d, multiplier, entries, signs ^ wrong
