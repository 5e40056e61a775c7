"""Rounding with feedback on a torch device: `kernels.feedback` over thousands of rows at a time.

Candidates are those of the kernels, so codes differ where two of them are equal but for rounding;
that changes what later columns aim at, and leaves the error of a matrix as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.quantize.kernels.feedback import EVEN, GROUP, NONE

Tensor = torch.Tensor

_EIGHTH = 0.125
_FAR = 1e4  # in units of a scale: beyond every level of every codebook
_LANES = 8  # the best of as many entries are compared under the whole metric


def round_levels(
    z: Tensor, ref: Tensor, scale: Tensor, offset: Tensor, values: Tensor, couple: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose among scale * values + offset: (places in `values` u8[rows, n], chosen f32[rows, n]).

    z, ref f32[rows, n]; scale, offset f32[rows, n / sub]; `values` ascend; couple f32[n, n].
    """
    rows, n = z.shape
    sub = n // scale.shape[1]
    aim, ref, scale, offset = (t.T.contiguous() for t in (z, ref, scale, offset))
    middle = (values[1:] + values[:-1]) / 2
    places = torch.empty(n, rows, dtype=torch.uint8, device=z.device)
    chosen = torch.empty_like(aim)
    for k in range(n):
        s, o = scale[k // sub], offset[k // sub]
        alive = s != 0
        t = torch.where(alive, (aim[k] - o) / torch.where(alive, s, 1.0), 0.0)
        place = torch.bucketize(t.nan_to_num(0.0), middle)
        chosen[k] = s * values[place] + o
        places[k] = place
        aim[k + 1 :].addr_(couple[k, k + 1 :], ref[k] - chosen[k])
    return places.T.contiguous(), chosen.T.contiguous()


@dataclass(frozen=True)
class _Group:
    """What eight columns can be: `levels` f32[entries, places] under the metric f32[8, 8]."""

    levels: Tensor
    metric: Tensor
    signs: int

    @property
    def own(self) -> Tensor:
        """The metric's diagonal."""
        return self.metric.diagonal()

    def cost(self, u: Tensor, g: Tensor) -> Tensor:
        """(u - g) S (u - g) over the last dimension."""
        lost = u - g
        return (lost @ self.metric * lost).sum(-1)

    def choose(self, u: Tensor, n_scans: int, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values near u f32[rows, 8], their entries [rows, 8 / places], and what they cost."""
        g, entry, cost = self._search(u, u, shift)
        for _ in range(1, n_scans):
            y = g + (u - g) @ self.metric / self.own
            new, there, lower = self._search(y, u, shift)
            better = (lower < cost)[:, None]
            g, entry = torch.where(better, new, g), torch.where(better, there, entry)
            cost = torch.minimum(lower, cost)
        return g, entry, cost

    def _search(self, y: Tensor, u: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of what is near y the values of least cost to u."""
        b = 2 * self.own * (y if self.signs == NONE else y.abs())
        odd = (y < 0).sum(1) % 2 == 1 if self.signs == EVEN else None
        if self.levels.shape[1] == GROUP:
            g, entry = self._whole(y, b, odd, shift)
        else:
            g, entry = self._halves(y, b, odd)
        cost, at = self.cost(u[:, None], g).min(1)
        row = torch.arange(len(u), device=u.device)
        g, entry = g[row, at], entry[row, at]
        if self.signs == NONE:
            return g, entry, cost
        g = self._turn_signs(u, g)
        return g, entry, self.cost(u, g)

    def _whole(
        self, y: Tensor, b: Tensor, odd: Tensor | None, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best of every eighth entry: values [rows, 8, 8], entries [rows, 8, 1]."""
        gain = b @ self.levels.T - self.levels.square() @ self.own
        if self.signs == NONE:
            gain -= 2 * shift * (self.levels @ self.own)
        if odd is not None:
            gain -= torch.where(odd[:, None], 2 * _cheapest(self.levels, b), 0.0)
        lanes = torch.arange(_LANES, device=y.device)
        entry = gain.view(len(y), -1, _LANES).argmax(1) * _LANES + lanes
        g = self.levels[entry]
        if self.signs == NONE:
            return g + shift[:, None], entry[:, :, None]
        odd = None if odd is None else odd[:, None]
        return _signed(g, y[:, None], b[:, None], odd), entry[:, :, None]

    def _halves(self, y: Tensor, b: Tensor, odd: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best entry of either half, with `odd` in two ways: [rows, ways, 8 or 2]."""
        own, parts = self.own.view(2, -1), b.view(len(b), 2, -1)
        free, paid = [], []
        for i in range(2):
            gain = parts[:, i] @ self.levels.T - self.levels.square() @ own[i]
            free.append(gain.argmax(1))
            if odd is not None:
                paid.append((gain - 2 * _cheapest(self.levels, parts[:, i])).argmax(1))
        ways = [(free[0], free[1])]
        if odd is not None:  # where the wrong sign goes
            ways = [
                (torch.where(odd, paid[0], free[0]), free[1]),
                (free[0], torch.where(odd, paid[1], free[1])),
            ]
        entry = torch.stack([torch.stack(way, 1) for way in ways], 1)
        y, g = y.view(len(y), 1, 2, -1), self.levels[entry]
        wrong = torch.eye(2, dtype=torch.bool, device=y.device)
        turned = None if odd is None else odd[:, None, None] & wrong
        return _signed(g, y, parts[:, None], turned).flatten(2), entry

    def _turn_signs(self, u: Tensor, g: Tensor) -> Tensor:
        """`g` with one sign, or two, changed as long as that lowers the cost."""
        diagonal = torch.eye(GROUP, dtype=torch.bool, device=u.device)
        for _ in range(GROUP):
            change = 4 * g * (g * self.own + (u - g) @ self.metric)
            pairs = change[:, :, None] + change[:, None]
            pairs = pairs + 8 * self.metric * g[:, :, None] * g[:, None]
            alone = torch.inf if self.signs == EVEN else change[:, :, None]
            least, at = torch.where(diagonal, alone, pairs).flatten(1).min(1)
            pays = least < 0
            if not bool(pays.any()):
                break
            turned = (diagonal[at // GROUP] | diagonal[at % GROUP]) & pays[:, None]
            g = torch.where(turned, -g, g)
        return g


def _cheapest(levels: Tensor, b: Tensor) -> Tensor:
    """The least product over an entry's places, f32[rows, entries]."""
    least = levels[:, 0] * b[:, :1]
    for j in range(1, levels.shape[1]):
        least = torch.minimum(least, levels[:, j] * b[:, j : j + 1])
    return least


def _signed(g: Tensor, y: Tensor, b: Tensor, odd: Tensor | None) -> Tensor:
    """Levels with the signs of y, the cheapest one turned where `odd`."""
    signed = torch.where(y < 0, -g, g)
    if odd is None:
        return signed
    place = (g * b).argmin(-1, keepdim=True)
    turned = torch.arange(g.shape[-1], device=g.device) == place
    return torch.where(turned & odd[..., None], -signed, signed)


def round_entries(
    z: Tensor, ref: Tensor, scale: Tensor, shape: tuple[int, int, bool], levels: Tensor,
    metric: Tensor, couple: Tensor, n_scans: int, keep: bool, entries: Tensor, marks: Tensor,
) -> Tensor:  # fmt: skip
    """Choose entries of a codebook, groups of 8 columns one after the other; gives their values.

    As `kernels.feedback.round_entries` on tensors of one device, but levels f32[entries, places],
    metric f32[n / 8, 8, 8] and entries of any type of integer. Changes z, entries and marks.
    """
    n = z.shape[1]
    places, signs, free_shift = shape
    sub, per = n // scale.shape[1], GROUP // places
    chosen = torch.empty_like(z)
    bit = torch.arange(GROUP, device=z.device)
    for k in range(n // GROUP):
        columns, group = slice(k * GROUP, (k + 1) * GROUP), _Group(levels, metric[k], signs)
        s = scale[:, k * GROUP // sub, None]
        inverse = torch.where(s != 0, 1 / s, 0.0)
        u = (z[:, columns] * inverse).nan_to_num(0.0).clamp(-_FAR, _FAR)
        g, entry, mark = _choose(group, u, n_scans, free_shift, marks[:, k])
        if signs != NONE:
            mark = ((g < 0).int() << bit).sum(1).to(torch.uint8)
        values, old = s * g, ref[:, columns]
        if keep:
            stays = group.cost(u, old * inverse) <= group.cost(u, g)
            values = torch.where(stays[:, None], old, values)
            mark = torch.where(stays, marks[:, k], mark)
            entry = torch.where(stays[:, None], entries[:, k * per : (k + 1) * per], entry)
        chosen[:, columns], marks[:, k] = values, mark
        entries[:, k * per : (k + 1) * per] = entry
        z[:, columns.stop :] += (old - values) @ couple[columns, columns.stop :]
    return chosen


def _choose(
    group: _Group, u: Tensor, n_scans: int, free_shift: bool, mark: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, entries, mark); a mark of 1 is a shift of -1/8, where the shift is free too."""
    shift = torch.where(mark == 1, -_EIGHTH, _EIGHTH)[:, None]
    g, entry, cost = group.choose(u, n_scans, shift)
    if free_shift:
        other, there, lower = group.choose(u, n_scans, -shift)
        better = lower < cost
        g = torch.where(better[:, None], other, g)
        entry = torch.where(better[:, None], there, entry)
        mark = torch.where(better, 1 - mark, mark)
    return g, entry, mark
