"""One type for every group, least total cost, within a number of bytes: exact.

A multiple-choice knapsack. On the lower convex hulls of the groups the relaxed problem, which may
mix two types in one group, is solved by taking upgrades in order of gain per byte. The search
decides group by group and carries all partial assignments that are not dominated. The relaxed cost
of the undecided groups in the bytes that are left bounds each of them from below and, rounded down
to whole upgrades, from above; what cannot beat the best known is dropped. Where more are left than
the width allows, the most promising stay, and the least bound of the others is what remains proven.
Passes of growing width follow each other until nothing is left to prove.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, inf, isfinite

import numpy as np

from quantkit.allocate.choices import Group, Option
from quantkit.allocate.hull import F64, I64, Upgrades, efficient
from quantkit.errors import UsageError
from quantkit.types import GgmlType

# States that each pass may keep, summed over its steps: the first finds a good assignment, the
# others prove it. The last is reached where nothing but whole sums decide, and takes seconds.
_PASSES = (1 << 15, 1 << 18, 1 << 20)
# Types that are tried, each time that one is to be given up.
_TRIES = 3
# Costs closer than this share of all cost at stake are the same: sums of f64 are no finer.
_RESOLUTION = 1e-12


@dataclass(frozen=True)
class Allocation:
    """One option for every group, by name. No assignment in as many bytes costs less than `bound`.

    `n_bytes` and `cost` are sums over the groups.
    """

    groups: tuple[Group, ...]
    options: Mapping[str, Option]
    bound: float

    @property
    def n_bytes(self) -> int:
        """Bytes of all groups, padding included."""
        return sum(option.n_bytes for option in self.options.values())

    @property
    def cost(self) -> float:
        """Predicted cost."""
        return fsum(option.cost for option in self.options.values())

    @property
    def gap(self) -> float:
        """How much cheaper an assignment could be at most; 0 where this one is proven optimal.

        Where distinct types were penalised, what their fewness costs is in it.
        """
        return max(0.0, self.cost - self.bound)

    def types(self) -> dict[str, GgmlType]:
        """Type by tensor."""
        return {
            tensor: self.options[group.name].type
            for group in self.groups
            for tensor in group.tensors
        }


def solve(groups: Sequence[Group], budget: int, *, type_penalty: float = 0.0) -> Allocation:
    """The cheapest assignment in at most `budget` bytes.

    Deterministic and independent of the order of groups and options; what is equal in cost and
    bytes is decided by names. `type_penalty` is a cost per distinct type in use: one type after the
    other is then given up, those first that are missed least, as long as that lowers cost plus
    penalties. This is a descent; only without a penalty is the result the optimum.
    Raises `UsageError` where nothing fits and for groups that make no sense.
    """
    ordered = tuple(sorted(groups, key=lambda group: group.name))
    _check(ordered, type_penalty)
    best = _solve(ordered, budget)
    while type_penalty > 0:
        tries = (_without(best, type_, budget) for type_ in _dispensable(best, budget))
        before = _penalised(best, type_penalty)
        fewer = next((t for t in tries if t and _penalised(t, type_penalty) < before), None)
        if fewer is None:
            break
        best = fewer
    return replace(best, groups=ordered)


def _check(groups: Sequence[Group], type_penalty: float) -> None:
    if not (isfinite(type_penalty) and type_penalty >= 0):
        raise UsageError(f"a penalty of {type_penalty} per type", hint="0 or more")
    for before, group in zip((None, *groups), groups, strict=False):
        if before is not None and before.name == group.name:
            raise UsageError("two groups have this name", where=group.name)
        if not group.options:
            raise UsageError("no type to choose from", where=group.name)
        if not all(isfinite(o.cost) and o.n_bytes >= 0 for o in group.options):
            raise UsageError("an option's cost or size is no number to add up", where=group.name)


def _dispensable(allocation: Allocation, budget: int) -> list[GgmlType]:
    """The types in use that are missed least, by what their groups would do at today's prices."""
    price = _price([efficient(group.options) for group in allocation.groups], budget)
    used = set(allocation.types().values())
    missed: dict[GgmlType, float] = {}
    for group in allocation.groups:
        own = allocation.options[group.name]
        others = (
            o.cost + price * o.n_bytes
            for o in group.options
            if o.type in used and o.type is not own.type
        )
        regret = min(others, default=inf) - own.cost - price * own.n_bytes
        missed[own.type] = missed.get(own.type, 0.0) + regret
    return sorted(missed, key=lambda t: (missed[t], t.name))[:_TRIES]


def _penalised(allocation: Allocation, type_penalty: float) -> float:
    return allocation.cost + type_penalty * len(set(allocation.types().values()))


def _without(allocation: Allocation, type_: GgmlType, budget: int) -> Allocation | None:
    """The best with the types in use but one, under the old bound; None where that cannot be."""
    left = set(allocation.types().values()) - {type_}
    groups = tuple(
        replace(group, options=tuple(o for o in group.options if o.type in left))
        for group in allocation.groups
    )
    if not all(group.options for group in groups) or _smallest(groups) > budget:
        return None
    return replace(_solve(groups, budget), bound=allocation.bound)


def _smallest(groups: Sequence[Group]) -> int:
    return sum(min(o.n_bytes for o in group.options) for group in groups)


def _solve(groups: tuple[Group, ...], budget: int) -> Allocation:
    smallest = _smallest(groups)
    if smallest > budget:
        raise UsageError(
            f"{budget:,} bytes are too few, the smallest assignment takes {smallest:,}",
            hint="raise the target, lower the floors, or allow smaller types",
        )
    # Groups with the largest steps first: the small ones then fill what is left.
    ranked = sorted(groups, key=lambda g: (-max(o.n_bytes for o in g.options), g.name))
    choices = [efficient(group.options) for group in ranked]
    best, bound = _refined(choices, budget)
    options = {group.name: option for group, option in zip(ranked, best, strict=True)}
    cost = fsum(option.cost for option in options.values())
    return Allocation(groups, options, min(bound, cost))


def _refined(choices: list[tuple[Option, ...]], budget: int) -> tuple[tuple[Option, ...], float]:
    """The best assignment, one option per group, and a lower bound on the cost of any."""
    at_stake = fsum(options[0].cost - options[-1].cost for options in choices)
    found, bound = _greedy(choices, budget), inf
    for n_states in _PASSES:
        choices = _reduced(choices, budget, found)
        search = _Search(choices, budget, found, _RESOLUTION * at_stake)
        found, bound = search.run(n_states)
        if bound == inf:  # nothing left that could be better
            break
    return found, bound


def _greedy(choices: list[tuple[Option, ...]], budget: int) -> tuple[Option, ...]:
    """Every upgrade that still fits, in order of gain per byte."""
    found = [options[0] for options in choices]
    room = budget - sum(option.n_bytes for option in found)
    stuck: set[int] = set()
    steps = Upgrades.of(choices)
    for group, option, n_bytes in zip(
        steps.owner.tolist(), steps.option.tolist(), steps.n_bytes.tolist(), strict=True
    ):
        if n_bytes > room:
            stuck.add(group)
        elif group not in stuck:
            room -= n_bytes
            found[group] = choices[group][option]
    return tuple(found)


def _reduced(
    choices: list[tuple[Option, ...]], budget: int, best: tuple[Option, ...]
) -> list[tuple[Option, ...]]:
    """`choices` without those that, at the relaxed problem's price of a byte, exceed `best`."""
    price = _price(choices, budget)
    priced = [[o.cost + price * o.n_bytes for o in options] for options in choices]
    least = [min(prices) for prices in priced]
    slack = fsum(o.cost for o in best) + price * budget - fsum(least)
    return [
        tuple(o for o, p in zip(options, prices, strict=True) if p <= low + slack or o is chosen)
        for options, prices, low, chosen in zip(choices, priced, least, best, strict=True)
    ]


def _price(choices: Sequence[tuple[Option, ...]], budget: int) -> float:
    """What a byte gains in the relaxed problem; 0 where every upgrade fits."""
    room = budget - sum(options[0].n_bytes for options in choices)
    steps = Upgrades.of(choices)
    n_whole = int(np.searchsorted(np.cumsum(steps.n_bytes), room, "right"))
    if n_whole == len(steps.n_bytes):
        return 0.0
    return -float(steps.cost[n_whole] / steps.n_bytes[n_whole])


class _Search:
    """One pass. Bytes and costs of states count from every group's smallest option."""

    def __init__(
        self,
        choices: Sequence[tuple[Option, ...]],
        budget: int,
        best: tuple[Option, ...],
        resolution: float,
    ) -> None:
        self._choices = choices
        self._open = [n for n, options in enumerate(choices) if len(options) > 1]
        self._room = budget - sum(options[0].n_bytes for options in choices)
        self._floor = fsum(options[0].cost for options in choices)
        self._resolution = resolution
        self._best = best
        self._least = fsum(option.cost for option in best) - self._floor
        self._dropped = inf
        self._trail: list[tuple[I64, I64]] = []  # by open group: states' parents, options

    def run(self, n_states: int) -> tuple[tuple[Option, ...], float]:
        """The best assignment, and the least cost that one which was not looked at may have."""
        steps = Upgrades.of(self._choices)
        width = n_states // max(1, len(self._open))
        n_bytes, cost = np.zeros(1, np.int64), np.zeros(1)
        for number in self._open:
            n_bytes, cost = self._extend(n_bytes, cost, self._choices[number])
            steps = steps.after(number)
            n_bytes, cost = self._prune(n_bytes, cost, steps, width)
            if not len(cost):
                break
        return self._best, self._dropped + self._floor

    def _extend(self, n_bytes: I64, cost: F64, options: Sequence[Option]) -> tuple[I64, F64]:
        """Every state with every option, less what is too large or dominated; sorted by bytes."""
        more = np.array([o.n_bytes - options[0].n_bytes for o in options])
        gain = np.array([o.cost - options[0].cost for o in options])
        all_bytes = (more[:, None] + n_bytes).ravel()
        all_costs = (gain[:, None] + cost).ravel()
        order = np.argsort(all_bytes, kind="stable")
        order = order[: np.searchsorted(all_bytes[order], self._room, "right")]
        ranked = all_costs[order]
        before = np.minimum.accumulate(np.concatenate(([inf], ranked)))[:-1]
        order = order[ranked < before]
        chosen = all_bytes[order]
        order = order[np.append(chosen[1:] != chosen[:-1], True)]
        option, parent = np.divmod(order, len(cost))
        self._trail.append((parent, option))
        return all_bytes[order], all_costs[order]

    def _prune(self, n_bytes: I64, cost: F64, steps: Upgrades, width: int) -> tuple[I64, F64]:
        """Keep the states that may lead to something better, at most `width`."""
        taken_bytes = np.concatenate(([0], np.cumsum(steps.n_bytes)))
        taken_costs = np.concatenate(([0.0], np.cumsum(steps.cost)))
        slopes = np.append(steps.cost / steps.n_bytes, 0.0)
        left = self._room - n_bytes
        n_whole = np.searchsorted(taken_bytes, left, "right") - 1
        whole = cost + taken_costs[n_whole]
        bounds = whole + (left - taken_bytes[n_whole]) * slopes[n_whole]
        first = int(np.argmin(whole))
        if whole[first] < self._least - self._resolution:
            self._least = float(whole[first])
            self._best = self._completed(first, steps, int(n_whole[first]))
        keep = np.flatnonzero(bounds < self._least - self._resolution)
        if len(keep) > width:
            ranked = keep[np.argsort(bounds[keep], kind="stable")]
            self._dropped = min(self._dropped, float(bounds[ranked[width]]))
            keep = np.sort(ranked[:width])
        parent, option = self._trail[-1]
        self._trail[-1] = parent[keep], option[keep]
        return n_bytes[keep], cost[keep]

    def _completed(self, state: int, steps: Upgrades, n_steps: int) -> tuple[Option, ...]:
        """The assignment of a state, with the first steps for the groups that it left open."""
        numbers = [0] * len(self._choices)
        for group, (parent, option) in reversed(list(zip(self._open, self._trail, strict=False))):
            numbers[group] = int(option[state])
            state = int(parent[state])
        for owner, option_number in zip(
            steps.owner[:n_steps].tolist(), steps.option[:n_steps].tolist(), strict=True
        ):
            numbers[owner] = option_number
        return tuple(options[n] for options, n in zip(self._choices, numbers, strict=True))
