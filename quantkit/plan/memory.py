"""What memory a conversion takes, and how it keeps to what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.errors import UsageError
from quantkit.plan.rounding import work
from quantkit.plan.tiles import TILE_WEIGHTS
from quantkit.quantize.codec import How
from quantkit.quantize.tiles import tile_bytes
from quantkit.run.events import size
from quantkit.types import Plan, PlannedTensor

# Smaller ones let an encoder's share for each call show: a tenth at this size, a fifth at half.
_SMALLEST_STRIP = 256 << 10
_SMALLEST_STREAM = 64 << 20  # hidden states in memory while weights are rounded by inputs


@dataclass(frozen=True, slots=True)
class Memory:
    """How tiles are made: in strips of so many weights (None: whole), within `n_bytes` at once.

    That many of the costliest tiles, one more than `n_threads`, or as many as the budget has room
    for. The process itself and the metadata of the checkpoint come on top.
    """

    how: How
    strip_weights: int | None
    n_bytes: int

    def of_tile(self, tensor: PlannedTensor) -> int:
        """Most bytes that one of the tensor's tiles takes."""
        return tile_bytes(tensor, self.how, self.strip_weights)


def fit(plans: Sequence[Plan], how: How, n_threads: int, budget: int | None) -> Memory:
    """Strips and bytes in flight for `n_threads` threads within `budget` bytes, or as they come.

    For the files of a job, which are written one after the other.

    Raises `UsageError` where not even one tile at a time fits. What is written is the same for all.
    """
    strip, peak = None, _peak(plans, how, None)[0]
    if budget is None:
        return Memory(how, None, (n_threads + 1) * peak)
    weights = TILE_WEIGHTS
    while (n_threads + 1) * peak > budget and weights > _SMALLEST_STRIP:
        weights //= 2
        strip, peak = weights, _peak(plans, how, weights)[0]
    if peak > budget:
        name = _peak(plans, how, strip)[1]
        raise UsageError(
            f"{size(budget)} of memory are too little: a tile of {name} takes {size(peak)}",
            hint=f"give --memory {-(-peak // 10**6)}MB or more",
        )
    return Memory(how, strip, min(budget, (n_threads + 1) * peak))


def hidden_states(plan: Plan, budget: int) -> int:
    """What rounding with feedback leaves of a budget for hidden states; the rest goes to disk.

    Raises `UsageError` where the moments and factors of the widest layer do not fit.
    """
    needed = work(plan, 0).n_bytes
    if budget < needed + _SMALLEST_STREAM:
        raise UsageError(
            f"{size(budget)} of memory are too little: rounding with feedback takes"
            f" {size(needed)} for the widest layer",
            hint=f"give --memory {-(-(needed + _SMALLEST_STREAM) // 10**6)}MB or more,"
            " or choose --rounding nearest",
        )
    return budget - needed


def _peak(plans: Sequence[Plan], how: How, strip_weights: int | None) -> tuple[int, str]:
    """Bytes of the costliest tile, and its tensor."""
    return max((tile_bytes(t, how, strip_weights), t.spec.name) for p in plans for t in p.tensors)
