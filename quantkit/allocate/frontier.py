"""What every size costs at least: the whole front, for a drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np

from quantkit.allocate.choices import Group
from quantkit.allocate.hull import Upgrades, efficient
from quantkit.allocate.solve import solve


@dataclass(frozen=True, slots=True)
class Point:
    """An assignment's bytes, as the groups count them, and its cost.

    `corner`: it lies on the convex hull of the front.
    """

    n_bytes: int
    cost: float
    corner: bool


def corners(groups: Sequence[Group]) -> tuple[Point, ...]:
    """The corners of the front's convex hull, from the smallest assignment to the cheapest one.

    Each is the cheapest assignment of its size. They come from one sort, so all of them are at
    hand in milliseconds; between two neighbours lies a single upgrade.
    """
    ordered = sorted(groups, key=lambda group: group.name)
    choices = [efficient(group.options) for group in ordered]
    steps = Upgrades.of(choices)
    n_bytes = sum(options[0].n_bytes for options in choices) + np.cumsum([0, *steps.n_bytes])
    cost = fsum(options[0].cost for options in choices) + np.cumsum([0.0, *steps.cost])
    return _falling(
        Point(n, c, corner=True) for n, c in zip(n_bytes.tolist(), cost.tolist(), strict=True)
    )


def frontier(groups: Sequence[Group], n_fill: int = 0) -> tuple[Point, ...]:
    """The corners, and optimal assignments at `n_fill` sizes spread evenly in log bytes.

    Sorted by bytes; each point costs less than all smaller ones.
    """
    points = {point.n_bytes: point for point in corners(groups)}
    smallest, largest = min(points), max(points)
    for budget in np.geomspace(max(1, smallest), max(1, largest), n_fill + 2)[1:-1]:
        found = solve(groups, max(smallest, int(budget)))
        points.setdefault(found.n_bytes, Point(found.n_bytes, found.cost, corner=False))
    return _falling(points[n_bytes] for n_bytes in sorted(points))


def _falling(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points by bytes, without those whose gain is lost in rounding."""
    front: list[Point] = []
    for point in points:
        if not front or point.cost < front[-1].cost:
            front.append(point)
    return tuple(front)
