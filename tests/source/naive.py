"""Slow, plain twins of the kernels that expand stored weights."""

from __future__ import annotations

import struct

import numpy as np


def bf16_value(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def int4_tile(words, scale_bits):
    """u32[rows, cols / 8] and BF16 bits [rows, cols / 32] to f32[rows, cols]."""
    tile = np.empty((words.shape[0], 8 * words.shape[1]), np.float32)
    for row, col in np.ndindex(tile.shape):
        nibble = int(words[row, col // 8]) >> 4 * (col % 8) & 15
        scale = bf16_value(int(scale_bits[row, col // 32]))
        tile[row, col] = np.float32((nibble - 8) * scale)  # exact in f64, and then in f32
    return tile


def e4m3_value(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def q4_0_row(nibbles, half_scales) -> bytes:
    """A row of Q4_0: for each 32 nibbles an f16 scale, then columns j and j + 16 in byte j."""
    out = b""
    for block, scale in enumerate(half_scales):
        out += struct.pack("<e", scale)
        column = nibbles[32 * block : 32 * block + 32]
        out += bytes(int(column[j]) | int(column[j + 16]) << 4 for j in range(16))
    return out
