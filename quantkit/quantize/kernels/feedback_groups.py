"""Codebook entries chosen with feedback: groups of 8 columns, one after the other; see `feedback`.

Every entry is compared with what a group aims at under the diagonal of its metric; the best of
every eighth are then compared under all of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.kernels._common import helper, kernel
from quantkit.quantize.kernels._scales import LANE, LANES, take
from quantkit.quantize.kernels._scan import first_lane, scan4, scan8, scan_shifts
from quantkit.quantize.kernels._simd import (
    fma,
    lane,
    load8,
    maximum,
    minimum,
    select,
    splat8,
    store,
    total,
)

GROUP = 8
FREE, EVEN, NONE = 0, 1, 2  # signs: any, an even number of minuses, part of the entries

_ZERO = np.float32(0.0)
_TWO = np.float32(2.0)
_EIGHTH = np.float32(0.125)
_MOST = np.float32(3e38)
_FAR = np.float32(1e4)  # in units of a scale: beyond every level of every codebook


@helper
def _slope(d: np.ndarray, metric: np.ndarray, first: int) -> Any:
    """S d, S = metric[first .. first + 64] symmetric."""
    v = load8(metric, first) * d[0]
    w = load8(metric, first + 8) * d[1]
    for j in range(2, GROUP, 2):
        v = fma(load8(metric, first + GROUP * j), d[j], v)
        w = fma(load8(metric, first + GROUP * j + 8), d[j + 1], w)
    return v + w


@helper
def _cost(u: np.ndarray, g: np.ndarray, metric: np.ndarray, first: int, d: np.ndarray) -> Any:
    """(u - g) S (u - g), u - g left in d."""
    lost = load8(u, 0) - load8(g, 0)
    store(d, 0, lost)
    return total(_slope(d, metric, first) * lost)


@helper
def _flip(
    u: np.ndarray, g: np.ndarray, metric: np.ndarray, first: int, even: bool, d: np.ndarray
) -> bool:
    """Change the sign, or the two signs, that lower the cost most; whether there are any."""
    lost, signed = load8(u, 0) - load8(g, 0), load8(g, 0)
    store(d, 0, lost)
    own = splat8(_ZERO)
    for j in range(GROUP):
        own = select(load8(LANE, 0) == np.int32(j), load8(metric, first + GROUP * j), own)
    change = signed * np.float32(4.0) * fma(signed, own, _slope(d, metric, first))
    store(d, 0, change)
    least = splat8(_ZERO)
    other = splat8(np.int32(-1))
    for j in range(GROUP):
        both = fma(load8(metric, first + GROUP * j) * signed, g[j] * np.float32(8.0), change + d[j])
        alone = select(load8(LANE, 0) == np.int32(j), change, both)
        v = select(load8(LANE, 0) == np.int32(j), splat8(_MOST), both) if even else alone
        other = select(v < least, splat8(np.int32(j)), other)
        least = minimum(v, least)
    i = first_lane(splat8(_ZERO) - least)
    j = lane(other, i)
    if j < 0:
        return False
    g[i] = -g[i]
    if j != i:
        g[j] = -g[j]
    return True


@helper
def _place(
    y: np.ndarray, b: np.ndarray, levels: np.ndarray, places: int, entry: int, first: int,
    odd: bool, g: np.ndarray,
) -> None:  # fmt: skip
    """g[first ..] = an entry with the signs of y, the cheapest one turned where `odd`."""
    n = levels.size // places
    least, place = _MOST, first
    for j in range(places):
        level = levels[j * n + entry]
        g[first + j] = -level if y[first + j] < _ZERO else level
        if b[first + j] * level < least:
            least, place = b[first + j] * level, first + j
    if odd:
        g[place] = -g[place]


@helper
def _best8(
    u: np.ndarray, y: np.ndarray, b: np.ndarray, levels: np.ndarray, found: np.ndarray, at: int,
    signs: tuple[int, bool], shift: np.float32, metric: np.ndarray, first: int, tile: np.ndarray,
) -> Any:  # fmt: skip
    """(least cost of the entries found[at .. at + 8], that entry)."""
    n = np.int32(levels.size // 8)
    entry = load8(found, at)
    for j in range(GROUP):
        level = take(levels, entry + np.int32(j) * n)
        store(tile, LANES * j, level)
    turned = splat8(np.int32(-1))
    if signs[1]:
        least = splat8(_MOST)
        for j in range(GROUP):
            p = load8(tile, LANES * j) * b[j]
            turned = select(p < least, splat8(np.int32(j)), turned)
            least = minimum(p, least)
    cost = splat8(_ZERO)
    for j in range(GROUP):
        level = load8(tile, LANES * j)
        if signs[0] == NONE:
            d = u[j] - (level + shift)
        else:
            signed = level if y[j] >= _ZERO else splat8(_ZERO) - level
            d = u[j] - select(turned == np.int32(j), splat8(_ZERO) - signed, signed)
        part = d * (np.float32(0.5) * metric[first + GROUP * j + j])
        for i in range(j):
            part = fma(load8(tile, LANES * i), metric[first + GROUP * j + i], part)
        store(tile, LANES * j, d)
        cost = fma(d, part, cost)
    i = first_lane(splat8(_ZERO) - cost)
    return _TWO * lane(cost, i), lane(entry, i)


@helper
def _search(
    y: np.ndarray, u: np.ndarray, shape: tuple[int, int], levels: np.ndarray, a: np.ndarray,
    metric: np.ndarray, group: int, minus: bool, both: bool, g: np.ndarray, entry: np.ndarray,
    space: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> Any:  # fmt: skip
    """Signed levels near y, of least cost to u; into g and entry. Gives the cost.

    With `both`, one scan serves both shifts: that of `minus` finds what the other left.
    """
    places, signs = shape
    b, found, tile, d = space
    first = group * GROUP * GROUP
    n_minus = 0
    for j in range(GROUP):
        n_minus += y[j] < _ZERO
        own = _TWO * metric[first + j * GROUP + j] * y[j]
        b[j] = own if signs == NONE else abs(own)
    odd = signs == EVEN and n_minus % 2 == 1
    if places == GROUP:
        n = levels.size // GROUP
        table = a[n:] if minus else a[:n]
        shift = _ZERO
        if signs == NONE:
            shift = -_EIGHTH if minus else _EIGHTH
        if not both:
            scan8(b, levels, table, odd, found)
        elif not minus:
            scan_shifts(b, levels, a, found)
        at = GROUP if both and minus else 0
        cost, entry[0] = _best8(
            u, y, b, levels, found, at, (signs, odd), shift, metric, first, tile
        )
        if signs == NONE:
            for j in range(GROUP):
                g[j] = levels[j * n + entry[0]] + shift
        else:
            _place(y, b, levels, GROUP, entry[0], 0, odd, g)
        return cost
    scan4(b, 0, levels, a, found)
    scan4(b, 4, levels, a, found[2:])
    if not odd:
        entry[0], entry[1] = found[0], found[2]
        _place(y, b, levels, 4, entry[0], 0, False, g)
        _place(y, b, levels, 4, entry[1], 4, False, g)
        return _cost(u, g, metric, first, d)
    _place(y, b, levels, 4, found[0], 0, False, tile)
    _place(y, b, levels, 4, found[3], 4, True, tile)
    _place(y, b, levels, 4, found[1], 0, True, g)
    _place(y, b, levels, 4, found[2], 4, False, g)
    right, left = _cost(u, tile, metric, first, d), _cost(u, g, metric, first, d)
    if left <= right:  # where the wrong sign goes
        entry[0], entry[1] = found[1], found[2]
        return left
    entry[0], entry[1] = found[0], found[3]
    g[:] = tile[:GROUP]
    return right


@helper
def _tabulate(
    levels: np.ndarray, places: int, metric: np.ndarray, first: int, shifted: bool, a: np.ndarray
) -> None:
    """a = sum w g^2 of every entry, of both halves of 8 or, `shifted`, for both shifts."""
    n = levels.size // places
    a[:] = _ZERO
    for j in range(GROUP):
        w = metric[first + j * (GROUP + 1)]
        at = 0 if shifted else j // places * n
        for i in range(n):
            level = levels[j % places * n + i]
            a[at + i] += w * level * level
            if shifted:
                a[n + i] += w * level
    if shifted:
        for i in range(n):
            lean = _TWO * _EIGHTH * a[n + i]
            a[n + i] = a[i] - lean
            a[i] += lean


@helper
def _push(
    z: np.ndarray, row: int, n: int, begin: int, lost: np.ndarray, couple: np.ndarray
) -> None:
    """z[row + begin + 8 .. row + n] += lost times the 8 rows of couple from `begin`."""
    for j in range(begin + GROUP, n, LANES):
        v = load8(z, row + j)
        w = load8(couple, begin * n + j) * lost[0]
        for i in range(1, GROUP - 1, 2):
            v = fma(load8(couple, (begin + i) * n + j), lost[i], v)
            w = fma(load8(couple, (begin + i + 1) * n + j), lost[i + 1], w)
        v = fma(load8(couple, (begin + GROUP - 1) * n + j), lost[GROUP - 1], v)
        store(z, row + j, v + w)


@helper
def _choose(
    u: np.ndarray, shape: tuple[int, int, bool], levels: np.ndarray, a: np.ndarray,
    metric: np.ndarray, group: int, n_scans: int, mark: np.uint8, best: np.ndarray,
    entry: np.ndarray, near: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    space: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> Any:  # fmt: skip
    """The levels of least cost to u that were found, into best and entry. Gives their mark."""
    places, signs, free_shift = shape
    y, g, trial, own, other = near
    d, first = space[3], group * GROUP * GROUP
    for j in range(GROUP):
        own[j] = metric[first + j * (GROUP + 1)]
    least = _MOST
    for turn in range(2 if free_shift else 1):
        minus = turn == 1 if free_shift else signs == NONE and mark == 1
        y[:] = u
        mine = _MOST
        for scan in range(n_scans):
            if scan:
                store(d, 0, load8(u, 0) - load8(g, 0))
                v = _slope(d, metric, first) / load8(own, 0)
                store(y, 0, load8(g, 0) + v)
            cost = _search(
                y, u, (places, signs), levels, a, metric, group, minus,
                free_shift and scan == 0, trial, other, space,
            )  # fmt: skip
            if signs != NONE:
                for _ in range(GROUP):  # rounding could turn signs to and fro for ever
                    if not _flip(u, trial, metric, first, signs == EVEN, d):
                        break
                cost = _cost(u, trial, metric, first, d)
            if not cost < mine:
                break
            mine = cost
            g[:] = trial
            if mine < least:
                least = mine
                best[:] = trial
                entry[:] = other
                if free_shift:
                    mark = np.uint8(minus)
    return mark if signs == NONE else _minuses(best)


@helper
def _minuses(g: np.ndarray) -> Any:
    """The byte of the signs of g."""
    bits = 0
    for j in range(GROUP):
        bits |= (g[j] < _ZERO) << j
    return np.uint8(bits)


@kernel
def round_entries(
    z: np.ndarray, ref: np.ndarray, scale: np.ndarray, shape: tuple[int, int, bool],
    levels: np.ndarray, metric: np.ndarray, couple: np.ndarray, n_scans: int, keep: bool,
    entries: np.ndarray, marks: np.ndarray, chosen: np.ndarray,
) -> None:  # fmt: skip
    """Choose entries of a codebook, groups of 8 columns one after the other.

    z, ref, chosen f32[rows, n]; scale f32[rows, n / sub]; shape (places of an entry, signs, whether
    the shift of every group is free); levels f32[places * entries], level j of entry i at
    j * entries + i; metric f32[n / 8 * 64]; couple f32[n, n]; entries u16[rows, n / places]; marks
    u8[rows, n / 8], bytes of signs, or 1 for a shift of -1/8 in books with signs of their own.
    After a first scan of all entries others look at what is best given the rest of the group.
    With `keep`, ref is what stands, and stays where nothing better is found. z is used up.
    """
    rows, n = z.shape
    places, signs, _ = shape
    sub, per = n // scale.shape[1], GROUP // places
    flat, rays = z.reshape(rows * n), couple.reshape(n * n)
    a = np.empty(levels.size // places * 2, np.float32)
    u, best, old = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
    lost, d, entry = np.empty(8, np.float32), np.empty(8, np.float32), np.zeros(2, np.int64)
    near = (
        np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32),
        np.empty(8, np.float32), np.zeros(2, np.int64),
    )  # fmt: skip
    space = (np.empty(8, np.float32), np.zeros(16, np.int32), np.empty(64, np.float32), d)
    for group in range(n // GROUP):
        begin, first = group * GROUP, group * GROUP * GROUP
        _tabulate(levels, places, metric, first, signs == NONE, a)
        for r in range(rows):
            s = scale[r, begin // sub]
            inverse = np.float32(1.0) / s if s != _ZERO else _ZERO
            v = load8(flat, r * n + begin) * inverse
            store(u, 0, minimum(maximum(v, -_FAR), _FAR))
            mark = _choose(
                u, shape, levels, a, metric, group, n_scans, marks[r, group], best, entry, near,
                space,
            )  # fmt: skip
            if keep:
                store(old, 0, load8(ref[r], begin) * inverse)
                if _cost(u, old, metric, first, d) <= _cost(u, best, metric, first, d):
                    chosen[r, begin : begin + GROUP] = ref[r, begin : begin + GROUP]
                    continue
            marks[r, group] = mark
            for i in range(per):
                entries[r, group * per + i] = entry[i]
            for j in range(GROUP):
                chosen[r, begin + j] = s * best[j]
                lost[j] = ref[r, begin + j] - chosen[r, begin + j]
            _push(flat, r * n, n, begin, lost, rays)
