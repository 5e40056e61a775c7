"""Codes, entries and scales of encoded blocks as arrays."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from quantkit.errors import UsageError
from quantkit.quantize import decode, encode
from quantkit.quantize.codec import encodable
from quantkit.quantize.layout import (
    BOOKS,
    LEVELS,
    N_SCALES,
    book_scales_of,
    codes_of,
    entries_of,
    rescaled,
    scales_of,
    with_codes,
    with_entries,
)
from quantkit.types import GgmlType
from tests.quantize.laws import gauss, log_normal, student
from tests.quantize.naive.levels import _REGIONS, decoded_levels

COLS = 1024
FLOATS = {GgmlType.F32, GgmlType.F16, GgmlType.BF16}
# The bytes with the sign and the top of the exponent of every scale that can be infinite.
TOPS: dict[GgmlType, tuple[int, ...]] = {
    **dict.fromkeys((t for t in encodable() - FLOATS if t.name.startswith("IQ")), (1,)),
    **dict.fromkeys((GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q8_0), (1,)),
    **dict.fromkeys((GgmlType.Q4_1, GgmlType.Q5_1, GgmlType.Q4_K, GgmlType.Q5_K), (1, 3)),
    **dict.fromkeys((GgmlType.Q1_0, GgmlType.Q2_0), (1,)),
    GgmlType.Q2_K: (81, 83),
    GgmlType.Q3_K: (109,),
    GgmlType.Q6_K: (209,),
    GgmlType.TQ1_0: (53,),
    GgmlType.TQ2_0: (65,),
    GgmlType.IQ1_M: (55,),
    GgmlType.MXFP4: (0,),
    GgmlType.NVFP4: (),
}


def _named(types):
    return pytest.mark.parametrize("type_", sorted(types), ids=lambda t: t.name)


def _random_trits(rng: np.random.Generator, n: int) -> npt.NDArray[np.uint8]:
    """The 52 bytes of TQ1_0's digits; the last four hold four digits, not five."""
    numbers = rng.integers(0, 243, (n, 52))
    numbers[:, 48:] -= numbers[:, 48:] % 3
    return np.ceil(numbers * 256 / 243).astype(np.uint8)


def random_blocks(type_: GgmlType, rows: int = 6, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Random bytes, but that scales are below 2, so finite, and TQ1_0's digits are digits."""
    rng = np.random.default_rng(seed)
    block = rng.integers(0, 256, (rows * COLS // type_.block_size, type_.block_bytes), np.uint8)
    for at in TOPS[type_]:
        block[:, at] &= 0x7F if type_ is GgmlType.MXFP4 else 0xBF
    if type_ is GgmlType.TQ1_0:
        block[:, :52] = _random_trits(rng, len(block))
    return block.reshape(rows, -1)


@cache
def samples(type_: GgmlType) -> tuple[npt.NDArray[np.uint8], ...]:
    x = np.concatenate([gauss(2), student(2)])
    return encode(x, type_.name, log_normal(), "fast"), random_blocks(type_)


def _factors(type_: GgmlType, blocks: npt.NDArray[np.uint8], *factor: float):
    supers = blocks.shape[1] // type_.block_bytes
    shape = (len(blocks), supers) if len(factor) == 1 else (len(blocks), supers, len(factor))
    return np.broadcast_to(np.array(factor, np.float32), shape)


def test_every_type_with_blocks_has_codes_or_entries():
    assert set(LEVELS) | set(BOOKS) == encodable() - FLOATS
    assert not set(LEVELS) & set(BOOKS)
    assert set(N_SCALES) == encodable() - FLOATS - {GgmlType.MXFP4, GgmlType.NVFP4}
    assert {t for t, n in N_SCALES.items() if n == 2} == {
        GgmlType[name] for name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
    }


@_named(LEVELS)
def test_a_weight_is_the_level_of_its_code_times_the_scale_plus_the_offset(type_):
    sub, values = LEVELS[type_].sub, LEVELS[type_].values
    for blocks in samples(type_):
        scale, offset = scales_of(type_, blocks)
        assert scale.shape == offset.shape == (len(blocks), COLS // sub)
        x = values[codes_of(type_, blocks)] * scale.repeat(sub, 1) + offset.repeat(sub, 1)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, decode(blocks, type_.name))


@_named(LEVELS)
def test_codes_run_through_all_levels_that_the_format_has(type_):
    for sample in samples(type_):
        blocks = sample[:2]
        codes = np.arange(len(LEVELS[type_].values), dtype=np.uint8)
        ours = [
            decode(with_codes(type_, blocks, np.full((2, COLS), c, np.uint8)), type_.name)
            for c in codes
        ]
        theirs = decoded_levels(blocks, type_)
        np.testing.assert_array_equal(np.sort(ours, axis=0), np.sort(theirs, axis=0))


@_named(LEVELS)
def test_codes_put_back_leave_every_byte_as_it_was(type_):
    for blocks in samples(type_):
        before = blocks.copy()
        out = with_codes(type_, blocks, codes_of(type_, blocks))
        assert not np.shares_memory(out, blocks)
        np.testing.assert_array_equal(out, before)


@_named(LEVELS)
def test_new_codes_come_back_and_change_no_byte_of_the_scales(type_):
    rng = np.random.default_rng(1)
    is_code = np.zeros(type_.block_bytes, bool)
    for region, _ in _REGIONS[type_]:
        is_code[region] = True
    for blocks in samples(type_):
        before = blocks.copy()
        codes = rng.integers(0, len(LEVELS[type_].values), (len(blocks), COLS), np.uint8)
        out = with_codes(type_, blocks, codes)
        np.testing.assert_array_equal(codes_of(type_, out), codes)
        np.testing.assert_array_equal(blocks, before)
        changed = (out != blocks).reshape(-1, type_.block_bytes)
        assert not changed[:, ~is_code].any()
        assert changed[:, is_code].any(0).all()
        np.testing.assert_array_equal(scales_of(type_, out), scales_of(type_, blocks))


@_named(BOOKS)
def test_a_weight_is_the_level_of_its_entry_with_its_mark_times_the_scale(type_):
    book = BOOKS[type_]
    for blocks in samples(type_):
        entries, marks = entries_of(type_, blocks)
        assert (entries.dtype, marks.dtype) == (np.uint16, np.uint8)
        assert entries.shape == (len(blocks), COLS // book.places)
        assert marks.shape == (len(blocks), COLS // 8)
        levels = book.levels[entries].reshape(len(blocks), COLS)
        if book.shifts == "none":
            levels = levels * np.where(np.unpackbits(marks, axis=1, bitorder="little"), -1, 1)
        else:
            levels = levels + np.where(marks, -0.125, 0.125).repeat(8, 1)
        scale = book_scales_of(type_, blocks)
        assert scale.shape == (len(blocks), COLS // book.sub)
        x = (scale.repeat(book.sub, 1) * levels).astype(np.float32)
        np.testing.assert_array_equal(x, decode(blocks, type_.name))


@_named(BOOKS)
def test_entries_put_back_leave_every_byte_as_it_was(type_):
    for blocks in samples(type_):
        before = blocks.copy()
        out = with_entries(type_, blocks, *entries_of(type_, blocks))
        assert not np.shares_memory(out, blocks)
        np.testing.assert_array_equal(out, before)


@_named(BOOKS)
def test_new_entries_and_marks_come_back_and_nothing_else_changes(type_):
    rng = np.random.default_rng(2)
    for blocks in samples(type_):
        before, old = blocks.copy(), entries_of(type_, blocks)
        entries = rng.integers(0, len(BOOKS[type_].levels), old[0].shape, np.uint16)
        marks = entries_of(type_, random_blocks(type_, len(blocks), seed=3))[1]
        out = with_entries(type_, blocks, entries, marks)
        np.testing.assert_array_equal(blocks, before)
        again = entries_of(type_, out)
        np.testing.assert_array_equal(again[0], entries)
        np.testing.assert_array_equal(again[1], marks)
        scales = book_scales_of(type_, out)
        np.testing.assert_array_equal(scales, book_scales_of(type_, blocks))
        np.testing.assert_array_equal(with_entries(type_, out, *old), before)


@_named(t for t, book in BOOKS.items() if book.signs == "even")
def test_the_eighth_of_even_signs_follows_from_the_others(type_):
    blocks = random_blocks(type_)
    entries, marks = entries_of(type_, blocks)
    assert not (np.unpackbits(marks.reshape(-1, 1), 1).sum(1) % 2).any()
    np.testing.assert_array_equal(with_entries(type_, blocks, entries, marks ^ 128), blocks)


def test_the_shift_of_an_iq1_s_block_is_that_of_its_first_group():
    blocks = random_blocks(GgmlType.IQ1_S)
    entries, marks = entries_of(GgmlType.IQ1_S, blocks)
    others = np.arange(marks.shape[1]) % 4 > 0
    out = with_entries(GgmlType.IQ1_S, blocks, entries, marks ^ others)
    np.testing.assert_array_equal(out, blocks)
    flipped = entries_of(GgmlType.IQ1_S, with_entries(GgmlType.IQ1_S, blocks, entries, 1 - marks))
    np.testing.assert_array_equal(flipped[1], 1 - marks)


@_named(N_SCALES)
def test_scales_times_one_leave_every_byte_as_it_was(type_):
    for blocks in samples(type_):
        before = blocks.copy()
        out = rescaled(type_, blocks, _factors(type_, blocks, 1.0))
        assert not np.shares_memory(out, blocks)
        np.testing.assert_array_equal(out, before)


@_named(N_SCALES)
def test_scales_times_two_double_every_weight(type_):
    for blocks in samples(type_):
        before = blocks.copy()
        out = rescaled(type_, blocks, _factors(type_, blocks, 2.0))
        np.testing.assert_array_equal(decode(out, type_.name), 2 * decode(blocks, type_.name))
        np.testing.assert_array_equal(blocks, before)


@_named(N_SCALES)
def test_every_block_has_its_own_factor(type_):
    blocks = random_blocks(type_)
    supers = COLS // type_.block_size
    factor = np.random.default_rng(4).choice(np.float32([1, 2, 4]), (len(blocks), supers))
    x = decode(rescaled(type_, blocks, factor), type_.name)
    wanted = decode(blocks, type_.name) * factor.repeat(type_.block_size, 1)
    np.testing.assert_array_equal(x, wanted)


@_named(t for t, n in N_SCALES.items() if n == 2)
def test_scale_and_offset_may_have_factors_of_their_own(type_):
    for blocks in samples(type_):
        scale, offset = scales_of(type_, blocks)
        out = scales_of(type_, rescaled(type_, blocks, _factors(type_, blocks, 4.0, -2.0)))
        np.testing.assert_array_equal(out, (4 * scale, -2 * offset))


@pytest.mark.parametrize("factor", [3e38, -3e38, np.inf, np.nan])
@_named(N_SCALES)
def test_a_scale_that_would_not_be_finite_stays_as_it_was(type_, factor):
    # The largest scales, so that no product is a number of f16 again.
    blocks = random_blocks(type_).reshape(-1, type_.block_bytes)
    for at in TOPS[type_]:
        blocks[:, at] |= 0x20
    out = rescaled(type_, blocks, _factors(type_, blocks, factor))
    np.testing.assert_array_equal(out, blocks)


@_named(encodable() - FLOATS)
def test_no_rows_give_no_rows(type_):
    blocks = np.empty((0, type_.row_bytes(COLS)), np.uint8)
    if type_ in LEVELS:
        sub = LEVELS[type_].sub
        assert codes_of(type_, blocks).shape == (0, COLS)
        assert scales_of(type_, blocks)[0].shape == (0, COLS // sub)
        assert with_codes(type_, blocks, codes_of(type_, blocks)).shape == blocks.shape
    else:
        assert book_scales_of(type_, blocks).shape == (0, COLS // BOOKS[type_].sub)
        assert with_entries(type_, blocks, *entries_of(type_, blocks)).shape == blocks.shape
    if type_ in N_SCALES:
        assert rescaled(type_, blocks, _factors(type_, blocks, 1.0)).shape == blocks.shape


@pytest.mark.parametrize(
    ("function", "type_"),
    [
        (codes_of, GgmlType.IQ2_XS),
        (scales_of, GgmlType.IQ1_S),
        (entries_of, GgmlType.Q4_K),
        (book_scales_of, GgmlType.F16),
        (lambda t, b: rescaled(t, b, np.ones((1, 1), np.float32)), GgmlType.MXFP4),
    ],
)
def test_a_type_that_stores_its_weights_otherwise_is_refused(function, type_):
    with pytest.raises(UsageError, match=type_.name):
        function(type_, np.zeros((1, type_.block_bytes), np.uint8))
