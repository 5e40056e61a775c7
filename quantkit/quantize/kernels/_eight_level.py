"""Quick estimates for codebooks with eight evenly spaced levels and four places (IQ3_S).

What a scale can save is sampled far more often than entries are settled. Instead of trying all
entries, an estimate rounds the four weights of a group freely to levels 1, 3, .. 15 and looks up
which entries lie around: up to two steps away at one place, or one step at two places.

Eight groups run side by side, one of each of the eight blocks of a tile: element p of block b lies
at `8 * p + b`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from quantkit.quantize.grids import grid
from quantkit.quantize.kernels._common import helper, inlined
from quantkit.quantize.kernels._scales import LANES, take
from quantkit.quantize.kernels._simd import (
    as_i32,
    fma,
    load8,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    store,
)

PLACES = 4
LEVELS = 8
_STEPS = (-1, 1, -2, 2)
_PAIRS = [(i, j) for i in range(PLACES) for j in range(i + 1, PLACES)]


@cache
def neighbour_tables(
    type_name: str,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """For each combination of levels (first place = lowest octal digit), which moves give entries.

    The first table has bit 4 j + k for a move of `_STEPS[k]` at place j and bit 16 for none, the
    second bits 4 p + 2 k + m for moves of `_STEPS[k]`, `_STEPS[m]` at the places of `_PAIRS[p]`.
    """
    digits = (grid(type_name).astype(np.int32) - 1) // 2
    entries = np.zeros((LEVELS + 4,) * PLACES, np.int32)  # two levels of margin on each side
    entries[tuple(digits.T + 2)] = 1

    def reached(move: dict[int, int]) -> npt.NDArray[np.int32]:
        starts = (2 + move.get(j, 0) for j in range(PLACES))
        cut = entries[tuple(slice(start, start + LEVELS) for start in starts)]
        return cut.transpose(3, 2, 1, 0).ravel()

    one = reached({}) << 16
    for j in range(PLACES):
        for k, step in enumerate(_STEPS):
            one |= reached({j: step}) << (4 * j + k)
    two = np.zeros_like(one)
    for p, (i, j) in enumerate(_PAIRS):
        for k in range(2):
            for m in range(2):
                two |= reached({i: _STEPS[k], j: _STEPS[m]}) << (4 * p + 2 * k + m)
    return one, two


@inlined
def estimate(
    x: np.ndarray, w: np.ndarray, at: int, s: object, tables: object, costs: np.ndarray
) -> object:
    """What the best entries near free rounding of |x| save, b - s a as in `_scales`.

    `costs` is working space for 16 vectors.
    """
    one, two = tables  # type: ignore
    per_s = np.float32(0.5) / s  # type: ignore
    saved = splat8(np.float32(0.0))
    worst = saved
    code = splat8(np.int32(0))
    for j in range(PLACES):
        v = load8(x, at + LANES * j)
        digit = maximum(
            minimum(rint(fma(v, per_s, np.float32(-0.5))), np.float32(7.0)), np.float32(0.0)
        )
        level = digit + digit + np.float32(1.0)
        sw = s * load8(w, at + LANES * j)
        wv = load8(w, at + LANES * j) * v
        saved = fma(level, wv + wv - sw * level, saved)
        code = code + (as_i32(digit) << np.int32(3 * j))
        we = wv - sw * level
        # A step of k levels costs 4 s (k^2 sw - k we); the factor 4 s is applied in the end.
        store(costs, 4 * LANES * j, sw + we)
        store(costs, 4 * LANES * j + LANES, sw - we)
        store(costs, 4 * LANES * j + 2 * LANES, (sw + sw + we) * np.float32(2.0))
        store(costs, 4 * LANES * j + 3 * LANES, (sw + sw - we) * np.float32(2.0))
        worst = worst + maximum(sw + we, sw - we)
    mask = take(one, code)  # type: ignore
    least = select((mask >> np.int32(16)) > np.int32(0), splat8(np.float32(0.0)), worst)
    for k in range(4 * PLACES):
        reached = (mask << np.int32(31 - k)) < np.int32(0)
        least = minimum(least, select(reached, load8(costs, LANES * k), worst))
    mask = take(two, code)  # type: ignore
    bit = 31
    for i in range(PLACES):
        for j in range(i + 1, PLACES):
            for k in range(2):
                first = load8(costs, LANES * (4 * i + k))
                for m in range(2):
                    cost = first + load8(costs, LANES * (4 * j + m))
                    reached = (mask << np.int32(bit)) < np.int32(0)
                    least = minimum(least, select(reached, cost, worst))
                    bit -= 1
    return saved - np.float32(4.0) * least


@helper
def estimate_blocks(
    x: np.ndarray,
    w: np.ndarray,
    first: np.ndarray,
    step: np.ndarray,
    n_samples: int,
    tables: object,
    values: np.ndarray,
) -> None:
    """Samples v(s), see `_scales`, of blocks in tiles."""
    costs = np.empty(4 * PLACES * LANES, np.float32)
    size = x.size // first.size
    for k in range(n_samples):
        for block in range(0, first.size, LANES):
            s = fma(load8(step, block), np.float32(k), load8(first, block))
            v = splat8(np.float32(0.0))
            for at in range(block * size, (block + LANES) * size, LANES * PLACES):
                v = v + estimate(x, w, at, s, tables, costs)
            store(values, k * first.size + block, v)
