"""Q2_K to Q6_K: super-blocks of 256 with integer sub-scales.

Q2_K, Q4_K, Q5_K are affine, x = d s q - dmin m; Q3_K and Q6_K have a scale only, x = d s q.
Byte layouts are told beside the functions that write them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.kernels._common import helper, kernel
from quantkit.quantize.kernels._simd import (
    fill,
    lane,
    load8,
    maximum,
    minimum,
    rint,
    splat8,
    store,
)
from quantkit.quantize.kernels._super import SUPER, load_super, scaled_searcher, search_affine
from quantkit.quantize.kernels._tile import (
    codes,
    ggml_weights,
    put_f16,
    reciprocal,
    root_mean_square,
    scale_fitters,
    weight_tiles,
)
from quantkit.types import GgmlType


@helper
def _put_q2(out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any, dmin: Any, sm: Any) -> None:
    """`scales[16] qs[64] d dmin`: nibbles (s, m); 2 bits of elements l, l + 32, ... per byte."""
    top, zero = np.float32(3.0), np.float32(0.0)
    for b in range(16):
        out[at + b] = np.int32(sm[0, b]) | np.int32(sm[1, b]) << 4
    for part in range(0, 64, 8):
        packed = fill(splat8(zero), 0)
        for k in range(4):
            e = 128 * (part // 32) + 32 * k + part % 32
            scale, base = d * sm[0, e // 16], -(dmin * sm[1, e // 16])
            q = codes(load8(row, begin + e), base, reciprocal(scale), zero, top)
            packed = packed | (q << (2 * k))
        store(out, at + 16 + part, packed)
    put_f16(out, at + 80, d)
    put_f16(out, at + 82, dmin)


@helper
def _put_q45(
    out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any, dmin: Any, sm: Any, top: Any
) -> None:
    """`d dmin scales[12] (qh[32]) qs[128]`: 6-bit s and m; nibbles, and fifth bits for Q5_K."""
    zero = np.float32(0.0)
    put_f16(out, at, d)
    put_f16(out, at + 2, dmin)
    for b in range(4):
        s, m = np.int32(sm[0, b]), np.int32(sm[1, b])
        s4, m4 = np.int32(sm[0, b + 4]), np.int32(sm[1, b + 4])
        out[at + 4 + b] = s | (s4 >> 4) << 6
        out[at + 8 + b] = m | (m4 >> 4) << 6
        out[at + 12 + b] = (s4 & 15) | (m4 & 15) << 4
    fifth = top > 15.0
    nibbles = at + 48 if fifth else at + 16
    for part in range(0, 32, 8):
        high = fill(splat8(zero), 0)
        for g in range(4):
            scale, base = d * sm[0, 2 * g], -(dmin * sm[1, 2 * g])
            e = begin + 64 * g + part
            a = codes(load8(row, e), base, reciprocal(scale), zero, top)
            scale, base = d * sm[0, 2 * g + 1], -(dmin * sm[1, 2 * g + 1])
            b = codes(load8(row, e + 32), base, reciprocal(scale), zero, top)
            store(out, nibbles + 32 * g + part, (a & 15) | ((b & 15) << 4))
            high = high | ((a >> 4) << (2 * g)) | ((b >> 4) << (2 * g + 1))
        if fifth:
            store(out, at + 16 + part, high)


@helper
def _put_q3(out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any, s: np.ndarray) -> None:
    """`hmask[32] qs[64] scales[12] d`: 2 low bits as Q2_K, third bit of element e in bit e / 32
    of hmask[e % 32], 6-bit s + 32."""
    low, top = np.float32(4.0), np.float32(7.0)
    for part in range(0, 64, 8):
        packed = fill(splat8(d), 0)
        high = packed
        for k in range(4):
            e = 128 * (part // 32) + 32 * k + part % 32
            inv = reciprocal(d * s[e // 16])
            q = codes(load8(row, begin + e), np.float32(0.0), inv, low, top)
            packed = packed | ((q & 3) << (2 * k))
            high = high | ((q >> 2) << (4 * (part // 32) + k))
        store(out, at + 32 + part, packed)
        if part >= 32:
            high = high | load8(out, at + part % 32)
        store(out, at + part % 32, high)
    for b in range(4):
        s0, s4 = np.int32(s[b]) + 32, np.int32(s[b + 4]) + 32
        s8, s12 = np.int32(s[b + 8]) + 32, np.int32(s[b + 12]) + 32
        out[at + 96 + b] = (s0 & 15) | (s8 & 15) << 4
        out[at + 100 + b] = (s4 & 15) | (s12 & 15) << 4
        out[at + 104 + b] = s0 >> 4 | s4 >> 4 << 2 | s8 >> 4 << 4 | s12 >> 4 << 6
    put_f16(out, at + 108, d)


@helper
def _put_q6(out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any, s: np.ndarray) -> None:
    """`ql[128] qh[64] scales:int8[16] d`: per half of 128, nibbles of elements l and l + 64 for
    l < 64, and in qh[l] the two high bits of l, l + 32, l + 64, l + 96 for l < 32."""
    low, top = np.float32(32.0), np.float32(63.0)
    for part in range(0, 64, 8):
        half, l = part // 32, part % 32
        e = begin + 128 * half + l
        high = fill(splat8(d), 0)
        q0, q1 = high, high
        for k in range(4):
            inv = reciprocal(d * s[8 * half + 2 * k + l // 16])
            q = codes(load8(row, e + 32 * k), np.float32(0.0), inv, low, top)
            high = high | ((q >> 4) << (2 * k))
            nibble = (q & 15) << (4 * (k // 2))
            if k % 2:
                q1 = q1 | nibble
            else:
                q0 = q0 | nibble
        store(out, at + 64 * half + l, q0)
        store(out, at + 64 * half + 32 + l, q1)
        store(out, at + 128 + part, high)
    for b in range(16):
        out[at + 192 + b] = np.int32(s[b])
    put_f16(out, at + 208, d)


@helper
def _nearest(t: Any, low: Any, high: Any) -> Any:
    return maximum(minimum(rint(t), high), low)


_search_scaled = scaled_searcher(scale_fitters(_nearest))


@kernel
def _encode_scaled(
    x: np.ndarray, importance: np.ndarray, c: Any, form: Any, plan: Any, out: np.ndarray
) -> None:
    """Q3_K and Q6_K; `form` is (lowest code, highest code, least s, most s)."""
    low, high, least_s, most_s = form
    supers = x.shape[1] // SUPER
    block_bytes = out.shape[1] // supers
    weights = weight_tiles(importance, 16, SUPER)
    tiles = np.empty(SUPER, np.float32)
    scratch = np.empty(SUPER, np.float32)
    found = np.zeros(16, np.float32)
    for r in range(x.shape[0]):
        for b in range(supers):
            begin = b * SUPER
            up = load_super(x[r], begin, 16, tiles)
            w = weights[begin : begin + SUPER]
            if c > 0.0:
                rms = np.sqrt(c) * root_mean_square(tiles)
                ggml_weights(tiles, w, SUPER // 8, splat8(np.float32(rms)), scratch)
                w = scratch
            levels = (splat8(low), splat8(high))
            d = _search_scaled(tiles, w, 16, up, (levels, least_s, most_s), plan, found)
            d0 = lane(d * up, 0)
            if high < 4.0:
                _put_q3(out[r], b * block_bytes, x[r], begin, d0, found)
            else:
                _put_q6(out[r], b * block_bytes, x[r], begin, d0, found)


@kernel
def _encode_affine(
    x: np.ndarray, importance: np.ndarray, c: Any, form: Any, search: Any, out: np.ndarray
) -> None:
    """Q2_K, Q4_K, Q5_K; `c` > 0 asks for llama.cpp's weighting with that constant."""
    top, limit = form
    size = 16 if limit < 16.0 else 32
    supers = x.shape[1] // SUPER
    block_bytes = out.shape[1] // supers
    weights = weight_tiles(importance, size, SUPER)
    tiles = np.empty(SUPER, np.float32)
    scratch = np.empty(SUPER, np.float32)
    found = np.zeros((2, SUPER // size), np.float32)
    for r in range(x.shape[0]):
        for b in range(supers):
            begin = b * SUPER
            up = load_super(x[r], begin, size, tiles)
            w = weights[begin : begin + SUPER]
            if c > 0.0:
                rms = np.sqrt(c) * root_mean_square(tiles)
                ggml_weights(tiles, w, SUPER // 8, splat8(np.float32(rms)), scratch)
                w = scratch
            d, dmin, _error = search_affine(tiles, w, size, up, form, search, found)
            d0, dmin0 = lane(d * up, 0), lane(dmin * up, 0)
            if size == 16:
                _put_q2(out[r], b * block_bytes, x[r], begin, d0, dmin0, found)
            else:
                _put_q45(out[r], b * block_bytes, x[r], begin, d0, dmin0, found, top)


def _grid(*axes: Any) -> np.ndarray:
    return np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], 1).astype(np.float32)
