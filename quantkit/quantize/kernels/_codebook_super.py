"""Super-blocks by exhaustive search: IQ2_XXS, IQ2_XS, IQ3_XXS, IQ3_S and, at `best`, IQ2_S."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.quantize.codec import Importance, Tile
from quantkit.quantize.grids import lanes
from quantkit.quantize.kernels._codebook import (
    cheapest_place,
    flips4,
    flips8,
    is_odd,
    pick,
    products4,
    products8,
    sample,
    sign_bits,
)
from quantkit.quantize.kernels._common import IMPORTANCE, WEIGHTINGS, helper, kernel
from quantkit.quantize.kernels._eight_level import estimate_blocks, neighbour_tables
from quantkit.quantize.kernels._scales import (
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
    to_tiles,
)

NEAR = (np.zeros(0, np.int32),) * 2
BYTES_OF_SIGNS = SUPER // 8


@helper
def _products(u: np.ndarray, levels: np.ndarray, places: int, out: np.ndarray) -> None:
    """Products of all groups of a super-block with all entries."""
    n = levels.size // places
    for g in range(SUPER // places):
        if places == 4:
            products4(u, g * 4, levels, out, g * n)
        else:
            products8(u, g * 8, levels, out, g * n)


@helper
def _tables(
    v: np.ndarray, w: np.ndarray, u: np.ndarray, book: Any, tables: Any, signs: np.ndarray
) -> None:
    """Fill u = 2 w |x|, the signs, and the products b of a super-block.

    Where signs must be even, b of an odd group of 8 pays for a wrong sign. For groups of 4, of
    which two share a byte of signs, `paid` holds b with and `b` without that payment.
    """
    levels, _, places, even = book
    _, b, paid = tables
    n = levels.size // places
    for i in range(SUPER):
        u[i] = np.float32(2.0) * w[i] * abs(v[i])
    _products(u, levels, places, b)
    for i in range(BYTES_OF_SIGNS):
        signs[i] = sign_bits(v, 8 * i)
        if even and places == 8 and is_odd(signs[i]):
            flips8(u, 8 * i, levels, b, b, i * n)
        elif even and places == 4 and is_odd(signs[i]):
            flips4(u, 8 * i, levels, b, paid, 2 * i * n)
            flips4(u, 8 * i + 4, levels, b, paid, (2 * i + 1) * n)


@helper
def _sample_block(
    block: int,
    n_samples: int,
    first: Any,
    step: Any,
    book: Any,
    tables: Any,
    signs: np.ndarray,
    values: np.ndarray,
    part: np.ndarray,
) -> None:
    """v(s) of a block at its samples, see `_scales`."""
    levels, _, places, even = book
    a, b, paid = tables
    n_blocks = values.size // n_samples
    n = levels.size // places
    groups = SUPER // places // n_blocks
    for k in range(n_samples):
        values[k * n_blocks + block] = np.float32(0.0)
    for g in range(block * groups, (block + 1) * groups):
        slot = (g & 1) * 2 * n_samples
        sample(a, b, g * n, n, first, step, part, slot, n_samples)
        if not even or places == 8 or not is_odd(signs[g >> 1]):
            for k in range(n_samples):
                values[k * n_blocks + block] += part[slot + k]
            continue
        sample(a, paid, g * n, n, first, step, part, slot + n_samples, n_samples)
        if g & 1:
            for k in range(n_samples):
                left, left_paid = part[k], part[n_samples + k]
                right, right_paid = part[2 * n_samples + k], part[3 * n_samples + k]
                values[k * n_blocks + block] += max(left + right_paid, left_paid + right)


@helper
def _settle_odd_pair(
    g: int, n: int, s: Any, tables: Any, entries: np.ndarray, pays: np.ndarray
) -> None:
    """Entries of two groups of 4 that share a byte of signs, one of which must be wrong."""
    a, b, paid = tables
    left, left_entry = pick(a, b, g * n, n, s)
    right, right_entry = pick(a, b, (g + 1) * n, n, s)
    left_paid, left_other = pick(a, paid, g * n, n, s)
    right_paid, right_other = pick(a, paid, (g + 1) * n, n, s)
    pays[g] = left_paid + right > left + right_paid
    pays[g + 1] = not pays[g]
    entries[g] = left_other if pays[g] else left_entry
    entries[g + 1] = right_other if pays[g + 1] else right_entry


@helper
def _settle(
    unit: Any,
    l: np.ndarray,
    book: Any,
    tables: Any,
    signs: np.ndarray,
    entries: np.ndarray,
    pays: np.ndarray,
) -> Any:
    """Entries of all groups at block scales unit * (2 l + 1); gives the sums of m^2 a and m b.

    `pays` tells which groups have a wrong sign.
    """
    levels, _, places, even = book
    a, b, paid = tables
    n = levels.size // places
    groups = SUPER // places
    a1 = np.float32(0.0)
    b1 = np.float32(0.0)
    for g in range(groups):
        m = np.float32(2 * l[g * l.size // groups] + 1)
        if even and places == 4 and is_odd(signs[g >> 1]):
            if not g & 1:
                _settle_odd_pair(g, n, unit * m, tables, entries, pays)
            at = g * n + entries[g]
            b1 += m * (paid[at] if pays[g] else b[at])
        else:
            entries[g] = pick(a, b, g * n, n, unit * m)[1]
            pays[g] = even and places == 8 and is_odd(signs[g])
            b1 += m * b[g * n + entries[g]]
        a1 += m * m * a[g * n + entries[g]]
    return a1, b1


@kernel
def search_codebook(
    x: np.ndarray,
    cols: int,
    importance: np.ndarray,
    weighting: Any,
    form: Any,
    book: Any,
    plan: Any,
    out: Any,
) -> None:
    """Scales, entries and signs of every super-block of `x`, rows of `cols` one after another.

    weighting: (id, c) as in `load_error_weights`.
    form: (blocks per super-block, stored scale / unit).
    book: (levels and their squares, transposed; weights per group; whether the signs of each 8
    weights must have even parity).
    plan: (span and number of samples, tries of the unit, rounds).
    out: zeroed scale bits u16, l u8, entries u16, signs u8 of each super-block.
    """
    n_blocks, factor = form
    levels, squares, places, even = book[:4]
    near = book[4]
    book = book[:4]
    span, n_samples, tries, rounds = plan
    bits_out, l_out, entries_out, signs_out = out
    groups = SUPER // places
    n = levels.size // places
    v = np.empty(SUPER, np.float32)
    w = np.empty(SUPER, np.float32)
    u = np.empty(SUPER, np.float32)
    q = np.empty(SUPER, np.float32)
    x_tile = np.empty(SUPER, np.float32)
    w_tile = np.empty(SUPER, np.float32)
    paid = np.empty(groups * n if even and places == 4 else 0, np.float32)
    tables = (np.empty(groups * n, np.float32), np.empty(groups * n, np.float32), paid)
    signs = np.empty(BYTES_OF_SIGNS, np.int32)
    values = np.empty(n_samples * n_blocks, np.float32)
    sags = np.empty(n_samples * n_blocks, np.float32)
    part = np.empty(4 * n_samples, np.float32)
    first = np.empty(n_blocks, np.float32)
    step = np.empty(n_blocks, np.float32)
    best = np.empty(n_blocks, np.float32)
    bend = np.empty(n_blocks, np.float32)
    l = np.empty(n_blocks, np.int32)
    entries = np.empty(groups, np.int32)
    pays = np.empty(groups, np.bool_)
    top = np.float32(15.0)
    for column in range(0, cols, SUPER):
        load_importance(importance, column, q)
        if weighting[0] == IMPORTANCE:
            _products(q, squares, places, tables[0])
        for begin in range(column, x.size, cols):
            power = load_weights(x, begin, v)
            if power == 0:
                continue
            load_error_weights(v, q, weighting[0], weighting[1], w)
            if weighting[0] != IMPORTANCE:
                _products(w, squares, places, tables[0])
            _tables(v, w, u, book, tables, signs)
            to_tiles(np.abs(v), SUPER // n_blocks, x_tile)
            to_tiles(w, SUPER // n_blocks, w_tile)
            lay_samples(x_tile, w_tile, span, n_samples, first, step)
            if near[0].size:
                estimate_blocks(x_tile, w_tile, first, step, n_samples, near, values)
            for i in range(0 if near[0].size else n_blocks):
                _sample_block(i, n_samples, first[i], step[i], book, tables, signs, values, part)
            fit_parabolas(values, n_samples, first, step, best, bend)
            find_sags(values, n_blocks, n_samples, sags)
            unit, bits = storable(fit_unit(best, bend, tries, top), power, factor)
            most = np.float32(0.0)
            at = begin // SUPER
            for _ in range(rounds):
                if unit == 0:
                    break
                choose_multipliers(values, sags, n_samples, first, step, best, unit, top, l)
                a1, b1 = _settle(unit, l, book, tables, signs, entries, pays)
                unit, bits = storable(np.float32(0.5) * b1 / a1, power, factor)
                if unit * (b1 - unit * a1) <= most:
                    continue
                most = unit * (b1 - unit * a1)
                bits_out[at] = bits
                for i in range(n_blocks):
                    l_out[at * n_blocks + i] = l[i]
                for i in range(BYTES_OF_SIGNS):
                    signs_out[at * BYTES_OF_SIGNS + i] = signs[i]
                for g in range(groups):
                    entries_out[at * groups + g] = entries[g]
                    if pays[g]:
                        place = cheapest_place(u, g * places, levels, places, entries[g])
                        signs_out[at * BYTES_OF_SIGNS + g * places // 8] ^= 1 << (
                            g * places % 8 + place
                        )


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard to search: see `search_codebook`."""

    n_samples: int
    rounds: int
    n_tries: int = 32


@dataclass(frozen=True, slots=True)
class CodebookCode:
    """A type whose codebook is small enough to try all of it.

    `span` is where best scales lie, relative to magnitude / largest level; `factor` is
    stored scale / unit, `c` the constant of llama.cpp's error weights.
    """

    name: str
    n_blocks: int
    places: int
    even: bool
    span: tuple[float, float]
    factor: float
    c: float = 2.0

    def search(
        self, x: Tile, importance: Importance | None, weighting: str, plan: Plan
    ) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray, npt.NDArray]:
        """For each super-block of `x`: scale bits, l [.., blocks], entries, signs [.., 32]."""
        supers = x.size // SUPER
        levels = lanes(self.name)
        span = np.array(self.span, np.float32) / levels.max()
        tries = np.geomspace(0.7, 1.6, plan.n_tries).astype(np.float32) / np.float32(31.0)
        bits = np.zeros(supers, np.uint16)
        l = np.zeros((supers, self.n_blocks), np.uint8)
        entries = np.zeros((supers, SUPER // self.places), np.uint16)
        signs = np.zeros((supers, BYTES_OF_SIGNS), np.uint8)
        search_codebook(
            np.ascontiguousarray(x).reshape(-1),
            x.shape[1],
            np.ones(x.shape[1], np.float32) if importance is None else importance,
            (WEIGHTINGS[weighting], self.c),
            (self.n_blocks, np.float32(self.factor)),
            (
                levels,
                levels * levels,
                self.places,
                self.even,
                NEAR if self.name != "IQ3_S" else neighbour_tables("IQ3_S"),
            ),
            (span, plan.n_samples, tries, plan.rounds),
            (bits, l.reshape(-1), entries.reshape(-1), signs.reshape(-1)),
        )
        return bits, l, entries, signs
