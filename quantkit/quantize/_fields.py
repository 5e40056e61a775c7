"""Fields of encoded blocks: where numbers of a few bits lie, read and written as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.quantize.codec import Blocks

Numbers = npt.NDArray[Any]  # u8 or u16[blocks, numbers]


@dataclass(frozen=True, slots=True)
class Bits:
    """A field of a block: numbers of `width` bits, packed into words from byte `at` on.

    Seen as [*shape], number k of the middle dimension starts at bit `bit + k * every` of its word
    (`every` = 0: `width`), and what lies in the last dimension goes to neighbouring words. The
    field holds the numbers from `first` on, their bits from `above` on.
    """

    at: int
    shape: tuple[int, int, int]
    width: int
    bit: int = 0
    every: int = 0
    above: int = 0
    first: int = 0
    word: str = "u1"

    @property
    def end(self) -> int:
        """One past the last number."""
        return self.first + prod(self.shape)

    def read(self, block: Blocks, numbers: Numbers) -> None:
        """Add this field's bits to `numbers`, zeroed before."""
        words, parts = self._words(block), self._parts(numbers)
        for k in range(self.shape[1]):
            field = words >> self._shift(k) & ((1 << self.width) - 1)
            parts[:, :, k] |= field.astype(numbers.dtype, copy=False) << self.above

    def write(self, block: Blocks, numbers: Numbers) -> None:
        """Put `numbers` in place, leaving all other bits as they are."""
        words, parts = self._words(block), self._parts(numbers)
        ones = (1 << self.width) - 1
        kept = ~sum(ones << self._shift(k) for k in range(self.shape[1]))
        packed = words & words.dtype.type(kept & (1 << 8 * words.itemsize) - 1)
        for k in range(self.shape[1]):
            field = parts[:, :, k] >> self.above & ones
            packed |= field.astype(words.dtype, copy=False) << self._shift(k)
        words[...] = packed

    def _shift(self, k: int) -> int:
        return self.bit + k * (self.every or self.width)

    def _words(self, block: Blocks) -> Numbers:
        """View of the words, [blocks, shape[0], shape[2]]."""
        word = np.dtype(f"<{self.word}")
        outer, _, inner = self.shape
        span = block[:, self.at : self.at + outer * inner * word.itemsize]
        return span.view(word).reshape(-1, outer, inner)

    def _parts(self, numbers: Numbers) -> Numbers:
        return numbers[:, self.first : self.end].reshape(-1, *self.shape)


_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
_DIGITS = (np.arange(256, dtype=np.uint8) * _POWERS[:, np.newaxis]).astype(np.uint16) * 3 >> 8
_DIGITS = _DIGITS.astype(np.uint8)  # [digit, byte]
# The byte, as a fraction of 256, that decoding multiplies up to the digits of a number.
_TRIT_BYTE = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Trits:
    """As `Bits`, for TQ1_0: up to five base-3 digits in a byte, the first most significant."""

    at: int
    shape: tuple[int, int]  # digits, bytes
    first: int

    @property
    def end(self) -> int:
        """One past the last number."""
        return self.first + prod(self.shape)

    def read(self, block: Blocks, numbers: Numbers) -> None:
        """Set this field's part of `numbers`."""
        parts = numbers[:, self.first : self.end].reshape(-1, *self.shape)
        packed = block[:, self.at : self.at + self.shape[1]]
        for k in range(self.shape[0]):
            parts[:, k] = _DIGITS[k][packed]

    def write(self, block: Blocks, numbers: Numbers) -> None:
        """Put `numbers` in place, leaving all other bits as they are."""
        parts = numbers[:, self.first : self.end].reshape(-1, *self.shape)
        value = parts[:, 0]
        for k in range(1, self.shape[0]):
            value = value * 3 + parts[:, k]
        value = value * 3 ** (5 - self.shape[0])
        block[:, self.at : self.at + self.shape[1]] = _TRIT_BYTE[value]


Fields = tuple[Bits | Trits, ...]


def count(fields: Fields) -> int:
    """Numbers in a block."""
    return max(field.end for field in fields)


def read(fields: Fields, block: Blocks, dtype: type[np.unsignedinteger[Any]]) -> Numbers:
    """Numbers [blocks, count(fields)] of blocks u8[blocks, bytes]."""
    numbers = np.zeros((len(block), count(fields)), dtype)
    for field in fields:
        field.read(block, numbers)
    return numbers


def write(fields: Fields, block: Blocks, numbers: Numbers) -> None:
    """Put `numbers` into `block`, which is changed."""
    for field in fields:
        field.write(block, numbers)
