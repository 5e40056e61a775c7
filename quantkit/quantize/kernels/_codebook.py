"""Exhaustive search of a codebook, eight entries side by side.

Codebooks lie transposed: level j of entry i at `levels[j * n + i]`. With the two products
a = sum w g^2 and b = sum u g, u = 2 w |x|, of a group with every entry, an entry saves s (b - s a)
at scale s; see `_scales`. A wrong sign at place j takes 2 u_j g_j from b: where the number of minus
signs must be even and is odd, each entry pays for its cheapest wrong sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.kernels._common import helper, inlined
from quantkit.quantize.kernels._scales import LANE, LANES, LOWEST
from quantkit.quantize.kernels._simd import (
    fma,
    largest,
    load8,
    maximum,
    minimum,
    select,
    splat8,
    store,
)


@helper
def products4(u: np.ndarray, at: int, levels: np.ndarray, out: np.ndarray, to: int) -> None:
    """out[to + i] = sum over j < 4 of u[at + j] * level j of entry i."""
    n = levels.size // 4
    u0, u1, u2, u3 = u[at], u[at + 1], u[at + 2], u[at + 3]
    for i in range(0, n, LANES):
        v = load8(levels, i) * u0
        v = fma(load8(levels, i + n), u1, v)
        v = fma(load8(levels, i + 2 * n), u2, v)
        store(out, to + i, fma(load8(levels, i + 3 * n), u3, v))


@helper
def products8(u: np.ndarray, at: int, levels: np.ndarray, out: np.ndarray, to: int) -> None:
    """out[to + i] = sum over j < 8 of u[at + j] * level j of entry i."""
    n = levels.size // 8
    u0, u1, u2, u3 = u[at], u[at + 1], u[at + 2], u[at + 3]
    u4, u5, u6, u7 = u[at + 4], u[at + 5], u[at + 6], u[at + 7]
    for i in range(0, n, LANES):
        v = load8(levels, i) * u0
        v = fma(load8(levels, i + n), u1, v)
        v = fma(load8(levels, i + 2 * n), u2, v)
        v = fma(load8(levels, i + 3 * n), u3, v)
        v = fma(load8(levels, i + 4 * n), u4, v)
        v = fma(load8(levels, i + 5 * n), u5, v)
        v = fma(load8(levels, i + 6 * n), u6, v)
        store(out, to + i, fma(load8(levels, i + 7 * n), u7, v))


@helper
def flips4(
    u: np.ndarray, at: int, levels: np.ndarray, b: np.ndarray, out: np.ndarray, to: int
) -> None:
    """out[to + i] = b[to + i] less what one wrong sign among 4 costs entry i at least."""
    n = levels.size // 4
    u0, u1, u2, u3 = u[at], u[at + 1], u[at + 2], u[at + 3]
    for i in range(0, n, LANES):
        v = minimum(load8(levels, i) * u0, load8(levels, i + n) * u1)
        v = minimum(v, load8(levels, i + 2 * n) * u2)
        v = minimum(v, load8(levels, i + 3 * n) * u3)
        store(out, to + i, fma(v, np.float32(-2.0), load8(b, to + i)))


@helper
def flips8(
    u: np.ndarray, at: int, levels: np.ndarray, b: np.ndarray, out: np.ndarray, to: int
) -> None:
    """out[to + i] = b[to + i] less what one wrong sign among 8 costs entry i at least."""
    n = levels.size // 8
    u0, u1, u2, u3 = u[at], u[at + 1], u[at + 2], u[at + 3]
    u4, u5, u6, u7 = u[at + 4], u[at + 5], u[at + 6], u[at + 7]
    for i in range(0, n, LANES):
        v = minimum(load8(levels, i) * u0, load8(levels, i + n) * u1)
        v = minimum(v, load8(levels, i + 2 * n) * u2)
        v = minimum(v, load8(levels, i + 3 * n) * u3)
        v = minimum(v, load8(levels, i + 4 * n) * u4)
        v = minimum(v, load8(levels, i + 5 * n) * u5)
        v = minimum(v, load8(levels, i + 6 * n) * u6)
        v = minimum(v, load8(levels, i + 7 * n) * u7)
        store(out, to + i, fma(v, np.float32(-2.0), load8(b, to + i)))


@helper
def sample(
    a: np.ndarray,
    b: np.ndarray,
    at: int,
    n: int,
    first: Any,
    step: Any,
    out: np.ndarray,
    to: int,
    n_samples: int,
) -> None:
    """out[to + k] = largest b - s a among the n entries from `at`, at s = first + k * step."""
    for k in range(0, n_samples, 4):
        s0 = -(first + np.float32(k) * step)
        s1 = s0 - step
        s2 = s1 - step
        s3 = s2 - step
        v0 = splat8(LOWEST)
        v1 = v0
        v2 = v0
        v3 = v0
        for i in range(at, at + n, LANES):
            p = load8(a, i)
            q = load8(b, i)
            v0 = maximum(v0, fma(p, s0, q))
            v1 = maximum(v1, fma(p, s1, q))
            v2 = maximum(v2, fma(p, s2, q))
            v3 = maximum(v3, fma(p, s3, q))
        out[to + k] = largest(v0)
        out[to + k + 1] = largest(v1)
        out[to + k + 2] = largest(v2)
        out[to + k + 3] = largest(v3)


@helper
def pick(a: np.ndarray, b: np.ndarray, at: int, n: int, s: Any) -> Any:
    """The largest b - s a among the n entries from `at`, and the first entry that has it."""
    best = splat8(LOWEST)
    entry = load8(LANE, 0)
    where = entry
    for i in range(at, at + n, LANES):
        v = fma(load8(a, i), -s, load8(b, i))
        where = select(v > best, entry, where)
        best = maximum(v, best)
        entry = entry + np.int32(LANES)
    top = largest(best)
    before_end = select(best == top, np.int32(n) - where, splat8(np.int32(0)))
    return top, np.int32(n) - largest(before_end)


@helper
def cheapest_place(u: np.ndarray, at: int, levels: np.ndarray, places: int, entry: int) -> int:
    """Where among the group's places a wrong sign costs an entry least."""
    n = levels.size // places
    least = u[at] * levels[entry]
    place = 0
    for j in range(1, places):
        cost = u[at + j] * levels[j * n + entry]
        if cost < least:
            least = cost
            place = j
    return place


@inlined
def sign_bits(x: np.ndarray, at: int) -> int:
    """Bit j set where x[at + j] < 0, j < 8."""
    bits = 0
    for j in range(8):
        bits |= (x[at + j] < 0) << j
    return bits


@inlined
def is_odd(bits: int) -> bool:
    """Whether an odd number of the 8 low bits is set."""
    bits ^= bits >> 4
    bits ^= bits >> 2
    return ((bits ^ (bits >> 1)) & 1) == 1
