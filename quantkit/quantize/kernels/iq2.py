"""IQ2_XXS, IQ2_XS, IQ2_S: signed groups of 8 from a codebook of magnitudes 8, 25, 43."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, How, Importance, Tile
from quantkit.quantize.grids import grid, lanes
from quantkit.quantize.kernels._common import GGML, f16_bits, f16_value, helper, kernel
from quantkit.quantize.kernels._grid import (
    best_scale, block_gain, fit_unit, flip8, pick, products8, sample,
)
from quantkit.quantize.kernels._simd import lane, splat8
from quantkit.types import GgmlType

SUPER = 256
GROUPS = 32


@helper
def load_weights(q: np.ndarray, at: int, w: np.ndarray) -> None:
    """Importance of a super-block scaled to a peak of 1, uniform if it is zero everywhere."""
    peak = np.float32(0.0)
    for i in range(w.size):
        peak = max(peak, q[at + i])
    for i in range(w.size):
        w[i] = max(q[at + i] / peak, np.float32(1e-8)) if peak > 0 else np.float32(1.0)


@helper
def load_block(row: np.ndarray, at: int, x: np.ndarray) -> Any:
    peak = np.float32(0.0)
    for i in range(x.size):
        peak = max(peak, abs(row[at + i]))
    if peak < np.float32(1e-15):
        return np.float32(0.0)
    peak = min(peak, np.float32(1e30))
    for i in range(x.size):
        x[i] = row[at + i] / peak
    return peak


@kernel
def _encode(
    x: np.ndarray, q: np.ndarray, weighting: int, c: float, levels: np.ndarray, squares: np.ndarray,
    per: int, parity: bool, spread: np.ndarray, samples: int, tries: np.ndarray, refits: int,
    d_out: np.ndarray, l_out: np.ndarray, entries: np.ndarray, signs: np.ndarray,
) -> None:
    n = levels.size // 8
    blocks = GROUPS // per
    wq = np.empty(SUPER, np.float32)
    w = np.empty(SUPER, np.float32)
    v = np.empty(SUPER, np.float32)
    u = np.empty(SUPER, np.float32)
    a = np.empty(GROUPS * n, np.float32)
    b = np.empty(GROUPS * n, np.float32)
    values = np.empty(blocks * samples, np.float32)
    first = np.empty(blocks, np.float32)
    step = np.empty(blocks, np.float32)
    best = np.empty(blocks, np.float32)
    ls = np.empty(blocks, np.int32)
    for sb in range(x.shape[1] // SUPER):
        load_weights(q, sb * SUPER, wq)
        if weighting != GGML:
            w[:] = wq
            for g in range(GROUPS):
                products8(w, g * 8, squares, n, a, g * n)
        for r in range(x.shape[0]):
            peak = load_block(x[r], sb * SUPER, v)
            if peak == 0:
                continue
            if weighting == GGML:
                s2 = np.float32(0.0)
                for i in range(SUPER):
                    s2 += v[i] * v[i]
                s2 = s2 / np.float32(SUPER) * np.float32(c)
                for i in range(SUPER):
                    w[i] = wq[i] * np.sqrt(s2 + v[i] * v[i])
                for g in range(GROUPS):
                    products8(w, g * 8, squares, n, a, g * n)
            for i in range(SUPER):
                u[i] = np.float32(2.0) * w[i] * abs(v[i])
            for g in range(GROUPS):
                products8(u, g * 8, levels, n, b, g * n)
                bits = 0
                odd = 0
                for j in range(8):
                    neg = x[r, sb * SUPER + g * 8 + j] < 0
                    bits |= neg << j
                    odd ^= neg
                signs[r, sb, g] = bits
                if parity and odd:
                    flip8(u, g * 8, levels, n, b, g * n)
            span = per * 8
            for k in range(blocks):
                wx = np.float32(0.0)
                ww = np.float32(0.0)
                for i in range(k * span, (k + 1) * span):
                    wx += w[i] * v[i] * v[i]
                    ww += w[i]
                rms = max(np.sqrt(wx / ww), np.float32(1e-6))
                first[k] = rms * spread[0]
                step[k] = rms * spread[1]
                for i in range(samples):
                    values[k * samples + i] = np.float32(0.0)
                for g in range(k * per, (k + 1) * per):
                    sample(a, g * n, b, g * n, n, first[k], step[k], values, k * samples, samples)
                best[k] = best_scale(values, k * samples, samples, first[k], step[k])
            unit = fit_unit(values, samples, first, step, best, tries, 15)
            for it in range(refits):
                db = f16_bits(min(unit * peak * np.float32(8.0), np.float32(65504.0)))
                d = f16_value(db)
                unit = d / (peak * np.float32(8.0))
                if unit == 0:
                    break
                num = np.float32(0.0)
                den = np.float32(0.0)
                for k in range(blocks):
                    gain, l = block_gain(values, k * samples, samples, first[k], step[k], splat8(unit), best[k], 15)
                    ls[k] = np.int32(lane(l, 0))
                    m = np.float32(2 * ls[k] + 1)
                    for g in range(k * per, (k + 1) * per):
                        e = pick(a, g * n, b, g * n, n, unit * m)
                        entries[r, sb, g] = e
                        num += m * b[g * n + e]
                        den += m * m * a[g * n + e]
                d_out[r, sb] = db
                for k in range(blocks):
                    l_out[r, sb, k] = ls[k]
                unit = np.float32(0.5) * num / den
            if parity:
                for g in range(GROUPS):
                    bits = signs[r, sb, g]
                    odd = 0
                    for j in range(8):
                        odd ^= (bits >> j) & 1
                    if odd:
                        least = u[g * 8] * levels[entries[r, sb, g]]
                        at = 0
                        for j in range(1, 8):
                            cost = u[g * 8 + j] * levels[j * n + entries[r, sb, g]]
                            if cost < least:
                                least = cost
                                at = j
                        signs[r, sb, g] = bits ^ (1 << at)
