"""Choosing the scales of a super-block from samples of what each scale can save.

The i-quants decode to x^ = unit * (2 l + 1) * g: one f16 unit per super-block (up to a constant),
a small integer l per block and a codebook entry g per group. For weights x with error weights w
and a block scale s = unit * (2 l + 1),

    sum w (x - s g)^2 = const - s (b - s a),   a = sum w g^2,   b = 2 sum w x g.

So at scale s the best entries save s v(s), where v(s), the sum over groups of the largest
b - s a, is convex and falling. A few samples of v per block, joined by straight lines, therefore
tell well enough which unit and which l to take before any entry is settled.

Arrays over the blocks of a super-block ("lanes") hold 8 or 16 values; samples k of all blocks are
neighbours: `values[k * n_blocks + block]`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quantkit.quantize.kernels._common import GGML, helper
from quantkit.quantize.kernels._simd import (
    Vec,
    as_f32,
    as_i32,
    fma,
    lane,
    load8,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    store,
    total,
)

LANES = 8
SUPER = 256
F16_MAX = np.float32(65504.0)
LOWEST = np.float32(-3e38)
FAINT = np.float32(1e-15)  # no f16 scale reaches down to such a block
IOTA = np.arange(16, dtype=np.int32)


@intrinsic  # type: ignore[untyped-decorator]
def take(typingctx: Any, array: Any, index: Any) -> Any:
    """`array[index]` for a vector of i32 indices, which are not checked."""
    result = Vec("f32" if array.dtype == types.float32 else "i32", index.lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        vector = ir.VectorType(data.type.pointee, index.lanes)
        value = ir.Constant(vector, ir.Undefined)
        for i in range(index.lanes):
            n = ir.IntType(32)(i)
            at = builder.zext(builder.extract_element(args[1], n), ir.IntType(64))
            value = builder.insert_element(value, builder.load(builder.gep(data, [at])), n)
        return value if vector == result.ir else builder.sext(value, result.ir)

    return result(array, index), codegen


@helper
def load_importance(q: np.ndarray, at: int, w: np.ndarray) -> None:
    """Importance of a super-block scaled to a peak of 1; uniform where it is zero all over.

    The floor decides only between choices that importance calls equal.
    """
    peak = np.float32(0.0)
    for i in range(SUPER):
        peak = max(peak, q[at + i])
    for i in range(SUPER):
        w[i] = max(q[at + i] / peak, np.float32(1e-8)) if peak > 0 else np.float32(1.0)


@helper
def load_weights(row: np.ndarray, at: int, x: np.ndarray) -> int:
    """A super-block scaled by a power of two to a peak in [0.5, 1); gives the exponent.

    A block too faint for any f16 scale gives -1000.
    """
    peak = np.float32(0.0)
    for i in range(SUPER):
        peak = max(peak, abs(row[at + i]))
    if peak < FAINT:
        return -1000
    exponent = math.frexp(peak)[1]
    down = np.float32(math.ldexp(1.0, -exponent))
    for i in range(SUPER):
        x[i] = row[at + i] * down
    return exponent


@helper
def ggml_weights(x: np.ndarray, q: np.ndarray, c: Any, w: np.ndarray) -> None:
    """llama.cpp's error weights q * sqrt(c * mean(x^2) + x^2) of a super-block."""
    square = np.float32(0.0)
    for i in range(SUPER):
        square += x[i] * x[i]
    floor = square * np.float32(c / SUPER)
    for i in range(SUPER):
        w[i] = q[i] * np.sqrt(floor + x[i] * x[i])


@helper
def lay_samples(
    x: np.ndarray, w: np.ndarray, n_blocks: int, span: np.ndarray, n_samples: int,
    first: np.ndarray, step: np.ndarray,
) -> None:
    """Lay each block's samples over `span` (lowest, highest scale) times its weighted rms."""
    size = SUPER // n_blocks
    for block in range(n_blocks):
        w1 = np.float32(0.0)
        w2 = np.float32(0.0)
        w3 = np.float32(0.0)
        for i in range(block * size, (block + 1) * size):
            square = w[i] * x[i] * x[i]
            w1 += w[i]
            w2 += square
            w3 += square * abs(x[i])
        centre = np.sqrt(np.sqrt(w2 / w1) * (w3 / w2)) if w3 > 0 else np.float32(1e-9)
        first[block] = centre * span[0]
        step[block] = centre * (span[1] - span[0]) / np.float32(n_samples - 1)


@helper
def best_scales(
    values: np.ndarray, n_blocks: int, n_samples: int, first: np.ndarray, step: np.ndarray,
    best: np.ndarray,
) -> None:
    """The scale with the largest s v(s) for each block, by a parabola through the best sample."""
    for at in range(0, n_blocks, LANES):
        gap = load8(step, at)
        s = load8(first, at)
        top = splat8(LOWEST)
        left = splat8(LOWEST)
        right = splat8(LOWEST)
        last = splat8(LOWEST)
        chosen = s
        for k in range(n_samples):
            gain = s * load8(values, k * n_blocks + at)
            better = gain > top
            right = select(better, LOWEST, select(right == LOWEST, gain, right))
            left = select(better, last, left)
            top = select(better, gain, top)
            chosen = select(better, s, chosen)
            last = gain
            s = s + gap
        bend = (top - left) + (top - right)
        inside = (left > LOWEST) & (right > LOWEST) & (bend > np.float32(0.0))
        shift = (right - left) / select(inside, bend, np.float32(1.0)) * np.float32(0.5)
        store(best, at, select(inside, fma(gap, shift, chosen), chosen))


@helper
def find_bends(values: np.ndarray, n_blocks: int, n_samples: int, bends: np.ndarray) -> None:
    """How far v sags below the chord from sample k to k + 1: bends[k] * t (1 - t)."""
    for at in range(0, n_blocks, LANES):
        last = splat8(np.float32(0.0))
        for k in range(n_samples - 1):
            i = k * n_blocks + at
            here = last
            if k < n_samples - 2:
                left = load8(values, i)
                middle = load8(values, i + n_blocks)
                here = (left - middle) - (middle - load8(values, i + 2 * n_blocks))
            if k == 0:
                last = here
            store(bends, i, (last + here) * np.float32(0.25))
            last = here


@helper
def block_gains(
    values: np.ndarray, bends: np.ndarray, n_blocks: int, at: int, n_samples: int,
    first: np.ndarray, step: np.ndarray, best: np.ndarray, unit: Any, top: Any,
) -> Any:
    """What blocks at..at+7 save at their best l <= top, and that l (as f32)."""
    begin = load8(first, at)
    gap = np.float32(1.0) / load8(step, at)
    lanes = load8(IOTA, at)
    middle = rint((load8(best, at) / unit - np.float32(1.0)) * np.float32(0.5))
    gain = splat8(LOWEST)
    chosen = middle
    for d in range(-1, 2):
        l = minimum(maximum(middle + np.float32(d), np.float32(0.0)), top)
        s = unit * (l + l + np.float32(1.0))
        t = (s - begin) * gap
        k = maximum(minimum(as_i32(t), np.int32(n_samples - 2)), np.int32(0))
        index = k * np.int32(n_blocks) + lanes
        low = take(values, index)
        high = take(values, index + np.int32(n_blocks))
        t = t - as_f32(k)
        bend = take(bends, index) * minimum(maximum(t, np.float32(0.0)), np.float32(1.0))
        here = s * fma(bend, t - np.float32(1.0), fma(high - low, t, low))
        better = here > gain
        gain = select(better, here, gain)
        chosen = select(better, l, chosen)
    return gain, chosen


@helper
def fit_unit(
    values: np.ndarray, bends: np.ndarray, n_blocks: int, n_samples: int,
    first: np.ndarray, step: np.ndarray, best: np.ndarray, tries: np.ndarray, top: Any,
) -> Any:
    """The unit with which all blocks together save most, out of `tries` times the largest scale."""
    peak = np.float32(0.0)
    for block in range(n_blocks):
        peak = max(peak, best[block])
    most = LOWEST
    chosen = np.float32(0.0)
    for i in range(tries.size):
        unit = tries[i] * peak
        saved = np.float32(0.0)
        for at in range(0, n_blocks, LANES):
            saved += total(
                block_gains(values, bends, n_blocks, at, n_samples, first, step, best, unit, top)[0]
            )
        if saved > most:
            most = saved
            chosen = unit
    return chosen


@helper
def choose_levels(
    values: np.ndarray, bends: np.ndarray, n_blocks: int, n_samples: int,
    first: np.ndarray, step: np.ndarray, best: np.ndarray, unit: Any, top: Any, l: np.ndarray,
) -> None:
    """The l of every block for a given unit."""
    for at in range(0, n_blocks, LANES):
        gains = block_gains(values, bends, n_blocks, at, n_samples, first, step, best, unit, top)
        store(l, at, as_i32(gains[1]))
