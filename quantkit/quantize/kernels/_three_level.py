"""Search of codebooks with three levels and eight places, from free rounding outwards.

Round each of the eight weights of a group to the nearest of the three levels, as if every
combination were an entry. What a place loses by taking its second nearest level instead is its
regret. The best entry hardly ever differs from free rounding in more than the places of least
regret and one other, so all of these are tried: every subset of the `depth` least regretted
places, with and without one place more. A table tells for each combination of levels which single
steps from it lead to an entry, so that one look-up tries all eight.

Eight groups run side by side, one of each of the eight blocks of a tile: element p of block b lies
at `8 * p + b`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.quantize.grids import grid
from quantkit.quantize.kernels._common import helper, inlined
from quantkit.quantize.kernels._scales import LANES, take
from quantkit.quantize.kernels._simd import (
    absolute,
    bits_of,
    float_of,
    fma,
    load8,
    lookup8,
    maximum,
    minimum,
    select,
    splat8,
    store,
)

PLACES = 8
POWERS = (3 ** np.arange(PLACES)).astype(np.int32)
IS_ENTRY = 16  # bit of `steps_table`
NEVER = np.int32(0x7F000000)  # a regret beyond all others


@cache
def levels_of(type_name: str) -> npt.NDArray[np.float32]:
    """The three levels of a codebook, rising."""
    return np.unique(grid(type_name))


@cache
def entry_table(type_name: str) -> npt.NDArray[np.int16]:
    """For each of the 3^8 combinations of levels (first place = lowest digit): its entry.

    Where a combination is not in the codebook, the entry nearest to it.
    """
    points = grid(type_name)
    free = levels_of(type_name)[np.arange(3**PLACES)[:, np.newaxis] // POWERS % 3]
    table = ((points**2).sum(1) - 2 * free @ points.T).argmin(1).astype(np.int16)
    table.setflags(write=False)
    return table


@cache
def steps_table(type_name: str) -> npt.NDArray[np.int32]:
    """For each combination of levels, bit 2 j + up: is it an entry after a step at place j?

    Bit `IS_ENTRY`: it is one itself.
    """
    points = grid(type_name)
    digits = np.searchsorted(levels_of(type_name), points)
    is_entry = np.zeros(3**PLACES, np.int32)
    is_entry[digits @ POWERS] = 1
    code = np.arange(3**PLACES)
    table = is_entry << IS_ENTRY
    for j, power in enumerate(POWERS):
        for up, limit in ((0, 0), (1, 2)):
            there = np.where(code // power % 3 == limit, code, code + (2 * up - 1) * power)
            table |= np.where(there == code, 0, is_entry[there]) << (2 * j + up)
    table.setflags(write=False)
    return table


@helper
def new_room(depth: int) -> Any:
    """Working space of `find`."""
    sets = LANES << depth
    return (
        np.empty(LANES * PLACES, np.int32),
        np.empty(LANES * PLACES, np.int32),
        np.empty(sets, np.float32),
        np.empty(sets, np.int32),
        np.empty(sets, np.int32),
    )


@inlined
def _change(key: Any, powers: Any) -> Any:
    """What the step named in a key's low bits adds to the code."""
    power = lookup8(powers, (key >> np.int32(1)) & np.int32(7))
    return select((key & np.int32(1)) == np.int32(0), np.int32(0) - power, power)


@inlined
def _round_freely(
    w: np.ndarray, u: np.ndarray, at: int, s: Any, levels: Any, keys: np.ndarray, shifts: np.ndarray
) -> Any:
    """Free rounding: its code, what it saves, and what the worst entry would save at least.

    A key holds a place's regret, in its low bits the step 2 j + up; the shift brings that step's
    bit of `steps_table` to the top.
    """
    l0, l1, l2 = levels
    c1 = l1 - l0
    c2 = l2 - l1
    k1 = -(l1 + l0) * c1
    k2 = -(l2 + l1) * c2
    saved = splat8(np.float32(0.0))
    regrets = saved
    us = saved
    sws = saved
    code = splat8(np.int32(0))
    power = np.int32(1)
    for j in range(PLACES):
        i = at + LANES * j
        b = load8(u, i)
        sw = s * load8(w, i)
        d1 = fma(sw, k1, b * c1)  # level 1 saves so much more than level 0
        d2 = fma(sw, k2, b * c2)
        us = us + b
        sws = sws + sw
        saved = saved + (maximum(d2, np.float32(0.0)) - minimum(d1, np.float32(0.0)))
        code = code + select(d1 > np.float32(0.0), splat8(power), splat8(np.int32(0)))
        code = code + select(d2 > np.float32(0.0), splat8(power), splat8(np.int32(0)))
        d = select(absolute(d2) < absolute(d1), d2, d1)
        step = select(d <= np.float32(0.0), splat8(np.int32(2 * j + 1)), splat8(np.int32(2 * j)))
        d = absolute(d)
        regrets = regrets + d
        store(keys, LANES * j, (bits_of(d) & np.int32(-16)) | step)
        store(shifts, LANES * j, np.int32(31) - step)
        power = np.int32(power * np.int32(3))
    saved = saved + (us - sws * l1) * l1
    return code, saved, saved - regrets


@inlined
def find(
    w: np.ndarray, u: np.ndarray, at: int, s: Any, levels: Any, tables: Any, depth: int, room: Any
) -> Any:
    """Entries for the eight groups from `at`, at scales `s`: (what they save, their codes).

    With u = 2 w x, an entry g saves b - s a as in `_scales`. `levels` are the three values
    that the codebook's digits stand for, rising.
    """
    steps, powers = tables
    keys, shifts, cost, code, closed = room
    free, saved, worst = _round_freely(w, u, at, s, levels, keys, shifts)
    store(cost, 0, splat8(np.float32(0.0)))
    store(code, 0, free)
    store(closed, 0, splat8(np.int32(-1)))
    last = splat8(np.int32(-1))
    n = LANES
    for _ in range(depth):
        key = splat8(NEVER)
        for j in range(0, LANES * PLACES, LANES):
            k = load8(keys, j)
            key = minimum(key, select(k > last, k, splat8(NEVER)))
        last = key
        regret = float_of(key & np.int32(-16))
        change = _change(key, load8(powers, 0))
        hole = splat8(np.int32(3)) << (key & np.int32(14))
        for t in range(0, n, LANES):
            store(cost, n + t, load8(cost, t) + regret)
            store(code, n + t, load8(code, t) + change)
            store(closed, n + t, load8(closed, t) - hole)
        n += n
    is_entry = (take(steps, free) >> np.int32(IS_ENTRY)) > np.int32(0)
    least = select(is_entry, splat8(np.float32(0.0)), splat8(np.float32(3e38)))
    chosen = free
    for t in range(0, n, LANES):
        base = load8(code, t)
        open_steps = take(steps, base) & load8(closed, t)
        key = splat8(NEVER)
        for j in range(0, LANES * PLACES, LANES):
            there = (open_steps << load8(shifts, j)) < np.int32(0)
            key = minimum(key, select(there, load8(keys, j), splat8(NEVER)))
        c = load8(cost, t) + float_of(key & np.int32(-16))
        better = c < least
        least = select(better, c, least)
        chosen = select(better, base + _change(key, load8(powers, 0)), chosen)
    # Hardly ever is none of them an entry.
    none = least >= float_of(splat8(NEVER))
    chosen = select(none, free, chosen)
    return select(none, worst, saved - least), chosen
