"""The i-quants bit by bit: where every number of a block lies, and what it decodes to.

A block is one long integer, little endian; a layout lists for each number the bits it is made of,
lowest first. Reading and writing follow from the same list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from gguf import quants

from quantkit.types import GgmlType

F64 = npt.NDArray[np.float64]
Bits = tuple[int, ...]
SUPER = 256


@dataclass(frozen=True)
class Form:
    """x = d unit (2 l + 1) (codebook level + shift) sign.

    `shift_span` weights share the choice of +-1/8; 0 where there is no shift. `sign_bits` per 8
    weights: 8 are free, 7 stand for an even number of minuses, 0 for a codebook with signs.
    `c`: llama-quantize weighs errors by importance sqrt(c mean(x^2) + x^2).
    """

    unit: float
    block: int  # weights that share l
    max_l: int
    places: int  # weights per codebook entry
    sign_bits: int
    shift_span: int
    c: float


FORMS = {
    GgmlType.IQ1_S: Form(1, 32, 7, 8, 0, 32, 2),
    GgmlType.IQ1_M: Form(1, 16, 7, 8, 0, 8, 2),
    GgmlType.IQ2_XXS: Form(1 / 8, 32, 15, 8, 7, 0, 1),
    GgmlType.IQ2_XS: Form(1 / 8, 16, 15, 8, 7, 0, 1),
    GgmlType.IQ2_S: Form(1 / 8, 16, 15, 8, 8, 0, 2),
    GgmlType.IQ3_XXS: Form(1 / 4, 32, 15, 4, 7, 0, 2),
    GgmlType.IQ3_S: Form(1, 32, 15, 4, 8, 0, 2),
}


def _run(byte: int, bit: int, n: int) -> Bits:
    """`n` bits from bit `bit` of byte `byte` on."""
    return tuple(range(8 * byte + bit, 8 * byte + bit + n))


def _d(k: int) -> Bits:
    return _run(0, 0, 16)


# Field -> bits of its number k; blocks, groups and bytes of signs are numbered along the row.
LAYOUTS: dict[GgmlType, Mapping[str, Callable[[int], Bits]]] = {
    GgmlType.IQ1_S: {
        "d": _d,
        "entry": lambda g: _run(2 + g, 0, 8) + _run(34 + g // 4 * 2, g % 4 * 3, 3),
        "l": lambda b: _run(34 + 2 * b, 12, 3),
        "shift": lambda b: _run(34 + 2 * b, 15, 1),
    },
    GgmlType.IQ1_M: {
        "d": lambda k: sum((_run(48 + 2 * i, 12, 4) for i in range(4)), ()),
        "entry": lambda g: _run(g, 0, 8) + _run(32 + g // 2, g % 2 * 4, 3),
        "l": lambda b: _run(48 + b // 4 * 2, b % 4 * 3, 3),
        "shift": lambda g: _run(32 + g // 2, g % 2 * 4 + 3, 1),
    },
    GgmlType.IQ2_XXS: {
        "d": _d,
        "entry": lambda g: _run(2 + g // 4 * 8 + g % 4, 0, 8),
        "sign": lambda g: _run(2 + g // 4 * 8 + 4, g % 4 * 7, 7),
        "l": lambda b: _run(2 + b * 8 + 4, 28, 4),
    },
    GgmlType.IQ2_XS: {
        "d": _d,
        "entry": lambda g: _run(2 + 2 * g, 0, 9),
        "sign": lambda g: _run(2 + 2 * g, 9, 7),
        "l": lambda b: _run(66 + b // 2, b % 2 * 4, 4),
    },
    GgmlType.IQ2_S: {
        "d": _d,
        "entry": lambda g: _run(2 + g, 0, 8) + _run(66 + g // 4, g % 4 * 2, 2),
        "sign": lambda g: _run(34 + g, 0, 8),
        "l": lambda b: _run(74 + b // 2, b % 2 * 4, 4),
    },
    GgmlType.IQ3_XXS: {
        "d": _d,
        "entry": lambda g: _run(2 + g, 0, 8),
        "sign": lambda k: _run(66 + k // 4 * 4, k % 4 * 7, 7),
        "l": lambda b: _run(66 + 4 * b, 28, 4),
    },
    GgmlType.IQ3_S: {
        "d": _d,
        "entry": lambda g: _run(2 + g, 0, 8) + _run(66 + g // 8, g % 8, 1),
        "sign": lambda k: _run(74 + k, 0, 8),
        "l": lambda b: _run(106 + b // 2, b % 2 * 4, 4),
    },
}


def counts(type_: GgmlType) -> dict[str, int]:
    """How many numbers of each field a block has."""
    form = FORMS[type_]
    every = {
        "d": 1,
        "entry": SUPER // form.places,
        "sign": SUPER // 8,
        "l": SUPER // form.block,
        "shift": SUPER // form.shift_span if form.shift_span else 0,
    }
    return {field: every[field] for field in LAYOUTS[type_]}


def unpack(block: bytes, type_: GgmlType) -> dict[str, list[int]]:
    """Every number of a block, by field."""
    whole = int.from_bytes(block, "little")
    return {
        field: [
            sum((whole >> at & 1) << i for i, at in enumerate(LAYOUTS[type_][field](k)))
            for k in range(n)
        ]
        for field, n in counts(type_).items()
    }


def pack(numbers: Mapping[str, list[int]], type_: GgmlType) -> bytes:
    """The block of these numbers."""
    whole = 0
    for field, values in numbers.items():
        for k, value in enumerate(values):
            for i, at in enumerate(LAYOUTS[type_][field](k)):
                whole |= (value >> i & 1) << at
    return whole.to_bytes(type_.block_bytes, "little")


@cache
def codebook(type_: GgmlType) -> F64:
    """f64[entries, places], from the gguf package."""
    codec = getattr(quants, type_.name)
    codec.init_grid()
    points: F64 = codec.grid.reshape(codec.grid_shape).astype(np.float64)
    return points


def minuses(number: int, sign_bits: int) -> F64:
    """A number of the sign field as 8 factors +-1; of 7 bits, the eighth makes the minuses even."""
    if sign_bits == 7:
        number |= number.bit_count() % 2 << 7
    return np.array([-1.0 if number >> j & 1 else 1.0 for j in range(8)])


def f16(bits: int) -> float:
    """The value of an f16."""
    return float(np.uint16(bits).view(np.float16))


def block_scales(numbers: Mapping[str, list[int]], type_: GgmlType) -> F64:
    """d unit (2 l + 1) of every block."""
    return f16(numbers["d"][0]) * FORMS[type_].unit * (2 * np.array(numbers["l"], float) + 1)


def levels(numbers: Mapping[str, list[int]], type_: GgmlType) -> F64:
    """What the scales multiply, f64[256]."""
    form = FORMS[type_]
    chosen = codebook(type_)[numbers["entry"]].reshape(SUPER)
    if form.sign_bits:
        chosen = chosen * np.concatenate([minuses(n, form.sign_bits) for n in numbers["sign"]])
    if form.shift_span:
        shifts = [-0.125 if n else 0.125 for n in numbers["shift"]]
        chosen = chosen + np.repeat(shifts, form.shift_span)
    return chosen


def value(block: bytes, type_: GgmlType) -> F64:
    """The 256 weights of a block; f32 holds them exactly."""
    numbers = unpack(block, type_)
    return np.repeat(block_scales(numbers, type_), FORMS[type_].block) * levels(numbers, type_)
