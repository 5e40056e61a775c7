"""Choosing the scales of a super-block from samples of what each scale can save.

The i-quants decode to x^ = unit * (2 l + 1) * g: one f16 unit per super-block (up to a constant),
a small integer l per block and a codebook entry g per group. For weights x with error weights w
and a block scale s = unit * (2 l + 1),

    sum w (x - s g)^2 = const - s (b - s a),   a = sum w g^2,   b = 2 sum w x g.

So at scale s the best entries save s v(s), where v(s), the sum over groups of the largest b - s a,
is convex and falling. A few samples of v per block therefore tell well enough which unit and which
l to take before any entry is settled.

Blocks of a super-block sit side by side in vectors of 8: sample k of block i is
`values[k * n_blocks + i]`. A tile holds 8 blocks transposed: element p of block i lies at
`8 * p + i`; super-blocks of 16 blocks are two tiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quantkit.quantize.kernels._common import BLEND, IMPORTANCE, f16_bits, f16_value, helper
from quantkit.quantize.kernels._simd import (
    Vec,
    absolute,
    as_f32,
    as_i32,
    fma,
    largest,
    load8,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    sqrt,
    store,
    total,
    transpose8,
)

LANES = 8
SUPER = 256
LOWEST = np.float32(-3e38)
_F16_MAX = np.float32(65504.0)
_FAINT = np.float32(1e-15)  # no f16 scale reaches down to such weights
LANE = np.arange(16, dtype=np.int32)


@intrinsic  # type: ignore[untyped-decorator]
def take(typingctx: Any, array: Any, index: Any) -> Any:
    """`array[index]` for a vector of i32 indices >= 0, which are not checked."""
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
    top = splat8(np.float32(0.0))
    for i in range(at, at + SUPER, LANES):
        top = maximum(top, load8(q, i))
    peak = largest(top)
    for i in range(SUPER):
        w[i] = max(q[at + i] / peak, np.float32(1e-8)) if peak > 0 else np.float32(1.0)


@helper
def load_weights(x: np.ndarray, at: int, v: np.ndarray) -> Any:
    """A super-block divided by a power of two, to a peak in [0.5, 1); gives that power.

    Gives 0 for a super-block too faint for any f16 scale.
    """
    top = splat8(np.float32(0.0))
    for i in range(at, at + SUPER, LANES):
        top = maximum(top, absolute(load8(x, i)))
    peak = largest(top)
    if peak < _FAINT:
        return np.float32(0.0)
    exponent = min(math.frexp(peak)[1], 127)
    down = np.float32(math.ldexp(1.0, -exponent))
    for i in range(0, SUPER, LANES):
        store(v, i, load8(x, at + i) * down)
    return np.float32(math.ldexp(1.0, exponent))


@helper
def load_error_weights(v: np.ndarray, q: np.ndarray, weighting: int, c: Any, w: np.ndarray) -> None:
    """Error weights of a super-block: `q`, llama.cpp's q * sqrt(c * mean(x^2) + x^2), or between.

    BLEND is the geometric mean of the two.
    """
    floor = np.float32(0.0)
    if weighting != IMPORTANCE:
        for i in range(SUPER):
            floor += v[i] * v[i]
        floor *= np.float32(c / SUPER)
    for i in range(SUPER):
        w[i] = q[i]
        if weighting != IMPORTANCE:
            root = np.sqrt(floor + v[i] * v[i])
            w[i] *= np.sqrt(root) if weighting == BLEND else root


@helper
def to_tiles(v: np.ndarray, size: int, tiles: np.ndarray) -> None:
    """Blocks of `size` of a super-block transposed into tiles."""
    for at in range(0, SUPER, LANES * size):
        for i in range(0, size, 8):
            transpose8(v, at + i, size, tiles, at + LANES * i)


@helper
def lay_samples(
    x: np.ndarray,
    w: np.ndarray,
    span: np.ndarray,
    n_samples: int,
    first: np.ndarray,
    step: np.ndarray,
) -> None:
    """Where to sample each block of the tiles `x`: over `span` times a typical magnitude.

    The magnitude, sqrt(rms * sum w |x|^3 / sum w x^2), predicts the best scale better than the
    rms alone: scales follow the large weights.
    """
    size = SUPER // first.size
    for block in range(0, first.size, LANES):
        w1 = splat8(np.float32(0.0))
        w2 = w1
        w3 = w1
        for i in range(block * size, (block + LANES) * size, LANES):
            v = absolute(load8(x, i))
            square = load8(w, i) * v * v
            w1 = w1 + load8(w, i)
            w2 = w2 + square
            w3 = fma(square, v, w3)
        w2 = maximum(w2, np.float32(1e-30))
        centre = maximum(sqrt(sqrt(w2 / w1) * (w3 / w2)), np.float32(1e-9))
        store(first, block, centre * span[0])
        store(step, block, centre * ((span[1] - span[0]) / np.float32(n_samples - 1)))


@helper
def fit_parabolas(
    values: np.ndarray,
    n_samples: int,
    first: np.ndarray,
    step: np.ndarray,
    best: np.ndarray,
    bend: np.ndarray,
) -> None:
    """Parabolas peak - bend (s - best)^2 for what each block saves, through its best samples."""
    n_blocks = first.size
    for at in range(0, n_blocks, LANES):
        gap = load8(step, at)
        s = load8(first, at)
        top = splat8(LOWEST)
        left = top
        right = top
        last = top
        chosen = s
        for k in range(n_samples):
            gain = s * load8(values, k * n_blocks + at)
            better = gain > top
            right = select(better, splat8(LOWEST), select(right == LOWEST, gain, right))
            left = select(better, last, left)
            top = select(better, gain, top)
            chosen = select(better, s, chosen)
            last = gain
            s = s + gap
        fall = (top - left) + (top - right)
        inside = (left > LOWEST) & (right > LOWEST) & (fall > np.float32(0.0))
        shift = (right - left) / select(inside, fall, splat8(np.float32(1.0))) * np.float32(0.5)
        store(best, at, select(inside, fma(gap, shift, chosen), chosen))
        # At the end of the samples: the parabola of fixed entries, which save nothing at s = 0.
        fixed = maximum(top, np.float32(0.0)) / (chosen * chosen)
        store(bend, at, select(inside, fall * np.float32(0.5) / (gap * gap), fixed))


@helper
def fit_unit(best: np.ndarray, bend: np.ndarray, tries: np.ndarray, top: Any) -> Any:
    """The unit with which the parabolas of all blocks lose least, out of `tries` times the peak."""
    peak = np.float32(0.0)
    for block in range(best.size):
        peak = max(peak, best[block])
    least = -LOWEST
    chosen = np.float32(0.0)
    for i in range(tries.size):
        unit = tries[i] * peak
        lost = splat8(np.float32(0.0))
        for at in range(0, best.size, LANES):
            s = load8(best, at)
            l = rint((s * (np.float32(1.0) / unit) - np.float32(1.0)) * np.float32(0.5))
            l = minimum(maximum(l, np.float32(0.0)), top)
            gap = (l + l + np.float32(1.0)) * unit - s
            lost = fma(gap * gap, load8(bend, at), lost)
        loss = total(lost)
        if loss < least:
            least = loss
            chosen = unit
    return chosen


@helper
def find_sags(values: np.ndarray, n_blocks: int, n_samples: int, sags: np.ndarray) -> None:
    """How far v lies below its chord from sample k to k + 1, at t of the way: sag * t (1 - t)."""
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
            store(sags, i, (last + here) * np.float32(0.25))
            last = here


@helper
def choose_multipliers(
    values: np.ndarray,
    sags: np.ndarray,
    n_samples: int,
    first: np.ndarray,
    step: np.ndarray,
    best: np.ndarray,
    unit: Any,
    top: Any,
    l: np.ndarray,
) -> None:
    """For a given unit the l <= `top` of every block that saves most, read off the samples."""
    n_blocks = first.size
    for at in range(0, n_blocks, LANES):
        begin = load8(first, at)
        per_step = np.float32(1.0) / load8(step, at)
        middle = rint((load8(best, at) / unit - np.float32(1.0)) * np.float32(0.5))
        most = splat8(LOWEST)
        chosen = middle
        for d in range(-1, 2):
            candidate = minimum(maximum(middle + np.float32(d), np.float32(0.0)), top)
            s = unit * (candidate + candidate + np.float32(1.0))
            t = (s - begin) * per_step
            k = as_i32(maximum(minimum(t, np.float32(n_samples - 2)), np.float32(0.0)))
            t = t - as_f32(k)
            index = k * np.int32(n_blocks) + load8(LANE, at)
            low = take(values, index)
            high = take(values, index + np.int32(n_blocks))
            sag = take(sags, index) * minimum(maximum(t, np.float32(0.0)), np.float32(1.0))
            gain = s * fma(sag, t - np.float32(1.0), fma(high - low, t, low))
            better = gain > most
            most = select(better, gain, most)
            chosen = select(better, candidate, chosen)
        store(l, at, as_i32(chosen))


@helper
def storable(unit: Any, power: Any, factor: Any) -> Any:
    """The unit as f16 can hold it, and its bits: the stored scale is unit * power * factor."""
    d = min(max(unit, np.float32(0.0)) * factor * power, _F16_MAX)
    bits = f16_bits(d)
    return f16_value(bits) / factor / power, bits
