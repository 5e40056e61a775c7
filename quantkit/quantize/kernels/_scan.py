"""One look at every entry of a codebook: the largest products with a group that is to be coded.

Level j of entry i lies at j * entries + i of `levels`; a holds what an entry costs by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.kernels._common import helper
from quantkit.quantize.kernels._scales import LANE, LANES, LOWEST
from quantkit.quantize.kernels._simd import (
    fma,
    lane,
    largest,
    load8,
    mask_bits,
    maximum,
    minimum,
    select,
    splat8,
    store,
)

_TWO = np.float32(2.0)


@helper
def scan8(b: np.ndarray, levels: np.ndarray, a: np.ndarray, odd: bool, found: np.ndarray) -> None:
    """found[..8]: of every eighth entry the one of largest b . level - a.

    With `odd`, an entry pays for its cheapest wrong sign.
    """
    n = levels.size // 8
    b0, b1, b2, b3, b4, b5, b6, b7 = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]
    top = splat8(LOWEST)
    entry = load8(LANE, 0)
    where = entry
    for i in range(0, n, LANES):
        p0, p1 = load8(levels, i) * b0, load8(levels, i + n) * b1
        if odd:
            p2, p3 = load8(levels, i + 2 * n) * b2, load8(levels, i + 3 * n) * b3
            p4, p5 = load8(levels, i + 4 * n) * b4, load8(levels, i + 5 * n) * b5
            p6, p7 = load8(levels, i + 6 * n) * b6, load8(levels, i + 7 * n) * b7
            v = ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)) - load8(a, i)
            least = minimum(minimum(p0, p1), minimum(p2, p3))
            least = minimum(least, minimum(minimum(p4, p5), minimum(p6, p7)))
            v = fma(least, -_TWO, v)
        else:
            v = p0 - load8(a, i)
            p1 = fma(load8(levels, i + 2 * n), b2, p1)
            v = fma(load8(levels, i + 3 * n), b3, v)
            p1 = fma(load8(levels, i + 4 * n), b4, p1)
            v = fma(load8(levels, i + 5 * n), b5, v)
            p1 = fma(load8(levels, i + 6 * n), b6, p1)
            v = fma(load8(levels, i + 7 * n), b7, v) + p1
        where = select(v > top, entry, where)
        top = maximum(v, top)
        entry = entry + np.int32(LANES)
    store(found, 0, where)


@helper
def scan_shifts(b: np.ndarray, levels: np.ndarray, a: np.ndarray, found: np.ndarray) -> None:
    """`scan8` for both shifts at once, by the two halves of `a` into the two of `found`."""
    n = levels.size // 8
    b0, b1, b2, b3, b4, b5, b6, b7 = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]
    top = splat8(LOWEST)
    below = top
    entry = load8(LANE, 0)
    where, there = entry, entry
    for i in range(0, n, LANES):
        v, w = load8(levels, i) * b0, load8(levels, i + n) * b1
        v = fma(load8(levels, i + 2 * n), b2, v)
        w = fma(load8(levels, i + 3 * n), b3, w)
        v = fma(load8(levels, i + 4 * n), b4, v)
        w = fma(load8(levels, i + 5 * n), b5, w)
        v = fma(load8(levels, i + 6 * n), b6, v)
        v = v + fma(load8(levels, i + 7 * n), b7, w)
        w = v - load8(a, n + i)
        v = v - load8(a, i)
        where = select(v > top, entry, where)
        top = maximum(v, top)
        there = select(w > below, entry, there)
        below = maximum(w, below)
        entry = entry + np.int32(LANES)
    store(found, 0, where)
    store(found, 8, there)


@helper
def scan4(b: np.ndarray, at: int, levels: np.ndarray, a: np.ndarray, found: np.ndarray) -> None:
    """Entries of four places of largest b . level - a, without and with a wrong sign."""
    n = levels.size // 4
    b0, b1, b2, b3 = b[at], b[at + 1], b[at + 2], b[at + 3]
    top = splat8(LOWEST)
    paid = top
    entry = load8(LANE, 0)
    where, there = entry, entry
    for i in range(0, n, LANES):
        p0, p1 = load8(levels, i) * b0, load8(levels, i + n) * b1
        p2, p3 = load8(levels, i + 2 * n) * b2, load8(levels, i + 3 * n) * b3
        v = (p0 + p1) + (p2 + p3) - load8(a, at // 4 * n + i)
        w = fma(minimum(minimum(p0, p1), minimum(p2, p3)), -_TWO, v)
        where = select(v > top, entry, where)
        top = maximum(v, top)
        there = select(w > paid, entry, there)
        paid = maximum(w, paid)
        entry = entry + np.int32(LANES)
    found[0] = lane(where, first_lane(top))
    found[1] = lane(there, first_lane(paid))


@helper
def first_lane(v: Any) -> int:
    """The first lane that holds the largest value; the last for NaN."""
    bits = mask_bits(v == largest(v))
    i = 0
    while i < LANES - 1 and not (bits >> i) & 1:
        i += 1
    return i
