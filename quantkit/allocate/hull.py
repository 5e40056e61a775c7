"""What frontier and solver share: the options worth having, their hulls, and upgrades in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from quantkit.allocate.choices import Option

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


def efficient(options: Sequence[Option]) -> tuple[Option, ...]:
    """Options by bytes, without those that another one matches in fewer or as many bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.cost, o.type.name)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return tuple(kept)


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the efficient `options` on their lower convex hull, smallest first.

    The gain per byte falls strictly along it, as computed in f64.
    """
    corners: list[int] = []
    for index in range(len(options)):
        while len(corners) > 1 and _slope(options, corners[-1], index) <= _slope(
            options, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(index)
    return corners


@dataclass(frozen=True)
class Upgrades:
    """Steps along the hulls of all groups, the largest gain per byte first.

    Step i takes group `owner[i]` to its option `option[i]` for `n_bytes[i]` more; `cost[i]` < 0.
    The steps of one group come in the order of its hull.
    """

    owner: I64
    option: I64
    n_bytes: I64
    cost: F64

    @classmethod
    def of(cls, groups: Sequence[Sequence[Option]]) -> Upgrades:
        """Of groups of efficient options; equal gains come in the order of groups."""
        steps = [
            (number, above, options[above].n_bytes - options[below].n_bytes,
             options[above].cost - options[below].cost)
            for number, options in enumerate(groups)
            for below, above in pairwise(hull(options))
        ]  # fmt: skip
        steps.sort(key=lambda step: step[3] / step[2])
        owner, option, n_bytes, cost = zip(*steps, strict=True) if steps else ((), (), (), ())
        return cls(
            np.array(owner, np.int64),
            np.array(option, np.int64),
            np.array(n_bytes, np.int64),
            np.array(cost, np.float64),
        )

    def after(self, group: int) -> Upgrades:
        """Steps of the groups behind number `group`."""
        left = self.owner > group
        return Upgrades(self.owner[left], self.option[left], self.n_bytes[left], self.cost[left])


def _slope(options: Sequence[Option], below: int, above: int) -> float:
    a, b = options[below], options[above]
    return (b.cost - a.cost) / (b.n_bytes - a.n_bytes)
