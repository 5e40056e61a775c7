"""Q2_K to Q6_K: super-blocks of 256 with integer sub-scales.

Q2_K, Q4_K, Q5_K are affine, x = d s q - dmin m; Q3_K and Q6_K have a scale only, x = d s q.
Byte layouts are told beside the functions that write them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.kernels._common import helper, kernel, prepared, read_f16
from quantkit.quantize.kernels._simd import (
    lane,
    load8,
    maximum,
    minimum,
    rint,
    splat8,
    store,
)
from quantkit.quantize.kernels._super import (
    SUPER,
    face_down,
    load_super,
    scaled_searcher,
    search_affine,
)
from quantkit.quantize.kernels._tile import (
    NO_ROOTS,
    codes,
    ggml_weights,
    put_f16,
    reciprocal,
    root_mean_squares,
    scale_fitters,
    scale_pickers,
    weight_tiles,
)
from quantkit.types import GgmlType


@helper
def _put_q2(
    out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any, dmin: Any, sm: Any
) -> None:
    """`scales[16] qs[64] d dmin`: nibbles (s, m); 2 bits of elements l, l + 32, ... per byte."""
    top, zero = np.float32(3.0), np.float32(0.0)
    for b in range(16):
        out[at + b] = np.int32(sm[0, b]) | np.int32(sm[1, b]) << 4
    for part in range(0, 64, 8):
        packed = splat8(0)
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
        high = splat8(0)
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
        packed = splat8(0)
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
        half, first = part // 32, part % 32
        e = begin + 128 * half + first
        high = splat8(0)
        q0, q1 = high, high
        for k in range(4):
            inv = reciprocal(d * s[8 * half + 2 * k + first // 16])
            q = codes(load8(row, e + 32 * k), np.float32(0.0), inv, low, top)
            high = high | ((q >> 4) << (2 * k))
            nibble = (q & 15) << (4 * (k // 2))
            if k % 2:
                q1 = q1 | nibble
            else:
                q0 = q0 | nibble
        store(out, at + 64 * half + first, q0)
        store(out, at + 64 * half + 32 + first, q1)
        store(out, at + 128 + part, high)
    for b in range(16):
        out[at + 192 + b] = np.int32(s[b])
    put_f16(out, at + 208, d)


@helper
def _nearest(t: Any, low: Any, high: Any) -> Any:
    return maximum(minimum(rint(t), high), low)


_residual, _scan_scales, _polish = scale_fitters(_nearest)
_error, _pick = scale_pickers(_nearest)
_search_scaled = scaled_searcher(_residual, _scan_scales, _error)


@kernel
def _encode_scaled(
    x: np.ndarray, weights: np.ndarray, roots: np.ndarray, form: Any, plan: Any, out: np.ndarray
) -> None:
    """Q3_K and Q6_K; `form` is (lowest code, highest code, least s, most s)."""
    low, high, least_s, most_s = form
    supers = x.shape[1] // SUPER
    block_bytes = out.shape[1] // supers
    tiles = np.empty(SUPER, np.float32)
    scratch = np.empty(SUPER, np.float32)
    found = np.zeros(16, np.float32)
    for r in range(x.shape[0]):
        for b in range(supers):
            begin = b * SUPER
            up = load_super(x[r], begin, 16, tiles)
            w = weights[begin : begin + SUPER]
            if roots.size:
                ggml_weights(tiles, w, SUPER // 8, roots[r, b] / up, scratch)
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
    x: np.ndarray, weights: np.ndarray, roots: np.ndarray, form: Any, plan: Any, out: np.ndarray
) -> None:
    """Q2_K, Q4_K, Q5_K; `form` is (highest code, highest s and m)."""
    top, limit = form
    size = 16 if limit < 16.0 else 32
    supers = x.shape[1] // SUPER
    block_bytes = out.shape[1] // supers
    tiles = np.empty(SUPER, np.float32)
    scratch = np.empty(SUPER, np.float32)
    found = np.zeros((2, SUPER // size), np.float32)
    for r in range(x.shape[0]):
        for b in range(supers):
            begin = b * SUPER
            up = load_super(x[r], begin, size, tiles)
            w = weights[begin : begin + SUPER]
            if roots.size:
                ggml_weights(tiles, w, SUPER // 8, roots[r, b] / up, scratch)
                w = scratch
            sign = face_down(tiles, size)
            d, dmin = search_affine(tiles, w, size, up, form, plan, found)
            d0, dmin0 = lane(d * up, 0) * sign, lane(dmin * up, 0) * sign
            if size == 16:
                _put_q2(out[r], b * block_bytes, x[r], begin, d0, dmin0, found)
            else:
                _put_q45(out[r], b * block_bytes, x[r], begin, d0, dmin0, found, top)


Plan = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def _scan(low: float, high: float, n: int) -> np.ndarray:
    return np.linspace(low, high, n).astype(np.float32)


def _pairs(*axes: Any) -> np.ndarray:
    grid = np.meshgrid(*axes, indexing="ij")
    return np.stack([g.ravel() for g in grid], axis=1).astype(np.float32)


@cache
def _affine_plan(top: int, effort: Effort, weighted: bool) -> Plan:
    """(tries, starts, moves, rounds) of `search_affine`.

    Whole numbers of steps come first: they, or their doubles, meet weights that lie on a lattice
    already. Without importance the tails are less worth cutting off, and llama.cpp is faster.
    """
    whole = _pairs({3: (1, 2, 3), 15: range(8, 16), 31: range(16, 32, 2)}[top], [0])
    if effort == "best":
        tries = _pairs(top * _scan(0.9, 1.4, 21), _scan(0, 1, 5))
        starts = np.array([(1, 1), (0.95, 1), (1, 0.95), (1.05, 1.05)], np.float32)
        return np.concatenate([whole, tries]), starts, _pairs(range(-2, 3), range(-2, 3)), 3
    if effort == "fast":
        steps, rounds = _scan(0.95, 1.3, 6), 1
    elif weighted:
        steps, rounds = _scan(0.92, 1.35, 9), 2 if top > 15 else 3
    else:
        steps, rounds = _scan(0.92, 1.25, 7), 2
    tries = np.concatenate([whole, _pairs(top * steps, (0, 0.5, 1))])
    return tries, _pairs([1], [1]), _pairs((-1, 0, 1), (-1, 0, 1)), rounds


# Steps from zero to a sub-block's peak. Coarse codes profit from cutting off the tails, fine ones
# from many alignments; 2 and 3 steps meet ternary and similar lattices.
_STEPS3: dict[Effort, np.ndarray] = {
    "fast": np.array([2, 3, 3.6, 4.1, 4.7, 5.6]),
    "default": np.array([2, 3, 3.4, 3.65, 3.85, 4.05, 4.3, 4.6, 5, 5.5, 6.2]),
    "best": np.r_[2, _scan(3, 8, 41)],
}
_STEPS3_WEIGHTED = np.r_[2, 3, _scan(3.3, 5.3, 14), 5.8, 6.6]
_STEPS6: dict[Effort, np.ndarray] = {
    "fast": _scan(28, 38, 9),
    "default": _scan(27, 40, 24),
    "best": _scan(26, 42, 60),
}


@cache
def _scaled_plan(steps: int, effort: Effort, weighted: bool) -> Plan:
    """(ks, starts, moves, rounds) of `scaled_searcher`.

    Without importance llama.cpp's Q3_K is three times as fast, so less is tried.
    """
    ks = (_STEPS3 if steps == 4 else _STEPS6)[effort]
    starts, radius, rounds = {
        "fast": ([-1.0], 1, 1),
        "default": ([-1.0, 1.0], 1, 2),
        "best": ([-1, 1, -1.04, 1.04], 3, 3),
    }[effort]
    if steps > 4:
        radius += 1
    elif weighted and effort == "default":
        ks, starts = _STEPS3_WEIGHTED, [*starts, -1.03, 1.06]
    signed = np.concatenate([ks, -ks]).astype(np.float32)
    moves = np.arange(-radius, radius + 1, dtype=np.float32)
    return signed, np.array(starts, np.float32), moves, rounds


def _roots(x: Tile, how: How, c: float) -> np.ndarray:
    return root_mean_squares(x, SUPER, c) if how.weighting == "ggml" and c else NO_ROOTS


def _affine(type_: GgmlType, top: int, limit: int, c: float) -> Codec:
    form = (np.float32(top), np.float32(limit))

    def encode(x: Tile, importance: Importance | None, how: How) -> Blocks:
        x, out = prepared(x, type_)
        w = weight_tiles(importance, x.shape[1], 16 if limit == 15 else 32, SUPER)
        plan = _affine_plan(top, how.effort, importance is not None)
        _encode_affine(x, w, _roots(x, how, c), form, plan, out)
        return out

    return Codec(type_, encode, _decode_q2 if top == 3 else _decode_q4 if top == 15 else _decode_q5)


def _scaled(type_: GgmlType, steps: int, limit: int, c: float) -> Codec:
    form = tuple(np.float32(v) for v in (-steps, steps - 1, -limit, limit - 1))

    def encode(x: Tile, importance: Importance | None, how: How) -> Blocks:
        x, out = prepared(x, type_)
        w = weight_tiles(importance, x.shape[1], 16, SUPER)
        plan = _scaled_plan(steps, how.effort, importance is not None)
        _encode_scaled(x, w, _roots(x, how, c), form, plan, out)
        return out

    return Codec(type_, encode, _decode_q3 if steps == 4 else _decode_q6)


def _two_bits(b: np.ndarray) -> np.ndarray:
    """u8[n, 64] -> codes u8[n, 256]: element 128 h + 32 k + l at bits 2 k of byte 32 h + l."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (b.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, SUPER)


def _decode_q2(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 84)
    scale = read_f16(b, 80) * (b[:, :16] & 15)
    base = read_f16(b, 82) * (b[:, :16] >> 4)
    q = _two_bits(b[:, 16:80]).reshape(-1, 16, 16)
    return (scale[:, :, None] * q - base[:, :, None]).reshape(len(blocks), -1)


def _decode_q3(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 110)
    low, high = b[:, 96:104], b[:, 104:108]
    nibbles = np.concatenate([low & 15, low >> 4], axis=1)
    tops = np.concatenate([high >> k & 3 for k in (0, 2, 4, 6)], axis=1)
    scale = read_f16(b, 108) * ((nibbles | tops << 4).astype(np.float32) - 32)
    third = b[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    q = _two_bits(b[:, 32:96]) | third.reshape(-1, SUPER) << 2
    q = q.reshape(-1, 16, 16).astype(np.float32) - 4
    return (scale[:, :, None] * q).reshape(len(blocks), -1)


def _scales_and_mins(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d s and dmin m f32[n, 8, 1] from the first 16 bytes of Q4_K and Q5_K."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    s = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    m = np.concatenate([mid & 63, high >> 4 | mid >> 6 << 4], axis=1)
    return (read_f16(b, 0) * s)[:, :, None], (read_f16(b, 2) * m)[:, :, None]


def _decode_q4(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 144)
    scale, base = _scales_and_mins(b)
    pairs = b[:, 16:].reshape(-1, 4, 32)
    q = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    return (scale * q - base).reshape(len(blocks), -1)


def _decode_q5(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 176)
    scale, base = _scales_and_mins(b)
    pairs = b[:, 48:].reshape(-1, 4, 32)
    q = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return (scale * (q | fifth << 4) - base).reshape(len(blocks), -1)


def _decode_q6(blocks: Blocks) -> Tile:
    b = blocks.reshape(-1, 210)
    low = b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    code = low.reshape(-1, SUPER) | high.reshape(-1, SUPER) << 4
    scale = read_f16(b, 208) * np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    q = code.reshape(-1, 16, 16).astype(np.float32) - 32
    return (scale[:, :, None] * q).reshape(len(blocks), -1)


# c is the constant of llama.cpp's weights q sqrt(c mean(x^2) + x^2); Q6_K has none.
CODECS = (
    _affine(GgmlType.Q2_K, 3, 15, 1.0),
    _affine(GgmlType.Q4_K, 15, 63, 2.0),
    _affine(GgmlType.Q5_K, 31, 63, 2.0),
    _scaled(GgmlType.Q3_K, 4, 32, 2.0),
    _scaled(GgmlType.Q6_K, 32, 128, 0.0),
)
