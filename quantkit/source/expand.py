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


@njit(cache=True, nogil=True)
def expand_int4(packed_BH: U8, scale_B: F32, levels: F32, out_BHP: F32) -> None:
    """Blocks of 32 offset nibbles, u8[n, 16] with the lower column in the low nibble, to f32.

    `levels` f32[256, 2] is the pair of levels of each byte; `out` is f32[n, 16, 2].
    """
    for b in range(packed_BH.shape[0]):
        scale = scale_B[b]
        for j in range(16):
            byte = packed_BH[b, j]
            out_BHP[b, j, 0] = levels[byte, 0] * scale
            out_BHP[b, j, 1] = levels[byte, 1] * scale


@njit(cache=True, nogil=True)
def expand_fp8(
    codes_RC: U8,
    scale_RC: F32,
    scale_row_R: npt.NDArray[np.int64],
    block_cols: int,
    values: F32,
    out_RC: F32,
) -> bool:
    """F8_E4M3 codes times the multiplier of their block; False if a code is NaN.

    Row r of the tile takes row `scale_row[r]` of `scale`; `values` f32[256] decodes a code.
    """
    n_rows, n_cols = codes_RC.shape
    worst = np.uint8(0)
    for r in range(n_rows):
        for c in range(n_cols):
            worst = max(worst, np.uint8(codes_RC[r, c] & np.uint8(0x7F)))
        for block in range(scale_RC.shape[1]):
            scale = scale_RC[scale_row_R[r], block]
            for c in range(block * block_cols, min((block + 1) * block_cols, n_cols)):
                out_RC[r, c] = values[codes_RC[r, c]] * scale
    return bool(worst != np.uint8(0x7F))


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
