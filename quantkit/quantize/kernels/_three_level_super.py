"""Super-blocks over three-level codebooks: IQ1_S, IQ1_M and, below effort `best`, IQ2_S."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.quantize.codec import Importance, Tile
from quantkit.quantize.grids import grid
from quantkit.quantize.kernels._common import WEIGHTINGS, helper, kernel
from quantkit.quantize.kernels._scales import (
    LANES,
    SUPER,
    choose_multipliers,
    find_sags,
    fit_parabolas,
    fit_unit,
    lay_samples,
    load_error_weights,
    load_importance,
    load_weights,
    storable,
    take,
    to_tiles,
)
from quantkit.quantize.kernels._simd import (
    absolute,
    as_f32,
    fma,
    load8,
    maximum,
    select,
    splat8,
    store,
    total,
)
from quantkit.quantize.kernels._three_level import (
    PLACES,
    POWERS,
    entry_table,
    find,
    levels_of,
    new_room,
    steps_table,
)

GROUPS = SUPER // PLACES
_GROUP = LANES * PLACES  # elements of a tile that hold one group of each of its blocks


@helper
def _settle(
    w: np.ndarray,
    u: np.ndarray,
    at: int,
    s: Any,
    code: Any,
    depth: int,
    room: Any,
    found: Any,
) -> Any:
    """Find the entries of a tile's blocks at scales `s`; gives v(s), see `_scales`.

    `found` receives entries and shifts, lane by lane, group g of the tile's blocks at 8 g.
    """
    levels, shifts, shared, tables = code
    space, value = room
    entry, shift, to, per = found
    n = shifts.size * per
    for i in range(n):
        by = shifts[i // per]
        shifted = (levels[0] + by, levels[1] + by, levels[2] + by)
        v, e = find(w, u, at + _GROUP * (i % per), s, shifted, tables, depth, space)
        store(value, LANES * i, v)
        if i < per:
            store(entry, to + LANES * i, e)
        else:
            store(shift, to + LANES * (i - per), e)
    saved = load8(value, 0)
    for g in range(1, per):
        saved = saved + load8(value, LANES * g)
    if shifts.size == 1:
        return saved
    # Which of two shifts is better, for a whole block or for each of its groups.
    ahead = splat8(np.float32(0.0))
    for g in range(per):
        gain = load8(value, LANES * (per + g)) - load8(value, LANES * g)
        ahead = ahead + (gain if shared else maximum(gain, np.float32(0.0)))
    for g in range(per):
        gain = ahead if shared else load8(value, LANES * (per + g)) - load8(value, LANES * g)
        second = gain > np.float32(0.0)
        i = to + LANES * g
        store(entry, i, select(second, load8(shift, i), load8(entry, i)))
        store(shift, i, select(second, splat8(np.int32(1)), splat8(np.int32(0))))
    return saved + maximum(ahead, np.float32(0.0))


@helper
def _sums(w: np.ndarray, u: np.ndarray, at: int, book: Any, shifts: np.ndarray, found: Any) -> Any:
    """a = sum w g^2 and b = sum u g of a tile's blocks with the entries found."""
    entry, shift, to, per = found
    points, table = book
    a = splat8(np.float32(0.0))
    b = a
    for g in range(per):
        e = take(table, load8(entry, to + LANES * g))
        store(entry, to + LANES * g, e)
        first = e * np.int32(PLACES)
        by = splat8(shifts[0])
        if shifts.size > 1:
            by = select(load8(shift, to + LANES * g) > np.int32(0), splat8(shifts[1]), by)
        for j in range(PLACES):
            i = at + _GROUP * g + LANES * j
            level = take(points, first + np.int32(j)) + by
            a = fma(load8(w, i) * level, level, a)
            b = fma(load8(u, i), level, b)
    return a, b


@helper
def _load(
    x: np.ndarray, at: int, q: np.ndarray, weigh: Any, signed: bool, size: int, tiles: Any
) -> Any:
    """Fill the tiles x, w, u = 2 w x of a super-block; gives its power of two, 0 if all zero."""
    weighting, c, v, natural = weigh
    tile, w, u = tiles
    power = load_weights(x, at, v)
    if power == 0:
        return power
    load_error_weights(v, q, weighting, c, natural)
    to_tiles(natural, size, w)
    to_tiles(v, size, tile)
    for i in range(0, SUPER, LANES):
        magnitude = load8(tile, i) if signed else absolute(load8(tile, i))
        store(u, i, (load8(w, i) + load8(w, i)) * magnitude)
    return power


@kernel
def search_three_level(
    x: np.ndarray,
    cols: int,
    importance: np.ndarray,
    weighting: Any,
    form: Any,
    code: Any,
    plan: Any,
    out: Any,
) -> None:
    """Scales and entries of every super-block of `x`, rows of `cols` weights one after another.

    weighting: (id, c) as in `load_error_weights`.
    form: (blocks per super-block, largest l, signed weights, stored scale / unit).
    code: (three levels, shifts of them to choose from, shift per block instead of per group,
    (entry_table, steps_table, powers), codebook with levels as stored).
    plan: (span and number of samples, depth there, depth of the last search, tries of the unit,
    rounds).
    out: zeroed scale bits u16, l u8, entries u16, shift index u8 for each super-block. Blocks lie
    as in tiles: 8 blocks side by side, group by group.
    """
    n_blocks, top, signed, factor = form
    levels, shifts, shared, tables, book = code
    span, n_samples, shallow, deep, tries, rounds = plan
    bits_out, l_out, entries_out, shift_out = out
    size = SUPER // n_blocks
    per = size // PLACES
    tiles = (np.empty(SUPER, np.float32), np.empty(SUPER, np.float32), np.empty(SUPER, np.float32))
    tile, w, u = tiles
    q = np.empty(SUPER, np.float32)
    weigh = (weighting[0], weighting[1], np.empty(SUPER, np.float32), np.empty(SUPER, np.float32))
    room = (new_room(max(shallow, deep)), np.empty(2 * GROUPS * LANES, np.float32))
    values = np.empty(n_samples * n_blocks, np.float32)
    sags = np.empty(n_samples * n_blocks, np.float32)
    first = np.empty(n_blocks, np.float32)
    step = np.empty(n_blocks, np.float32)
    best = np.empty(n_blocks, np.float32)
    bend = np.empty(n_blocks, np.float32)
    l = np.empty(n_blocks, np.int32)
    entry = np.empty(GROUPS, np.int32)
    shift = np.zeros(GROUPS, np.int32)
    choice = (levels, shifts, shared, tables)
    for column in range(0, cols, SUPER):
        load_importance(importance, column, q)
        for begin in range(column, x.size, cols):
            power = _load(x, begin, q, weigh, signed, size, tiles)
            if power == 0:
                continue
            lay_samples(tile, w, span, n_samples, first, step)
            for k in range(n_samples):
                for i in range(0, n_blocks, LANES):
                    s = fma(load8(step, i), np.float32(k), load8(first, i))
                    v = _settle(w, u, i * size, s, choice, shallow, room, (entry, shift, 0, per))
                    store(values, k * n_blocks + i, v)
            fit_parabolas(values, n_samples, first, step, best, bend)
            find_sags(values, n_blocks, n_samples, sags)
            unit, bits = storable(fit_unit(best, bend, tries, top), power, factor)
            most = np.float32(0.0)
            at = begin // SUPER
            for _ in range(rounds):
                if unit == 0:
                    break
                choose_multipliers(values, sags, n_samples, first, step, best, unit, top, l)
                bs = splat8(np.float32(0.0))
                aas = bs
                for i in range(0, n_blocks, LANES):
                    m = as_f32(load8(l, i))
                    m = m + m + np.float32(1.0)
                    found = (entry, shift, i * per, per)
                    _settle(w, u, i * size, m * unit, choice, deep, room, found)
                    a, b = _sums(w, u, i * size, book, shifts, found)
                    bs = fma(b, m, bs)
                    aas = fma(a * m, m, aas)
                b1 = total(bs)
                a1 = total(aas)
                unit, bits = storable(np.float32(0.5) * b1 / a1, power, factor)
                if unit * (b1 - unit * a1) > most:
                    most = unit * (b1 - unit * a1)
                    bits_out[at] = bits
                    for i in range(0, n_blocks, LANES):
                        store(l_out, at * n_blocks + i, load8(l, i))
                    for i in range(0, GROUPS, LANES):
                        store(entries_out, at * GROUPS + i, load8(entry, i))
                        store(shift_out, at * GROUPS + i, load8(shift, i))


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard to search: see `search_three_level`."""

    n_samples: int
    shallow: int
    deep: int
    rounds: int
    n_tries: int = 32


@dataclass(frozen=True, slots=True)
class ThreeLevelCode:
    """A type with a three-level codebook.

    `span` is where best scales lie, relative to magnitude / largest level; `factor` is
    stored scale / unit, `c` the constant of llama.cpp's error weights.
    """

    name: str
    n_blocks: int
    top: int
    shifts: tuple[float, ...]
    shared: bool
    span: tuple[float, float]
    factor: float
    c: float = 2.0

    def search(
        self, x: Tile, importance: Importance | None, weighting: str, plan: Plan
    ) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray, npt.NDArray]:
        """Per super-block of `x`: scale bits, l [.., blocks], entries, shift index [.., 32]."""
        supers = x.size // SUPER
        points = grid(self.name)
        levels = levels_of(self.name)
        shifts = np.array(self.shifts, np.float32)
        span = np.array(self.span, np.float32) / (levels[-1] + shifts.max())
        tries = np.geomspace(0.7, 1.6, plan.n_tries).astype(np.float32) / (2 * self.top + 1)
        tables = (steps_table(self.name), POWERS)
        bits = np.zeros(supers, np.uint16)
        l = np.zeros((supers, self.n_blocks), np.uint8)
        entries = np.zeros((supers, GROUPS), np.uint16)
        shift = np.zeros((supers, GROUPS), np.uint8)
        search_three_level(
            np.ascontiguousarray(x).reshape(-1),
            x.shape[1],
            np.ones(x.shape[1], np.float32) if importance is None else importance,
            (WEIGHTINGS[weighting], self.c),
            (self.n_blocks, np.float32(self.top), len(self.shifts) > 1, np.float32(self.factor)),
            (levels, shifts, self.shared, tables, (points.reshape(-1), entry_table(self.name))),
            (span, plan.n_samples, plan.shallow, plan.deep, tries, plan.rounds),
            (bits, l.reshape(-1), entries.reshape(-1), shift.reshape(-1)),
        )
        return bits, l, self._in_order(entries), self._in_order(shift)

    def _in_order(self, lanes: npt.NDArray) -> npt.NDArray:
        """From the order of tiles to that of the row."""
        tiles = lanes.reshape(len(lanes), self.n_blocks // LANES, -1, LANES)
        return tiles.swapaxes(-1, -2).reshape(lanes.shape)
