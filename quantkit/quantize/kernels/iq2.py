"""IQ2_XXS, IQ2_XS, IQ2_S: signed groups of 8 from a codebook of magnitudes 8, 25, 43."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, How, Importance, Tile
from quantkit.quantize.grids import grid, lanes
from quantkit.quantize.kernels._common import GGML, f16_bits, f16_value, helper, kernel
from quantkit.quantize.kernels._codebook import (
    flips8, pick, products8, sample,sign_bits,is_odd
)
import math
from quantkit.quantize.kernels._scales import *
from quantkit.quantize.kernels._simd import lane, splat8
from quantkit.types import GgmlType

GROUPS = 32


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
    bends = np.empty(blocks * samples, np.float32)
    part = np.empty(samples, np.float32)
    first = np.empty(blocks, np.float32)
    step = np.empty(blocks, np.float32)
    best = np.empty(blocks, np.float32)
    ls = np.empty(blocks, np.int32)
    code = np.empty(GROUPS, np.int32)
    sg = np.empty(GROUPS, np.int32)
    for sb in range(x.shape[1] // SUPER):
        load_importance(q, sb * SUPER, wq)
        if weighting != GGML:
            for i in range(SUPER):
                w[i] = wq[i]
            for g in range(GROUPS):
                products8(w, g * 8, squares, n, a, g * n)
        for r in range(x.shape[0]):
            e = load_weights(x[r], sb * SUPER, v)
            if e == -1000:
                continue
            up=np.float32(math.ldexp(1.0, e))
            if weighting == GGML:
                ggml_weights(v, wq, c, w)
                for g in range(GROUPS):
                    products8(w, g * 8, squares, n, a, g * n)
            for i in range(SUPER):
                u[i] = np.float32(2.0) * w[i] * abs(v[i])
            lay_samples(v, w, blocks, spread, samples, first, step)
            for i in range(values.size):
                values[i] = np.float32(0.0)
            for g in range(GROUPS):
                products8(u, g * 8, levels, n, b, g * n)
                sg[g] = sign_bits(v, g * 8)
                if parity and is_odd(sg[g]):
                    flips8(u, g * 8, levels, n, b, g * n)
                k = g // per
                sample(a, b, g * n, n, first[k], step[k], part)
                for i in range(samples):
                    values[i * blocks + k] += part[i]
            best_scales(values, blocks, samples, first, step, best)
            find_bends(values, blocks, samples, bends)
            unit = fit_unit(values, bends, blocks, samples, first, step, best, tries, np.float32(15))
            for it in range(refits):
                db = f16_bits(min(unit * up * np.float32(8.0), np.float32(65504.0)))
                d = f16_value(db)
                unit = d / (up * np.float32(8.0))
                if unit == 0:
                    break
                num = np.float32(0.0)
                den = np.float32(0.0)
                choose_levels(values, bends, blocks, samples, first, step, best, unit, np.float32(15), ls)
                for k in range(blocks):
                    m = np.float32(2 * ls[k] + 1)
                    for g in range(k * per, (k + 1) * per):
                        en = pick(a, b, g * n, n, unit * m)
                        entries[r, sb, g] = en
                        num += m * b[g * n + en]
                        den += m * m * a[g * n + en]
                d_out[r, sb] = db
                for k in range(blocks):
                    l_out[r, sb, k] = ls[k]
                unit = np.float32(0.5) * num / den
            for g in range(GROUPS):
                bits=sg[g]
                if parity and is_odd(bits):
                        least = u[g * 8] * levels[entries[r, sb, g]]
                        at = 0
                        for j in range(1, 8):
                            cost = u[g * 8 + j] * levels[j * n + entries[r, sb, g]]
                            if cost < least:
                                least = cost
                                at = j
                        bits ^= 1 << at
                signs[r, sb, g] = bits
