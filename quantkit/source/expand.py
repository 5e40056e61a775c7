"""Kernels that turn stored codes into f32 or into blocks. Imported when a tile is first read.

They check nothing: shapes and the finiteness of scales are the business of `formats`.
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


@njit(cache=True, nogil=True, inline="always")
def _half(bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The f16 of an f32 given as its bits, and whether it is another value than that."""
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
    return np.uint16(sign | half), inexact


@njit(cache=True, nogil=True)
def repack_q4_0(words_BW: U32, scale_B: U32, out_BS: U16, inexact_B: Bools) -> None:
    """INT4 blocks u32[n, 4] to Q4_0 blocks u16[n, 9], and which scales are no f16.

    `scale` holds the bits of f32 scales. Columns j and j + 16 share byte j in Q4_0, where they are
    neighbours in the source: word k of the source spread to bytes is half of output word k.
    """
    for b in range(words_BW.shape[0]):
        half, inexact = _half(scale_B[b])
        out_BS[b, 0] = half
        inexact_B[b] = inexact
        for k in range(2):
            low = _spread(np.uint64(words_BW[b, k]))
            eight = low | (_spread(np.uint64(words_BW[b, k + 2])) << _U4)
            for j in range(4):
                out_BS[b, 1 + 4 * k + j] = np.uint16(eight >> np.uint64(16 * j))


@njit(cache=True, nogil=True)
def repack_mxfp4(words_BW: U32, exponent_B: U8, out_BS: U8) -> None:
    """E2M1 codes u32[n, 4] and their exponents to GGML's MXFP4 blocks u8[n, 17].

    The exponent comes first; columns j and j + 16 share a byte, as in Q4_0.
    """
    for b in range(words_BW.shape[0]):
        out_BS[b, 0] = exponent_B[b]
        for k in range(2):
            low = _spread(np.uint64(words_BW[b, k]))
            eight = low | (_spread(np.uint64(words_BW[b, k + 2])) << _U4)
            for j in range(8):
                out_BS[b, 1 + 8 * k + j] = np.uint8(eight >> np.uint64(8 * j))


@njit(cache=True, nogil=True)
def pack_q4_0(codes_BC: U8, scale_B: U32, out_BS: U8, inexact_B: Bools) -> None:
    """Blocks of 32 codes 0..15 to Q4_0 blocks u8[n, 18], and which scales are no f16."""
    for b in range(codes_BC.shape[0]):
        half, inexact = _half(scale_B[b])
        inexact_B[b] = inexact
        out_BS[b, 0] = np.uint8(half & np.uint16(0xFF))
        out_BS[b, 1] = np.uint8(half >> np.uint16(8))
        for j in range(16):
            out_BS[b, 2 + j] = codes_BC[b, j] | np.uint8(codes_BC[b, j + 16] << np.uint8(4))


@njit(cache=True, nogil=True)
def pack_q8_0(codes_BC: U8, scale_B: U32, out_BS: U8, inexact_B: Bools) -> None:
    """Blocks of 32 offset codes 0..255 to Q8_0 blocks u8[n, 34], and which scales are no f16."""
    for b in range(codes_BC.shape[0]):
        half, inexact = _half(scale_B[b])
        inexact_B[b] = inexact
        out_BS[b, 0] = np.uint8(half & np.uint16(0xFF))
        out_BS[b, 1] = np.uint8(half >> np.uint16(8))
        for j in range(codes_BC.shape[1]):
            out_BS[b, 2 + j] = codes_BC[b, j] ^ np.uint8(0x80)


@njit(cache=True, nogil=True)
def unpack_rows(bytes_RB: U8, bits: int, codes_RC: U8) -> None:
    """Codes of 1 to 8 bits, one after the other from the lowest bit of each row's first byte on."""
    n_cols = codes_RC.shape[1]
    mask = np.uint32((1 << bits) - 1)
    for r in range(codes_RC.shape[0]):
        bytes_B, codes_C = bytes_RB[r], codes_RC[r]
        if bits == 8:
            codes_C[:] = bytes_B[:n_cols]
        elif bits == 4:
            for k in range(n_cols // 2):
                codes_C[2 * k] = bytes_B[k] & np.uint8(15)
                codes_C[2 * k + 1] = bytes_B[k] >> np.uint8(4)
            if n_cols % 2:
                codes_C[n_cols - 1] = bytes_B[n_cols // 2] & np.uint8(15)
        else:
            for c in range(n_cols):
                byte, shift = (c * bits) >> 3, (c * bits) & 7
                code = np.uint32(bytes_B[byte]) >> np.uint32(shift)
                if shift + bits > 8:
                    code |= np.uint32(bytes_B[byte + 1]) << np.uint32(8 - shift)
                codes_C[c] = np.uint8(code & mask)


@njit(cache=True, nogil=True)
def unpack_awq(words_WC: U32, codes_RC: U8) -> None:
    """Rows 8w + j of codes from row w of u32[words, cols], by the nibble that AWQ gives j."""
    for w in range(words_WC.shape[0]):
        words_C = words_WC[w]
        for j in range(8):
            shift = np.uint32(16 * (j % 2) + 4 * (j // 2))
            codes_C = codes_RC[8 * w + j]
            for c in range(words_C.size):
                codes_C[c] = np.uint8((words_C[c] >> shift) & np.uint32(15))


@njit(cache=True, nogil=True)
def expand_codes(codes_RC: U8, zero_RG: F32, scale_RG: F32, group_size: int, out_RC: F32) -> None:
    """Codes less the zero, times the scale, of their group; the last group may be shorter."""
    for r in range(codes_RC.shape[0]):
        for g in range(scale_RG.shape[1]):
            zero, scale = zero_RG[r, g], scale_RG[r, g]
            codes_C = codes_RC[r, g * group_size : (g + 1) * group_size]
            out_C = out_RC[r, g * group_size : (g + 1) * group_size]
            for c in range(codes_C.size):
                out_C[c] = (np.float32(codes_C[c]) - zero) * scale


@njit(cache=True, nogil=True)
def expand_ordered(
    codes_RC: U8, zero_RG: F32, scale_RG: F32, group_C: npt.NDArray[np.int64], out_RC: F32
) -> None:
    """The same where each column names its group."""
    for r in range(codes_RC.shape[0]):
        zero_G, scale_G = zero_RG[r], scale_RG[r]
        for c in range(codes_RC.shape[1]):
            g = group_C[c]
            out_RC[r, c] = (np.float32(codes_RC[r, c]) - zero_G[g]) * scale_G[g]


@njit(cache=True, nogil=True, inline="always")
def _e2m1(nibble):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    value = _widen(nibble & np.uint32(7), 1, 1)
    return -value if nibble >= np.uint32(8) else value


@njit(cache=True, nogil=True)
def expand_fp4(packed_BH: U8, scale_B: F32, out_BC: F32) -> None:
    """Groups of E2M1 codes, the lower column in the low nibble, times their scale."""
    for b in range(packed_BH.shape[0]):
        scale = scale_B[b]
        for j in range(packed_BH.shape[1]):
            byte = np.uint32(packed_BH[b, j])
            out_BC[b, 2 * j] = _e2m1(byte & np.uint32(15)) * scale
            out_BC[b, 2 * j + 1] = _e2m1(byte >> np.uint32(4)) * scale


@njit(cache=True, nogil=True)
def expand_levels(
    packed_H: U8, skip: int, levels: F32, scale_B: F32, lead: int, block: int, out_N: F32
) -> None:
    """Levels of codes, the first in the high nibble, times the scale of their block.

    The first `skip` codes of `packed` and the first `lead` weights of the first block are not
    wanted.
    """
    i = 0
    while i < out_N.size:
        b = (i + lead) // block
        end = min((b + 1) * block - lead, out_N.size)
        scale = scale_B[b]
        if (i + skip) & 1:
            out_N[i] = levels[packed_H[(i + skip) >> 1] & np.uint8(15)] * scale
            i += 1
        first = (i + skip) >> 1
        for h in range((end - i) // 2):
            byte = packed_H[first + h]
            out_N[i + 2 * h] = levels[byte >> np.uint8(4)] * scale
            out_N[i + 2 * h + 1] = levels[byte & np.uint8(15)] * scale
        if (end - i) % 2:
            out_N[end - 1] = levels[packed_H[(end - 1 + skip) >> 1] >> np.uint8(4)] * scale
        i = end
