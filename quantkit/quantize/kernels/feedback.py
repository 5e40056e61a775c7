"""Rounding with feedback inside a super-block: scales stand, codes are chosen one after the other.

Columns of a weight meet correlated inputs, so the error of one can be made good by the next. The
error x - x^ of every finished group of columns is added, times `couple`, to what the later ones
aim at:

    z_j += (ref_k - x^_k) couple[k, j],   k < j.

With ref = x and couple = the unit upper factor of the inputs' Gram matrix this is LDLQ (QuIP,
arXiv 2307.13304, 4.1); with ref = the codes so far and couple[k, j] = H_kj / H_jj it is one round
of coordinate descent on the same error (QuantEase, arXiv 2309.01885). A group of 8 that shares an
entry of a codebook is one column of vectors, and `metric` says what an error within it costs.
"""

from __future__ import annotations

import numpy as np

from quantkit.quantize.kernels._common import helper, kernel
from quantkit.quantize.kernels._scales import LANES
from quantkit.quantize.kernels._simd import (
    absolute,
    as_i32,
    fma,
    load8,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    store,
    transpose8,
)
from quantkit.quantize.kernels.feedback_groups import EVEN, FREE, GROUP, NONE, round_entries

__all__ = ["EVEN", "FREE", "GROUP", "NONE", "round_entries", "round_levels"]

_ZERO = np.float32(0.0)


@helper
def _gather(a: np.ndarray, row: int, out: np.ndarray) -> None:
    """out[8 k + i] = a[row + i, k], the last row for those beyond it."""
    rows, n = a.shape
    if row + LANES <= rows and n % LANES == 0:
        for k in range(0, n, LANES):
            transpose8(a, row * n + k, n, out, LANES * k)
        return
    for i in range(LANES):
        r = min(row + i, rows - 1)
        for k in range(n):
            out[LANES * k + i] = a[r, k]


@helper
def _pull(z: np.ndarray, lost: np.ndarray, couple: np.ndarray, k: int) -> None:
    """z[8 k ..] += sum over i < k of lost[8 i ..] couple[k, i]."""
    v0 = load8(z, LANES * k)
    v1 = splat8(_ZERO)
    v2, v3 = v1, v1
    whole = k // 4 * 4
    for i in range(0, whole, 4):
        v0 = fma(load8(lost, LANES * i), couple[k, i], v0)
        v1 = fma(load8(lost, LANES * i + 8), couple[k, i + 1], v1)
        v2 = fma(load8(lost, LANES * i + 16), couple[k, i + 2], v2)
        v3 = fma(load8(lost, LANES * i + 24), couple[k, i + 3], v3)
    for i in range(whole, k):
        v0 = fma(load8(lost, LANES * i), couple[k, i], v0)
    store(z, LANES * k, (v0 + v1) + (v2 + v3))


@kernel
def round_levels(
    z: np.ndarray,
    ref: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    values: np.ndarray,
    couple: np.ndarray,
    codes: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """Choose among scale * values + offset; `values` ascend.

    z, ref, chosen f32[rows, n]; scale, offset f32[rows, n / sub]; couple f32[n, n]; codes u8[rows,
    n] are places in `values`.
    """
    rows, n = z.shape
    sub = n // scale.shape[1]
    top = values.size - 1
    step = (values[top] - values[0]) / np.float32(top)
    even = True
    for i in range(top):
        even &= values[i + 1] - values[i] == step
    inverse_step = np.float32(1.0) / step
    pulled = couple.T.copy()
    aim, want = np.empty(LANES * n, np.float32), np.empty(LANES * n, np.float32)
    lost, found = np.empty(LANES * n, np.float32), np.empty(LANES * n, np.float32)
    places = np.empty(LANES * n, np.int32)
    scales = np.empty(LANES * scale.shape[1], np.float32)
    offsets = np.empty(LANES * scale.shape[1], np.float32)
    for row in range(0, rows, LANES):
        _gather(z, row, aim)
        _gather(ref, row, want)
        _gather(scale, row, scales)
        _gather(offset, row, offsets)
        for k in range(n):
            _pull(aim, lost, pulled, k)
            at = LANES * k
            s, o = load8(scales, LANES * (k // sub)), load8(offsets, LANES * (k // sub))
            alive = absolute(s) > _ZERO
            t = (load8(aim, at) - o) / select(alive, s, np.float32(1.0))
            t = select(alive, t, _ZERO)
            if even:
                i = rint((t - values[0]) * inverse_step)
                i = minimum(maximum(i, _ZERO), np.float32(top))
                value = fma(i, step, values[0])
                place = as_i32(i)
            else:
                value = splat8(values[0])
                place = splat8(np.int32(0))
                for m in range(top):
                    above = t + t > values[m] + values[m + 1]
                    value = select(above, values[m + 1], value)
                    place = select(above, np.int32(m + 1), place)
            value = s * value + o
            store(places, at, place)
            store(found, at, value)
            store(lost, at, load8(want, at) - value)
        for i in range(min(LANES, rows - row)):
            for k in range(n):
                codes[row + i, k] = places[LANES * k + i]
                chosen[row + i, k] = found[LANES * k + i]
