"""Codes and scales of encoded blocks as arrays: what rounding that keeps the scales works on.

`_FORMS` is the table of formats. A field of a block is told as `Bits`: numbers of some bits in
consecutive words. Types in `LEVELS` have a code per weight, x = scale * level[code] + offset. Types
in `BOOKS` have a codebook entry per 8 or 4 weights and a byte of marks per 8: their signs, or
for IQ1 whether the entry is shifted down. Blocks are u8[rows, row_bytes]; no function changes
its arguments, and all raise `UsageError` for a type that is not in the mapping they go by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import quants

from quantkit.errors import UsageError
from quantkit.quantize._fields import Bits, Fields, Trits, count, read, write
from quantkit.quantize.codec import Blocks
from quantkit.quantize.grids import _EVEN, grid
from quantkit.types import GgmlType

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, eq=False)
class _Scale:
    """The f16 `d` times `table[step]`; without one of them, the other alone."""

    d: Fields = ()
    steps: Fields = ()
    table: F32 | None = None

    def read(self, block: Blocks) -> F32:
        """f32[blocks, steps], or f32[blocks, 1] without steps."""
        if self.table is None:
            return self._d(block)
        steps = self.table[read(self.steps, block, np.uint8)]
        return self._d(block) * steps if self.d else steps

    def _d(self, block: Blocks) -> F32:
        return read(self.d, block, np.uint16).view(np.float16).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """A type: `numbers` are its codes, or the entries of its codebook with `marks`."""

    numbers: Fields
    scale: _Scale
    offset: _Scale | None = None
    marks: Fields = ()
    values: F32 | None = None

    @property
    def halves(self) -> list[Fields]:
        """Where the f16 scales lie."""
        return [part.d for part in (self.scale, self.offset) if part is not None and part.d]


def _half(at: int) -> Fields:
    return (Bits(at, (1, 1, 1), 16, word="u2"),)


def _whole(low: int, high: int) -> F32:
    return np.arange(low, high + 1, dtype=np.float32)


_BYTES = np.arange(256, dtype=np.uint8)
_I8 = _BYTES.view(np.int8).astype(np.float32)
_IQ4 = np.array(quants.IQ4_NL.kvalues, np.float32)
# ggml's E2M1 table is doubled, so the scales beside it are halved.
_E2M1 = np.array(quants.MXFP4.kvalues, np.float32)
_E8M0 = np.ldexp(np.float32(1), np.arange(256) - 128)
_UE4M3 = np.asarray(quants.NVFP4.ue4m3_to_fp32(_BYTES), np.float32)
_HALF = (_whole(0, 15) + np.float32(0.5)) * np.float32(0.5)  # (l + 1/2) / 2
_QUARTER = _HALF * np.float32(0.5)
_ODD = 2 * _whole(0, 15) + 1

_NIBBLES_Q4_K: Fields = (Bits(16, (4, 2, 32), 4),)
_SCALES_Q4_K: Fields = (
    Bits(4, (1, 1, 4), 6),
    Bits(12, (1, 1, 4), 4, first=4),
    Bits(4, (1, 1, 4), 2, bit=6, above=4, first=4),
)
_MINS_Q4_K: Fields = (
    Bits(8, (1, 1, 4), 6),
    Bits(12, (1, 1, 4), 4, bit=4, first=4),
    Bits(8, (1, 1, 4), 2, bit=6, above=4, first=4),
)
_SCALE_Q4_K = _Scale(_half(0), _SCALES_Q4_K, _whole(0, 63))
_OFFSET_Q4_K = _Scale(_half(2), _MINS_Q4_K, -_whole(0, 63))

_FORMS: dict[GgmlType, _Form] = {
    GgmlType.Q4_0: _Form((Bits(2, (1, 2, 16), 4),), _Scale(_half(0)), values=_whole(-8, 7)),
    GgmlType.Q4_1: _Form(
        (Bits(4, (1, 2, 16), 4),), _Scale(_half(0)), _Scale(_half(2)), values=_whole(0, 15)
    ),
    GgmlType.Q5_0: _Form(
        (Bits(6, (1, 2, 16), 4), Bits(2, (4, 8, 1), 1, above=4)),
        _Scale(_half(0)),
        values=_whole(-16, 15),
    ),
    GgmlType.Q5_1: _Form(
        (Bits(8, (1, 2, 16), 4), Bits(4, (4, 8, 1), 1, above=4)),
        _Scale(_half(0)),
        _Scale(_half(2)),
        values=_whole(0, 31),
    ),
    GgmlType.Q8_0: _Form((Bits(2, (1, 1, 32), 8),), _Scale(_half(0)), values=_I8),
    GgmlType.Q2_K: _Form(
        (Bits(16, (2, 4, 32), 2),),
        _Scale(_half(80), (Bits(0, (1, 1, 16), 4),), _whole(0, 15)),
        _Scale(_half(82), (Bits(0, (1, 1, 16), 4, bit=4),), -_whole(0, 15)),
        values=_whole(0, 3),
    ),
    GgmlType.Q3_K: _Form(
        (Bits(32, (2, 4, 32), 2), Bits(0, (1, 8, 32), 1, above=2)),
        _Scale(
            _half(108),
            (Bits(96, (1, 2, 8), 4), Bits(104, (1, 4, 4), 2, above=4)),
            _whole(-32, 31),
        ),
        values=_whole(-4, 3),
    ),
    GgmlType.Q4_K: _Form(_NIBBLES_Q4_K, _SCALE_Q4_K, _OFFSET_Q4_K, values=_whole(0, 15)),
    GgmlType.Q5_K: _Form(
        (Bits(48, (4, 2, 32), 4), Bits(16, (1, 8, 32), 1, above=4)),
        _SCALE_Q4_K,
        _OFFSET_Q4_K,
        values=_whole(0, 31),
    ),
    GgmlType.Q6_K: _Form(
        (Bits(0, (2, 2, 64), 4), Bits(128, (2, 4, 32), 2, above=4)),
        _Scale(_half(208), (Bits(192, (1, 1, 16), 8),), _I8),
        values=_whole(-32, 31),
    ),
    GgmlType.IQ4_NL: _Form((Bits(2, (1, 2, 16), 4),), _Scale(_half(0)), values=_IQ4),
    GgmlType.IQ4_XS: _Form(
        (Bits(8, (8, 2, 16), 4),),
        _Scale(_half(0), (Bits(4, (4, 2, 1), 4), Bits(2, (2, 4, 1), 2, above=4)), _whole(-32, 31)),
        values=_IQ4,
    ),
    GgmlType.MXFP4: _Form(
        (Bits(1, (1, 2, 16), 4),),
        _Scale(steps=(Bits(0, (1, 1, 1), 8),), table=_E8M0),
        values=_E2M1,
    ),
    GgmlType.NVFP4: _Form(
        (Bits(4, (4, 2, 8), 4),),
        _Scale(steps=(Bits(0, (1, 1, 4), 8),), table=_UE4M3),
        values=_E2M1,
    ),
    GgmlType.TQ1_0: _Form(
        (Trits(0, (5, 32), 0), Trits(32, (5, 16), 160), Trits(48, (4, 4), 240)),
        _Scale(_half(52)),
        values=_whole(-1, 1),
    ),
    GgmlType.TQ2_0: _Form((Bits(0, (2, 4, 32), 2),), _Scale(_half(64)), values=_whole(-1, 2)),
    GgmlType.Q1_0: _Form(
        (Bits(2, (16, 8, 1), 1),), _Scale(_half(0)), values=np.array([-1, 1], np.float32)
    ),
    GgmlType.Q2_0: _Form((Bits(2, (16, 4, 1), 2),), _Scale(_half(0)), values=_whole(-1, 2)),
    GgmlType.IQ1_S: _Form(
        (Bits(2, (1, 1, 32), 8), Bits(34, (8, 4, 1), 3, above=8, word="u2")),
        _Scale(_half(0), (Bits(34, (8, 1, 1), 3, bit=12, word="u2"),), _ODD),
        marks=(Bits(34, (8, 1, 1), 1, bit=15, word="u2"),),
    ),
    GgmlType.IQ1_M: _Form(
        (Bits(0, (1, 1, 32), 8), Bits(32, (16, 2, 1), 3, every=4, above=8)),
        _Scale(
            tuple(Bits(49 + 2 * k, (1, 1, 1), 4, bit=4, above=4 * k) for k in range(4)),
            (Bits(48, (4, 4, 1), 3, word="u2"),),
            _ODD,
        ),
        marks=(Bits(32, (16, 2, 1), 1, bit=3, every=4),),
    ),
    GgmlType.IQ2_XXS: _Form(
        (Bits(2, (8, 4, 1), 8, word="u8"),),
        _Scale(_half(0), (Bits(2, (8, 1, 1), 4, bit=60, word="u8"),), _QUARTER),
        marks=(Bits(2, (8, 4, 1), 7, bit=32, word="u8"),),
    ),
    GgmlType.IQ2_XS: _Form(
        (Bits(2, (1, 1, 32), 9, word="u2"),),
        _Scale(_half(0), (Bits(66, (8, 2, 1), 4),), _QUARTER),
        marks=(Bits(2, (1, 1, 32), 7, bit=9, word="u2"),),
    ),
    GgmlType.IQ2_S: _Form(
        (Bits(2, (1, 1, 32), 8), Bits(66, (8, 4, 1), 2, above=8)),
        _Scale(_half(0), (Bits(74, (8, 2, 1), 4),), _QUARTER),
        marks=(Bits(34, (1, 1, 32), 8),),
    ),
    GgmlType.IQ3_XXS: _Form(
        (Bits(2, (1, 1, 64), 8),),
        _Scale(_half(0), (Bits(66, (8, 1, 1), 4, bit=28, word="u4"),), _HALF),
        marks=(Bits(66, (8, 4, 1), 7, word="u4"),),
    ),
    GgmlType.IQ3_S: _Form(
        (Bits(2, (1, 1, 64), 8), Bits(66, (8, 8, 1), 1, above=8)),
        _Scale(_half(0), (Bits(106, (4, 2, 1), 4),), _ODD),
        marks=(Bits(74, (1, 1, 32), 8),),
    ),
}


def _sub(type_: GgmlType) -> int:
    steps = _FORMS[type_].scale.steps
    return type_.block_size // (count(steps) if steps else 1)


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """x = scale * values[code] + offset, `sub` weights to a scale and an offset.

    Codes are the stored ones, so Q8_0's 128..255 are -128..-1, and E2M1 has two codes for zero.
    """

    sub: int
    values: F32  # [codes]


@dataclass(frozen=True, slots=True)
class Book:
    """x = scale * sign * level for IQ2 and IQ3, scale * (level +- 1/8) for IQ1.

    `places` weights to an entry, `sub` to a scale. Of eight "even" signs an even number is minus.
    """

    name: str
    places: int
    sub: int
    signs: Literal["free", "even", "none"]
    shifts: Literal["per-block", "per-group", "none"]  # a block is 32 weights, a group 8

    @property
    def levels(self) -> F32:
        """Magnitudes for IQ2 and IQ3, -1, 0, 1 for IQ1: f32[entries, places], read-only."""
        return grid(self.name)


def _book(type_: GgmlType, form: _Form) -> Book:
    places = type_.block_size // count(form.numbers)
    sub = _sub(type_)
    if type_ is GgmlType.IQ1_S:
        return Book(type_.name, places, sub, "none", "per-block")
    if type_ is GgmlType.IQ1_M:
        return Book(type_.name, places, sub, "none", "per-group")
    even = isinstance(form.marks[0], Bits) and form.marks[0].width == 7
    return Book(type_.name, places, sub, "even" if even else "free", "none")


LEVELS = MappingProxyType(
    {t: Levels(_sub(t), form.values) for t, form in _FORMS.items() if form.values is not None}
)
BOOKS = MappingProxyType({t: _book(t, form) for t, form in _FORMS.items() if form.marks})
# f16 scales per block; the scales of MXFP4 and NVFP4 are other floats.
N_SCALES = MappingProxyType({t: len(form.halves) for t, form in _FORMS.items() if form.halves})


def _blocks(type_: GgmlType, blocks: Blocks) -> Blocks:
    """One block per row; a view where `blocks` is contiguous."""
    return np.ascontiguousarray(blocks).reshape(-1, type_.block_bytes)


def _rows(type_: GgmlType, blocks: Blocks, parts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[all blocks, n] -> [rows, blocks per row * n]."""
    return parts.reshape(len(blocks), blocks.shape[1] // type_.block_bytes * parts.shape[1])


def _per_block(type_: GgmlType, blocks: Blocks, parts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[rows, blocks per row * n] -> [all blocks, n]."""
    per_row = blocks.shape[1] // type_.block_bytes
    n = prod(parts.shape[1:]) // max(per_row, 1)
    return np.ascontiguousarray(parts).reshape(len(blocks) * per_row, n)


def codes_of(type_: GgmlType, blocks: Blocks) -> U8:
    """Codes u8[rows, cols] of a type in `LEVELS`."""
    form = _FORMS[_one_of(LEVELS, type_)]
    return _rows(type_, blocks, read(form.numbers, _blocks(type_, blocks), np.uint8))


def with_codes(type_: GgmlType, blocks: Blocks, codes: U8) -> Blocks:
    """`blocks` with codes u8[rows, cols], each below len(LEVELS[type_].values), for theirs."""
    form, out = _FORMS[_one_of(LEVELS, type_)], blocks.copy(order="C")
    write(form.numbers, _blocks(type_, out), _per_block(type_, blocks, codes))
    return out


def scales_of(type_: GgmlType, blocks: Blocks) -> tuple[F32, F32]:
    """Scale and offset of every `LEVELS[type_].sub` weights, two f32[rows, cols / sub]."""
    form, block = _FORMS[_one_of(LEVELS, type_)], _blocks(type_, blocks)
    scale = form.scale.read(block)
    offset = form.offset.read(block) if form.offset else np.zeros_like(scale)
    return _rows(type_, blocks, scale), _rows(type_, blocks, offset)


def entries_of(type_: GgmlType, blocks: Blocks) -> tuple[U16, U8]:
    """Codebook entries u16[rows, cols / places] and marks u8[rows, cols / 8] of a type in `BOOKS`.

    Marks are bytes of signs, bit j set = minus at place j of 8, all eight for "even" types too;
    for IQ1, 1 where 1/8 is taken off the levels and 0 where it is added.
    """
    form, block = _FORMS[_one_of(BOOKS, type_)], _blocks(type_, blocks)
    marks = read(form.marks, block, np.uint8)
    if BOOKS[type_].signs == "even":
        marks = _EVEN[marks]
    marks = marks.repeat(_GROUPS // marks.shape[1], axis=1)
    entries = read(form.numbers, block, np.uint16)
    return _rows(type_, blocks, entries), _rows(type_, blocks, marks)


def with_entries(type_: GgmlType, blocks: Blocks, entries: U16, marks: U8) -> Blocks:
    """`blocks` with entries and marks, shaped as `entries_of` gives them, for theirs.

    Of "even" signs the eighth follows from the others, and of four "per-block" shifts the first
    counts.
    """
    form, out = _FORMS[_one_of(BOOKS, type_)], blocks.copy(order="C")
    block = _blocks(type_, out)
    write(form.numbers, block, _per_block(type_, blocks, entries))
    write(form.marks, block, _per_block(type_, blocks, marks)[:, :: _GROUPS // count(form.marks)])
    return out


def book_scales_of(type_: GgmlType, blocks: Blocks) -> F32:
    """Scale of every `BOOKS[type_].sub` weights, f32[rows, cols / sub]."""
    scale = _FORMS[_one_of(BOOKS, type_)].scale.read(_blocks(type_, blocks))
    return _rows(type_, blocks, scale)


def rescaled(type_: GgmlType, blocks: Blocks, factor: F32) -> Blocks:
    """`blocks` with their f16 scales multiplied by the factor of the block and rounded to f16.

    `factor` is f32[rows, blocks per row], or f32[rows, blocks per row, N_SCALES[type_]] with the
    factors of d and of dmin (m) apart. A scale stays as it was where the product is not finite.
    """
    halves, out = _FORMS[_one_of(N_SCALES, type_)].halves, blocks.copy(order="C")
    block = _blocks(type_, out)
    factors = np.broadcast_to(_per_block(type_, blocks, factor), (len(block), len(halves)))
    for fields, gamma in zip(halves, factors.T, strict=True):
        scale = read(fields, block, np.uint16).view(np.float16)
        with np.errstate(over="ignore", invalid="ignore"):
            product = (scale.astype(np.float32) * gamma[:, np.newaxis]).astype(np.float16)
        write(fields, block, np.where(np.isfinite(product), product, scale).view(np.uint16))
    return out


_GROUPS = 32  # of 8 weights in a super-block


def _one_of(known: Mapping[GgmlType, Any], type_: GgmlType) -> GgmlType:
    if type_ not in known:
        raise UsageError(
            f"{type_.name} does not store its weights so",
            hint=f"one of: {', '.join(t.name for t in known)}",
        )
    return type_


def supports(type_: GgmlType) -> bool:
    """Whether a type's codes can be chosen anew, which rounding with feedback does."""
    return type_ in LEVELS or type_ in BOOKS
