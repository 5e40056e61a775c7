"""Kernels that turn stored blocks into f32 or into Q4_0 bytes. Imported when a tile is first read.

They check nothing: shapes and the finiteness of scales are the business of `packed`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_EXPONENT = np.uint32(0x7F800000)
_U4, _U8, _U16 = np.uint64(4), np.uint64(8), np.uint64(16)
_EVERY_BYTE = np.uint64(0x00FF00FF00FF00FF)
_EVERY_PAIR = np.uint64(0x0000FFFF0000FFFF)
_EVERY_NIBBLE = np.uint64(0x0F0F0F0F0F0F0F0F)


@njit(cache=True, nogil=True)
def all_finite(bits_N: U32) -> bool:
    """Whether no f32, given as its bits, is NaN or infinite."""
    worst = np.uint32(0)
    for bits in bits_N:
        worst = max(worst, np.uint32(bits & _EXPONENT))
    return bool(worst != _EXPONENT)


@njit(cache=True, nogil=True)
def expand_bf16(bits_N: U16, out_N: U32) -> bool:
    """BF16 to f32, both as bits; False if there is a NaN or an infinity."""
    worst = np.uint32(0)
    for i in range(bits_N.size):
        bits = np.uint32(np.uint32(bits_N[i]) << np.uint32(16))
        out_N[i] = bits
        worst = max(worst, np.uint32(bits & _EXPONENT))
    return bool(worst != _EXPONENT)


@njit(cache=True, nogil=True, inline="always")
def _widen(magnitude, n_fraction, bias):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The value of a small float without its sign, u32, whose exponent has this bias.

    A subnormal is given an exponent that makes it 2^(1 - bias) too large, without rounding.
    """
    subnormal = np.uint32(magnitude >> np.uint32(n_fraction)) == np.uint32(0)
    exponent = np.uint32((128 - bias) << 23) if subnormal else np.uint32((127 - bias) << 23)
    bits = np.uint32(np.uint32(magnitude << np.uint32(23 - n_fraction)) + exponent)
    surplus = np.float32(2.0 ** (1 - bias)) if subnormal else np.float32(0)
    return np.float32(bits.view(np.float32) - surplus)


@njit(cache=True, nogil=True)
def expand_f16(codes_N: U16, out_N: F32) -> bool:
    """F16 codes to f32; False if there is a NaN or an infinity."""
    worst = np.uint32(0)
    for i in range(codes_N.size):
        code = np.uint32(codes_N[i])
        magnitude = np.uint32(code & np.uint32(0x7FFF))
        worst = max(worst, magnitude)
        value = _widen(magnitude, 10, 15)
        out_N[i] = -value if code >= np.uint32(0x8000) else value
    return bool(worst < np.uint32(0x7C00))


@njit(cache=True, nogil=True)
def expand_int4(packed_BH: U8, scale_B: F32, out_BC: F32) -> None:
    """Blocks of 32 offset nibbles, u8[n, 16] with the lower column in the low nibble, to f32.

    The inner loop runs to a shape and not to 16: a loop of constant length is unrolled before it
    could be vectorised, which makes it four times as slow.
    """
    for b in range(packed_BH.shape[0]):
        scale = scale_B[b]
        for j in range(packed_BH.shape[1]):
            byte = packed_BH[b, j]
            low = np.int32(np.int32(byte & np.uint8(15)) - np.int32(8))
            high = np.int32(np.int32(byte >> np.uint8(4)) - np.int32(8))
            out_BC[b, 2 * j] = np.float32(low) * scale
            out_BC[b, 2 * j + 1] = np.float32(high) * scale


@njit(cache=True, nogil=True)
def expand_fp8(
    codes_RC: U8,
    scale_RC: F32,
    scale_row_R: npt.NDArray[np.int64],
    block_cols: int,
    out_RC: F32,
) -> bool:
    """F8_E4M3 codes times the multiplier of their block; False if a code is NaN.

    Row r of the tile takes row `scale_row[r]` of `scale`.
    """
    worst = np.uint32(0)
    for r in range(codes_RC.shape[0]):
        for block in range(scale_RC.shape[1]):
            scale = scale_RC[scale_row_R[r], block]
            codes_C = codes_RC[r, block * block_cols : (block + 1) * block_cols]
            out_C = out_RC[r, block * block_cols : (block + 1) * block_cols]
            for c in range(codes_C.size):
                code = np.uint32(codes_C[c])
                magnitude = np.uint32(code & np.uint32(0x7F))
                worst = max(worst, magnitude)
                value = _widen(magnitude, 3, 7)
                out_C[c] = (-value if code >= np.uint32(0x80) else value) * scale
    return bool(worst != np.uint32(0x7F))


@njit(cache=True, nogil=True, inline="always")
def _spread(nibbles):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Eight nibbles of a u64's low half to the low halves of its eight bytes."""
    x = (nibbles | (nibbles << _U16)) & _EVERY_PAIR
    x = (x | (x << _U8)) & _EVERY_BYTE
    return (x | (x << _U4)) & _EVERY_NIBBLE


@njit(cache=True, nogil=True)
def repack_q4_0(words_BW: U32, scale_B: U32, out_BS: U16, inexact_B: Bools) -> int:
    """INT4 blocks u32[n, 4] to Q4_0 blocks u16[n, 9]; the number of inexact scales.

    `scale` holds the bits of f32 scales. Columns j and j + 16 share byte j in Q4_0, where they are
    neighbours in the source: word k of the source spread to bytes is half of output word k.
    """
    n_inexact = 0
    for b in range(words_BW.shape[0]):
        bits = scale_B[b]
        sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
        exponent = np.int64((bits >> np.uint32(23)) & np.uint32(0xFF))
        fraction = bits & np.uint32(0x7FFFFF)
        if 113 <= exponent <= 142:  # normal in f16, which has 10 of the 23 bits of the fraction
            half = ((exponent - 112) << 10) | (fraction >> np.uint32(13))
            inexact = (fraction & np.uint32(0x1FFF)) != 0
        elif 103 <= exponent <= 112:  # subnormal in f16: a multiple of 2^-24
            shift = 126 - exponent
            whole = np.int64(fraction | np.uint32(0x800000))
            half = whole >> shift
            inexact = (half << shift) != whole
        else:
            half = np.int64(0)
            inexact = exponent != 0 or fraction != 0
        out_BS[b, 0] = np.uint16(sign | half)
        inexact_B[b] = inexact
        n_inexact += inexact
        for k in range(2):
            low = _spread(np.uint64(words_BW[b, k]))
            eight = low | (_spread(np.uint64(words_BW[b, k + 2])) << _U4)
            for j in range(4):
                out_BS[b, 1 + 4 * k + j] = np.uint16(eight >> np.uint64(16 * j))
    return n_inexact
