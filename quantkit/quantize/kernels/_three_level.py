"""Search of codebooks with three levels and eight places, from free rounding outwards.

Round each of the eight weights of a group to the nearest of the three levels, as if every
combination were in the codebook. What a place loses by taking its second nearest level instead is
its regret. The cheapest entry differs from free rounding in few places of small regret, so with
the places sorted by regret it is enough to try sets of low ranks (`deviations`), and to look up in
a table of all 3^8 combinations which of them are entries.

Eight groups run side by side, one of each of the eight blocks of a tile: element p of block b lies
at `8 * p + b`.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.quantize.grids import grid
from quantkit.quantize.kernels._common import helper
from quantkit.quantize.kernels._scales import LANES, LOWEST, take
from quantkit.quantize.kernels._simd import fma, load8, maximum, minimum, select, splat8, store

PLACES = 8
POWERS = (3 ** np.arange(PLACES)).astype(np.int32)


@cache
def combinations_table(type_name: str) -> npt.NDArray[np.int16]:
    """For each of the 3^8 combinations of levels (first place = lowest digit): its entry.

    A combination that is not in the codebook holds -1 - e for the nearest entry e instead.
    """
    points = grid(type_name)
    levels, digits = np.unique(points, return_inverse=True)
    codes = digits.reshape(points.shape) @ POWERS
    free = levels[np.arange(3**PLACES)[:, np.newaxis] // POWERS % 3]
    distance = (points**2).sum(1) - 2 * free @ points.T
    table = (-1 - distance.argmin(1)).astype(np.int16)
    table[codes] = np.arange(len(points))
    table.setflags(write=False)
    return table


@cache
def deviations(reach: int) -> npt.NDArray[np.int32]:
    """Sets of ranks 1..8 that sum to at most `reach`, as (set without its last rank, last rank).

    Row i describes set i; row 0 is the empty set. Ranks count from 0 in the table.
    """
    sets = [s for n in range(PLACES + 1) for s in combinations(range(PLACES), n)]
    sets = sorted((s for s in sets if sum(s) + len(s) <= reach), key=lambda s: sum(s) + len(s))
    rows = [(sets.index(s[:-1]), s[-1]) if s else (0, 0) for s in sets]
    table = np.array(rows, np.int32)
    table.setflags(write=False)
    return table


@helper
def _order(r0: Any, d0: Any, r1: Any, d1: Any) -> Any:
    swap = r1 < r0
    return (
        minimum(r0, r1),
        select(swap, d1, d0),
        maximum(r0, r1),
        select(swap, d0, d1),
    )


@helper
def _sort(regret: np.ndarray, change: np.ndarray) -> None:
    """Sort eight (regret, change) pairs of vectors by regret: a network of 19 comparisons."""
    r0, r1, r2, r3 = load8(regret, 0), load8(regret, 8), load8(regret, 16), load8(regret, 24)
    r4, r5, r6, r7 = load8(regret, 32), load8(regret, 40), load8(regret, 48), load8(regret, 56)
    d0, d1, d2, d3 = load8(change, 0), load8(change, 8), load8(change, 16), load8(change, 24)
    d4, d5, d6, d7 = load8(change, 32), load8(change, 40), load8(change, 48), load8(change, 56)
    r0, d0, r2, d2 = _order(r0, d0, r2, d2)
    r1, d1, r3, d3 = _order(r1, d1, r3, d3)
    r4, d4, r6, d6 = _order(r4, d4, r6, d6)
    r5, d5, r7, d7 = _order(r5, d5, r7, d7)
    r0, d0, r4, d4 = _order(r0, d0, r4, d4)
    r1, d1, r5, d5 = _order(r1, d1, r5, d5)
    r2, d2, r6, d6 = _order(r2, d2, r6, d6)
    r3, d3, r7, d7 = _order(r3, d3, r7, d7)
    r0, d0, r1, d1 = _order(r0, d0, r1, d1)
    r2, d2, r3, d3 = _order(r2, d2, r3, d3)
    r4, d4, r5, d5 = _order(r4, d4, r5, d5)
    r6, d6, r7, d7 = _order(r6, d6, r7, d7)
    r2, d2, r4, d4 = _order(r2, d2, r4, d4)
    r3, d3, r5, d5 = _order(r3, d3, r5, d5)
    r1, d1, r4, d4 = _order(r1, d1, r4, d4)
    r3, d3, r6, d6 = _order(r3, d3, r6, d6)
    r1, d1, r2, d2 = _order(r1, d1, r2, d2)
    r3, d3, r4, d4 = _order(r3, d3, r4, d4)
    r5, d5, r6, d6 = _order(r5, d5, r6, d6)
    for at, r, d in (
        (0, r0, d0), (8, r1, d1), (16, r2, d2), (24, r3, d3),
        (32, r4, d4), (40, r5, d5), (48, r6, d6), (56, r7, d7),
    ):
        store(regret, at, r)
        store(change, at, d)


@helper
def find(
    x: np.ndarray, w: np.ndarray, u: np.ndarray, at: int, s: Any, levels: Any,
    table: np.ndarray, tries: np.ndarray, room: Any,
) -> Any:
    """Entries for eight groups at scales `s`, and what they save: (b - s a, entry).

    u = 2 w x; `levels` are the three values that the codebook's digits stand for, rising; `room`
    is working space, see `new_room`.
    """
    l0, l1, l2 = levels
    regret, change, cost, code = room
    s01 = s * (np.float32(0.5) * (l0 + l1))
    s12 = s * (np.float32(0.5) * (l1 + l2))
    s02 = s * (np.float32(0.5) * (l0 + l2))
    saved = splat8(np.float32(0.0))
    free = splat8(np.int32(0))
    power = np.int32(1)
    for j in range(PLACES):
        i = at + LANES * j
        v = load8(x, i)
        sw = s * load8(w, i)
        b = load8(u, i)
        low = v <= s01
        high = v > s12
        near = select(low, l0, select(high, splat8(l2), splat8(l1)))
        above = v > s02
        other = select(low | high, splat8(l1), select(above, splat8(l2), splat8(l0)))
        both = near + other
        store(regret, LANES * j, (near - other) * (b - sw * both))
        saved = fma(near, b - sw * near, saved)
        free = free + select(low, np.int32(0), select(high, splat8(power + power), splat8(power)))
        store(change, LANES * j, select(other > near, splat8(power), splat8(-power)))
        power = np.int32(power * 3)
    _sort(regret, change)
    store(cost, 0, splat8(np.float32(0.0)))
    store(code, 0, free)
    entry = take(table, free)
    least = select(entry >= np.int32(0), splat8(np.float32(0.0)), splat8(-LOWEST))
    entry = select(entry >= np.int32(0), entry, np.int32(-1) - entry)
    for k in range(1, tries.shape[0]):
        base = LANES * tries[k, 0]
        rank = LANES * tries[k, 1]
        c = load8(cost, base) + load8(regret, rank)
        n = load8(code, base) + load8(change, rank)
        store(cost, LANES * k, c)
        store(code, LANES * k, n)
        e = take(table, n)
        better = (e >= np.int32(0)) & (c < least)
        least = select(better, c, least)
        entry = select(better, e, entry)
    # Hardly ever is none of the sets an entry; then the last one's cost stands in for it.
    last = load8(cost, LANES * (tries.shape[0] - 1))
    return saved - select(least < -LOWEST, least, last), entry
