"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 with scales of their own.

Byte layouts (low nibbles and low bits are the first elements):
Q4_0 `d:f16 qs[16]`, Q5_0 `d:f16 qh:u32 qs[16]`, x = d (code - 8) and d (code - 16);
Q4_1 `d:f16 m:f16 qs[16]`, Q5_1 `d:f16 m:f16 qh:u32 qs[16]`, x = d code + m;
Q8_0 `d:f16 int8[32]`, x = d code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, Effort, How, Importance, Tile
from quantkit.quantize.kernels._common import helper, kernel, prepared, read_f16
from quantkit.quantize.kernels._simd import (
    as_i32,
    f16_near,
    fma,
    lane,
    largest,
    load8,
    mask_bits,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    store,
    total,
)
from quantkit.quantize.kernels._tile import (
    F16_MAX,
    LANES,
    NO_ROOTS,
    TINY,
    codes,
    fit_affine,
    ggml_weights,
    normalise,
    polish_affine,
    put_f16,
    reciprocal,
    root_mean_squares,
    scale_fitters,
    scale_pickers,
    transpose,
    weight_tiles,
)
from quantkit.types import GgmlType

SIZE = 32


@helper
def _nearest(t: Any, low: Any, high: Any) -> Any:
    return maximum(minimum(rint(t), high), low)


_residual, _best_scale, _polish = scale_fitters(_nearest)
_error, _pick = scale_pickers(_nearest)


@helper
def _put_codes(out: np.ndarray, at: int, row: np.ndarray, begin: int, form: Any) -> None:
    """Codes clamp(rint((x - m) / d) + offset, 0, top) of a block; fifth bits before nibbles."""
    d, m, offset, top = form
    inv = reciprocal(d)
    wide = top > 15
    nibbles = at + 4 if wide else at
    for half in range(2):
        low = codes(load8(row, begin + 8 * half), m, inv, offset, top)
        high = codes(load8(row, begin + 8 * half + 16), m, inv, offset, top)
        if wide:
            out[at + half] = mask_bits(low > 15)
            out[at + half + 2] = mask_bits(high > 15)
        store(out, nibbles + 8 * half, (low & 15) | ((high & 15) << 4))


@helper
def _put_bytes(out: np.ndarray, at: int, row: np.ndarray, begin: int, d: Any) -> None:
    inv = reciprocal(d)
    for i in range(0, SIZE, 8):
        q = rint(load8(row, begin + i) * inv)
        store(out, at + i, as_i32(maximum(minimum(q, np.float32(127.0)), np.float32(-127.0))))


@kernel
def _encode_scaled(
    x: np.ndarray,
    weights: np.ndarray,
    roots: np.ndarray,
    bounds: Any,
    search: Any,
    out: np.ndarray,
) -> None:
    """Q4_0, Q5_0, Q8_0: x = d q with q in bounds = (low, high); `search` is (ks, refits)."""
    low, high = bounds
    ks, refits = search
    blocks = x.shape[1] // SIZE
    block_bytes = out.shape[1] // blocks
    tile = np.empty(LANES * SIZE, np.float32)
    scratch = np.empty(LANES * SIZE, np.float32)
    for r in range(x.shape[0]):
        for first in range(0, blocks, LANES):
            count = min(LANES, blocks - first)
            transpose(x[r], first * SIZE, count, SIZE, tile, 0)
            up = normalise(tile, SIZE)
            w = weights[first * SIZE : (first + LANES) * SIZE]
            if roots.size:
                ggml_weights(tile, w, SIZE, roots[r, 0] / up, scratch)
                w = scratch
            levels = (splat8(low), splat8(high))
            if high > 100.0:
                d = up * _pick(tile, w, SIZE, levels, up, ks)
            else:
                scale = _best_scale(tile, w, SIZE, levels, ks)
                d = up * _polish(tile, w, SIZE, levels, scale, up, refits)
            for b in range(count):
                at = (first + b) * block_bytes
                begin = (first + b) * SIZE
                put_f16(out[r], at, lane(d, b))
                if high > 100.0:
                    _put_bytes(out[r], at + 2, x[r], begin, lane(d, b))
                else:
                    form = (lane(d, b), np.float32(0.0), -low, high - low)
                    _put_codes(out[r], at + 2, x[r], begin, form)


@kernel
def _encode_affine(
    x: np.ndarray,
    weights: np.ndarray,
    roots: np.ndarray,
    top: Any,
    search: Any,
    out: np.ndarray,
) -> None:
    """Q4_1 and Q5_1: x = d q + m with q in 0..top; `search` is (tries, refits)."""
    tries, refits = search
    blocks = x.shape[1] // SIZE
    block_bytes = out.shape[1] // blocks
    tile = np.empty(LANES * SIZE, np.float32)
    scratch = np.empty(LANES * SIZE, np.float32)
    for r in range(x.shape[0]):
        for first in range(0, blocks, LANES):
            count = min(LANES, blocks - first)
            transpose(x[r], first * SIZE, count, SIZE, tile, 0)
            up = normalise(tile, SIZE)
            w = weights[first * SIZE : (first + LANES) * SIZE]
            if roots.size:
                ggml_weights(tile, w, SIZE, roots[r, 0] / up, scratch)
                w = scratch
            start = fit_affine(tile, w, SIZE, top, tries, False)
            d, m = polish_affine(tile, w, SIZE, top, start, up, refits)
            d = d * up
            m = m * up
            for b in range(count):
                at = (first + b) * block_bytes
                put_f16(out[r], at, lane(d, b))
                put_f16(out[r], at + 2, lane(m, b))
                form = (lane(d, b), lane(m, b), np.float32(0.0), top)
                _put_codes(out[r], at + 4, x[r], (first + b) * SIZE, form)


@helper
def _plain_first(row: np.ndarray, low: Any, high: Any, affine: bool, fits: np.ndarray) -> None:
    """llama.cpp's scale of every block into `fits[0]` and `fits[1]`: d and m from the extremes."""
    for b in range(row.size // SIZE):
        v = load8(row, b * SIZE)
        least, most = v, v
        for i in range(8, SIZE, 8):
            v = load8(row, b * SIZE + i)
            least = minimum(least, v)
            most = maximum(most, v)
        fits[0, b] = largest(most)
        fits[1, b] = -largest(-1.0 * least)
    for b in range(0, fits.shape[1], 8):
        top, bottom = load8(fits[0], b), load8(fits[1], b)
        if affine:
            store(fits[0], b, top / high - bottom / high)
        else:
            store(fits[0], b, select(top > -1.0 * bottom, top, bottom) / low)
            store(fits[1], b, bottom * 0.0)


@helper
def _plain_refit(row: np.ndarray, low: Any, high: Any, affine: bool, fits: np.ndarray) -> None:
    """One least-squares step of `fits[0]` and `fits[1]`, rounded to f16; the rest is scratch."""
    for b in range(row.size // SIZE):
        d, m = fits[0, b], fits[1, b]
        inv = np.float32(1.0) / d if abs(d) > TINY else np.float32(0.0)
        r1 = splat8(np.float32(0.0))
        rq, q1, qq = r1, r1, r1
        for i in range(0, SIZE, 8):
            t = (load8(row, b * SIZE + i) - m) * inv
            q = _nearest(t, low, high)
            r1 = r1 + (t - q)
            rq = fma(t - q, q, rq)
            q1 = q1 + q
            qq = fma(q, q, qq)
        fits[2, b] = total(rq)
        fits[3, b] = total(qq)
        if affine:
            fits[4, b] = total(r1)
            fits[5, b] = total(q1)
    for b in range(0, fits.shape[1], 8):
        d, m, rq, qq = load8(fits[0], b), load8(fits[1], b), load8(fits[2], b), load8(fits[3], b)
        if affine:
            r1, q1 = load8(fits[4], b), load8(fits[5], b)
            det = maximum(qq * SIZE - q1 * q1, np.float32(1.0))  # whole; 0 if all codes agree
            m = m + d * ((r1 * qq - rq * q1) / det)
            d = d + d * ((rq * SIZE - r1 * q1) / det)
        else:
            d = d + d * (rq / maximum(qq, TINY))
        store(fits[0], b, f16_near(maximum(minimum(d, F16_MAX), -F16_MAX)))
        store(fits[1], b, f16_near(maximum(minimum(m, F16_MAX), -F16_MAX)))


@kernel
def _encode_plain(x: np.ndarray, low: Any, high: Any, affine: bool, out: np.ndarray) -> None:
    """Q4_0, Q5_0, Q4_1, Q5_1 in a hurry: no search and no weights."""
    blocks = x.shape[1] // SIZE
    block_bytes = out.shape[1] // blocks
    fits = np.zeros((6, (blocks + 7) // 8 * 8), np.float32)
    for r in range(x.shape[0]):
        _plain_first(x[r], low, high, affine, fits)
        _plain_refit(x[r], low, high, affine, fits)
        for b in range(blocks):
            at, begin = b * block_bytes, b * SIZE
            d, m = fits[0, b], fits[1, b]
            put_f16(out[r], at, d)
            if affine:
                put_f16(out[r], at + 2, m)
                _put_codes(out[r], at + 4, x[r], begin, (d, m, -low, high))
            else:
                _put_codes(out[r], at + 2, x[r], begin, (d, m, -low, high - low))


def _both_signs(*ks: float) -> np.ndarray:
    return np.array([*ks, *(-k for k in ks)], np.float32)


def _scan(low: float, high: float, n: int) -> np.ndarray:
    return np.linspace(low, high, n).astype(np.float32)


def _affine_tries(steps: np.ndarray, cuts: int, whole: range) -> np.ndarray:
    shares = np.linspace(0, 1, cuts)
    tries = [(k, 0.0) for k in whole] + [(k, a) for k in steps for a in shares]
    return np.array(tries, np.float32)


Search = tuple[np.ndarray, int]

# Steps from zero to the peak, both signs, then rounds of polish. The whole numbers are there for
# weights that lie on a lattice already: 4..8 holds a multiple, by a power of two, of every number
# of steps up to 8, and such a multiple leaves the f16 scale exact. They come first, for of equals
# the first is kept.
_KS4: dict[Effort, Search] = {
    "fast": (_both_signs(4, 7, 7.5, 8, 8.5, 9.2, 10), 1),
    "default": (_both_signs(*range(4, 9), *_scan(6.6, 9, 13), 9.5, 10.2, 11, 12.5), 2),
    "best": (_both_signs(*range(4, 9), *_scan(6.5, 10, 50), *_scan(10.2, 16, 20)), 4),
}
_KS5: dict[Effort, Search] = {
    "fast": (_both_signs(8, 12, 14, 14.5, 15, 15.5, 16, 17), 1),
    "default": (_both_signs(*range(8, 15), *_scan(14, 19, 21)), 2),
    "best": (_both_signs(*range(8, 15), *_scan(14, 26, 97)), 4),
}
_KS8: dict[Effort, Search] = {
    "fast": (_scan(127, 112, 2), 0),
    "default": (np.r_[_scan(127, 118, 8), 112, 96, 80, 64].astype(np.float32), 0),
    "best": (np.r_[_scan(127, 100, 109), _scan(99, 64, 36)].astype(np.float32), 0),
}
_TRIES4: dict[Effort, Search] = {
    "fast": (_affine_tries(_scan(15, 18, 5), 3, range(8, 16)), 2),
    "default": (_affine_tries(_scan(14, 21, 13), 5, range(8, 16)), 3),
    "best": (_affine_tries(_scan(13.5, 21, 61), 9, range(8, 16)), 3),
}
_TRIES5: dict[Effort, Search] = {
    "fast": (_affine_tries(_scan(29, 33.5, 7), 3, range(16, 32, 2)), 2),
    "default": (_affine_tries(_scan(28.5, 37.5, 25), 3, range(16, 32)), 3),
    "best": (_affine_tries(_scan(28, 42, 61), 9, range(16, 32)), 3),
}


# Without importance llama.cpp only rounds, many times faster than any search.
_HURRY = How("fast", "importance")


def _roots(x: Tile, how: How) -> np.ndarray:
    return root_mean_squares(x, x.shape[1], 1.0) if how.weighting == "ggml" else NO_ROOTS


def _scaled(type_: GgmlType, low: int, high: int, searches: dict[Effort, Search]) -> Codec:
    bounds = (np.float32(low), np.float32(high))

    def encode(x: Tile, importance: Importance | None, how: How) -> Blocks:
        x, out = prepared(x, type_)
        if importance is None and how == _HURRY and high < 127:
            _encode_plain(x, *bounds, False, out)
            return out
        w = weight_tiles(importance, x.shape[1], SIZE, SIZE)
        # llama.cpp has no weighting of its own for Q8_0.
        roots = _roots(x, how) if type_ is not GgmlType.Q8_0 else NO_ROOTS
        _encode_scaled(x, w, roots, bounds, searches[how.effort], out)
        return out

    def decode(blocks: Blocks) -> Tile:
        b = blocks.reshape(-1, type_.block_bytes)
        if type_ is GgmlType.Q8_0:
            q = b[:, 2:].view(np.int8).astype(np.float32)
        else:
            q = _read_codes(b[:, 2:], high > 7) + np.float32(low)
        return (read_f16(b, 0) * q).reshape(len(blocks), -1)

    return Codec(type_, encode, decode)


def _affine(type_: GgmlType, top: int, searches: dict[Effort, Search]) -> Codec:
    def encode(x: Tile, importance: Importance | None, how: How) -> Blocks:
        x, out = prepared(x, type_)
        if importance is None and how == _HURRY:
            _encode_plain(x, np.float32(0), np.float32(top), True, out)
            return out
        w = weight_tiles(importance, x.shape[1], SIZE, SIZE)
        _encode_affine(x, w, _roots(x, how), np.float32(top), searches[how.effort], out)
        return out

    def decode(blocks: Blocks) -> Tile:
        b = blocks.reshape(-1, type_.block_bytes)
        q = _read_codes(b[:, 4:], top > 15)
        return (q * read_f16(b, 0) + read_f16(b, 2)).reshape(len(blocks), -1)

    return Codec(type_, encode, decode)


def _read_codes(b: np.ndarray, fifth_bits: bool) -> np.ndarray:
    nibbles = b[:, 4:] if fifth_bits else b
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if fifth_bits:
        codes |= np.unpackbits(b[:, :4], axis=1, bitorder="little") << 4
    return codes.astype(np.float32)


CODECS = (
    _scaled(GgmlType.Q4_0, -8, 7, _KS4),
    _scaled(GgmlType.Q5_0, -16, 15, _KS5),
    _scaled(GgmlType.Q8_0, -127, 127, _KS8),
    _affine(GgmlType.Q4_1, 15, _TRIES4),
    _affine(GgmlType.Q5_1, 31, _TRIES5),
)
