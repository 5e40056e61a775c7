"""Rounding with feedback inside a super-block: scales stand, codes are chosen one after the other.

Columns of a weight meet correlated inputs, so the error of one can be made good by the next. The
error x - x^ of every finished group of columns is added, times `couple`, to what the later ones
aim at:

    z_j += (ref_k - x^_k) couple[k, j],   k < j.

With ref = x and couple = the unit upper factor of the inputs' Gram matrix this is LDLQ (QuIP,
arXiv 2307.13304, 4.1); with ref = the codes so far and couple[k, j] = H_kj / H_jj it is one round
of coordinate descent on the same error (QuantEase, arXiv 2309.01885). A group of 8 that shares an
entry of a codebook is one column of vectors, and `metric` says what an error within it costs.
"""

from __future__ import annotations

import numpy as np

from quantkit.quantize.kernels._common import helper, kernel
from quantkit.quantize.kernels._scales import LANE, LANES, LOWEST
from quantkit.quantize.kernels._simd import (
    fma,
    lane,
    load8,
    minimum,
    select,
    splat8,
    store,
)

GROUP = 8
FREE, EVEN, NONE = 0, 1, 2  # signs: any, an even number of minuses, part of the entries

_ZERO = np.float32(0.0)
_TWO = np.float32(2.0)
_FOUR = np.float32(4.0)


@kernel
def round_levels(
    z: np.ndarray,
    ref: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    values: np.ndarray,
    couple: np.ndarray,
    codes: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """Choose among scale * values + offset; `values` ascend.

    z, ref, chosen f32[rows, n]; scale, offset f32[rows, n / sub]; couple f32[n, n]; codes u8[rows,
    n] are places in `values`. z is used up.
    """
    rows, n = z.shape
    sub = n // scale.shape[1]
    top = values.size - 1
    step = (values[top] - values[0]) / np.float32(top)
    even = True
    for i in range(top):
        even &= values[i + 1] - values[i] == step
    inverse_step = np.float32(1.0) / step
    for r in range(rows):
        for k in range(n):
            s, o = scale[r, k // sub], offset[r, k // sub]
            t = (z[r, k] - o) / s if s != _ZERO else _ZERO
            if even:
                i = int(np.rint(min(max((t - values[0]) * inverse_step, _ZERO), np.float32(top))))
            else:
                i = 0
                while i < top and t + t > values[i] + values[i + 1]:
                    i += 1
            codes[r, k] = i
            chosen[r, k] = s * values[i] + o
            lost = ref[r, k] - chosen[r, k]
            for j in range(k + 1, n):
                z[r, j] += lost * couple[k, j]


@helper
def _scan(
    u: np.ndarray, places: int, levels: np.ndarray, a: np.ndarray, at: int, odd: bool,
    best: np.ndarray, found: np.ndarray,
) -> None:  # fmt: skip
    """Into best[..8], found[..8]: the largest u . level - a of every eighth entry, and the entry.

    With `odd`, an entry pays for its cheapest wrong sign.
    """
    n = levels.size // places
    top = splat8(LOWEST)
    entry = load8(LANE, 0)
    where = entry
    for i in range(0, n, LANES):
        p = load8(levels, i) * u[0]
        v = p - load8(a, at + i)
        least = p
        for j in range(1, places):
            p = load8(levels, j * n + i) * u[j]
            v = v + p
            least = minimum(least, p)
        if odd:
            v = fma(least, np.float32(-2.0), v)
        better = v > top
        where = select(better, entry, where)
        top = select(better, v, top)
        entry = entry + np.int32(LANES)
    store(best, 0, top)
    for i in range(LANES):
        found[i] = lane(where, i)


@helper
def _cost(u: np.ndarray, g: np.ndarray, metric: np.ndarray, first: int) -> np.float32:
    """(u - g) S (u - g) of 8 places, S = metric[first .. first + 64]."""
    cost = _ZERO
    for i in range(GROUP):
        part = _ZERO
        for j in range(GROUP):
            part += metric[first + i * GROUP + j] * (u[j] - g[j])
        cost += part * (u[i] - g[i])
    return cost


@helper
def _flip(u: np.ndarray, g: np.ndarray, metric: np.ndarray, first: int, even: bool) -> bool:
    """Change the sign, or the two signs, that lower the cost most; whether there are any."""
    change = np.empty(GROUP, np.float32)
    for i in range(GROUP):
        part = _ZERO
        for j in range(GROUP):
            part += metric[first + i * GROUP + j] * (u[j] - g[j])
        change[i] = _FOUR * g[i] * (part + g[i] * metric[first + i * GROUP + i])
    least, one, other = _ZERO, -1, -1
    for i in range(GROUP):
        if not even and change[i] < least:
            least, one = change[i], i
        for j in range(i):
            both = change[i] + change[j]
            both += np.float32(8.0) * g[i] * g[j] * metric[first + i * GROUP + j]
            if both < least:
                least, one, other = both, i, j
    if one >= 0:
        g[one] = -g[one]
    if other >= 0:
        g[other] = -g[other]
    return one >= 0


@helper
def _place(
    y: np.ndarray, levels: np.ndarray, places: int, entry: int, first: int, odd: bool, g: np.ndarray
) -> None:
    """g[first ..] = an entry with the signs of y, the cheapest one turned where `odd`."""
    n = levels.size // places
    least, place = np.float32(3e38), first
    for j in range(places):
        level = levels[j * n + entry]
        g[first + j] = -level if y[first + j] < _ZERO else level
    if odd:
        for j in range(places):
            weight = abs(y[first + j]) * levels[j * n + entry]
            if weight < least:
                least, place = weight, first + j
        g[place] = -g[place]


@helper
def _search(
    y: np.ndarray,
    u: np.ndarray,
    shape: tuple[int, int],
    levels: np.ndarray,
    a: np.ndarray,
    w: np.ndarray,
    metric: np.ndarray,
    group: int,
    shift: np.float32,
    g: np.ndarray,
    entry: np.ndarray,
    space: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> np.float32:
    """Signed levels near y, of least cost to u; into g and entry. Gives the cost."""
    places, signs = shape
    b, best, found, trial = space
    n = levels.size // places
    first = group * GROUP * GROUP
    minuses = 0
    for j in range(GROUP):
        minuses += y[j] < _ZERO
    odd = signs == EVEN and minuses % 2 == 1
    least = np.float32(3e38)
    if places == GROUP:
        for j in range(GROUP):
            v = y[j] - shift if signs == NONE else abs(y[j])
            b[j] = _TWO * w[group * GROUP + j] * v
        _scan(b, GROUP, levels, a, group * n, odd, best, found)
        for i in range(LANES):
            if signs == NONE:
                for j in range(GROUP):
                    trial[j] = levels[j * n + found[i]] + shift
            else:
                _place(y, levels, GROUP, found[i], 0, odd, trial)
            cost = _cost(u, trial, metric, first)
            if cost < least:
                least = cost
                entry[0] = found[i]
                g[:] = trial
        return least
    halves = np.empty((2, 2), np.int64)
    for half in range(2):
        for j in range(4):
            b[j] = _TWO * w[group * GROUP + 4 * half + j] * abs(y[4 * half + j])
        for turned in range(1 + odd):
            _scan(b, 4, levels, a, (2 * group + half) * n, turned == 1, best, found)
            top = 0
            for i in range(1, LANES):
                if best[i] > best[top]:
                    top = i
            halves[half, turned] = found[top]
    for turned in range(1 + odd):  # where the wrong sign goes: to the left or to the right
        left = halves[0, 1 - turned if odd else 0]
        right = halves[1, turned if odd else 0]
        _place(y, levels, 4, left, 0, odd and turned == 0, trial)
        _place(y, levels, 4, right, 4, odd and turned == 1, trial)
        cost = _cost(u, trial, metric, first)
        if cost < least:
            least = cost
            entry[0], entry[1] = left, right
            g[:] = trial
    return least


@kernel
def round_entries(
    z: np.ndarray,
    ref: np.ndarray,
    scale: np.ndarray,
    shape: tuple[int, int, bool],
    levels: np.ndarray,
    metric: np.ndarray,
    couple: np.ndarray,
    n_scans: int,
    keep: bool,
    entries: np.ndarray,
    marks: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """Choose entries of a codebook, groups of 8 columns one after the other.

    z, ref, chosen f32[rows, n]; scale f32[rows, n / sub]; shape (places of an entry, signs, whether
    the shift of every group is free); levels f32[places * entries], level j of entry i at
    j * entries + i; metric f32[n / 8 * 64]; couple f32[n, n]; entries u16[rows, n / places]; marks
    u8[rows, n / 8], bytes of signs, or 1 for a shift of -1/8 in books with signs of their own.
    After a first scan of all entries others look at what is best given the rest of the group.
    With `keep`, ref is what stands, and stays where nothing better is found. z is used up.
    """
    rows, n = z.shape
    places, signs, free_shift = shape
    sub = n // scale.shape[1]
    n_groups, n_entries, per = n // GROUP, levels.size // places, GROUP // places
    w = np.empty(n, np.float32)
    a = np.zeros(n_groups * per * n_entries, np.float32)
    for k in range(n):
        w[k] = metric[k // GROUP * GROUP * GROUP + k % GROUP * (GROUP + 1)]
        for i in range(n_entries):
            level = levels[k % places * n_entries + i]
            a[k // places * n_entries + i] += w[k] * level * level
    u, y, z_g = (
        np.empty(GROUP, np.float32),
        np.empty(GROUP, np.float32),
        np.empty(GROUP, np.float32),
    )
    g, trial, lost = (
        np.empty(GROUP, np.float32),
        np.empty(GROUP, np.float32),
        np.empty(GROUP, np.float32),
    )
    entry, other = np.empty(2, np.int64), np.empty(2, np.int64)
    space = (
        np.empty(GROUP, np.float32),
        np.empty(GROUP, np.float32),
        np.empty(GROUP, np.int64),
        np.empty(GROUP, np.float32),
    )
    eighth = np.float32(0.125)
    for r in range(rows):
        for group in range(n_groups):
            begin = group * GROUP
            s = scale[r, begin // sub]
            first = group * GROUP * GROUP
            inverse = np.float32(1.0) / s if s != _ZERO else _ZERO
            for j in range(GROUP):
                u[j] = z[r, begin + j] * inverse
            mark = np.uint8(marks[r, group])
            least = np.float32(3e38)
            for turn in range(2 if free_shift else 1):
                minus = turn == 1 if free_shift else mark == 1
                shift = (-eighth if minus else eighth) if signs == NONE else _ZERO
                y[:] = u
                mine = np.float32(3e38)
                for scan in range(n_scans):
                    if scan:
                        for i in range(GROUP):
                            part = _ZERO
                            for j in range(GROUP):
                                part += metric[first + i * GROUP + j] * (u[j] - g[j])
                            own = metric[first + i * (GROUP + 1)]
                            y[i] = g[i] + part / own
                    cost = _search(
                        y, u, (places, signs), levels, a, w, metric, group, shift, trial, other,
                        space,
                    )  # fmt: skip
                    if not cost < mine:
                        break
                    mine = cost
                    if mine < least:
                        least = mine
                        z_g[:] = trial
                        entry[:] = other
                        if signs == NONE:
                            mark = np.uint8(minus)
                    g[:] = trial
            if signs != NONE:
                while _flip(u, z_g, metric, first, signs == EVEN):
                    pass
                bits = 0
                for j in range(GROUP):
                    bits |= (z_g[j] < _ZERO) << j
                mark = np.uint8(bits)
                least = _cost(u, z_g, metric, first)
            if keep:
                for j in range(GROUP):
                    g[j] = ref[r, begin + j] * inverse
            if keep and _cost(u, g, metric, first) <= least:
                for j in range(GROUP):
                    chosen[r, begin + j] = ref[r, begin + j]
                    lost[j] = _ZERO
                continue
            marks[r, group] = mark
            for i in range(per):
                entries[r, group * per + i] = entry[i]
            for j in range(GROUP):
                chosen[r, begin + j] = s * z_g[j]
                lost[j] = ref[r, begin + j] - chosen[r, begin + j]
            for i in range(GROUP):
                for j in range(begin + GROUP, n):
                    z[r, j] += lost[i] * couple[begin + i, j]
