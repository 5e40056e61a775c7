"""Search over whole codebooks: which entry, which sub-scale, which super-block scale.

For a group of weights x with error weights w, an entry g of the codebook and a scale s,

    sum w (s g - |x|)^2 = const - s (b - s a),   a = sum w g^2,   b = 2 sum w |x| g.

So two products with the codebook tell the cost of every entry at every scale, and what a scale can
save at best is s * v(s) with v(s) = max over entries of b - s a: convex and falling, so that a few
samples of it per block, joined by straight lines, are enough to choose scales by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quantkit.quantize.kernels._common import helper
from quantkit.quantize.kernels._simd import (
    Vec,
    as_f32,
    as_i32,
    fma,
    lane,
    largest,
    load8,
    maximum,
    minimum,
    rint,
    select,
    splat8,
    store,
)

LANES = 8
LOWEST = np.float32(-3e38)


@intrinsic  # type: ignore[untyped-decorator]
def take(typingctx: Any, array: Any, index: Any) -> Any:
    """`array[index]` for an array of f32 or i32 and a vector of indices, which are not checked."""
    result = Vec("f32" if array.dtype == types.float32 else "i32", index.lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        value = ir.Constant(result.ir, ir.Undefined)
        for i in range(index.lanes):
            at = builder.extract_element(args[1], ir.IntType(32)(i))
            at = builder.sext(at, ir.IntType(64))
            value = builder.insert_element(
                value, builder.load(builder.gep(data, [at])), ir.IntType(32)(i)
            )
        return value

    return result(array, index), codegen


@helper
def products8(u: np.ndarray, at: int, levels: np.ndarray, n: int, out: np.ndarray, to: int) -> None:
    """out[to + i] = sum over j of u[at + j] * level j of entry i."""
    u0, u1, u2, u3 = u[at], u[at + 1], u[at + 2], u[at + 3]
    u4, u5, u6, u7 = u[at + 4], u[at + 5], u[at + 6], u[at + 7]
    for i in range(0, n, LANES):
        v = load8(levels, i) * u0
        v = fma(load8(levels, i + n), u1, v)
        v = fma(load8(levels, i + 2 * n), u2, v)
        v = fma(load8(levels, i + 3 * n), u3, v)
        v = fma(load8(levels, i + 4 * n), u4, v)
        v = fma(load8(levels, i + 5 * n), u5, v)
        v = fma(load8(levels, i + 6 * n), u6, v)
        store(out, to + i, fma(load8(levels, i + 7 * n), u7, v))


@helper
def flip8(u: np.ndarray, at: int, levels: np.ndarray, n: int, out: np.ndarray, to: int) -> None:
    """Take from out[to + i] what the cheapest wrong sign in entry i costs: twice min u_j g_j."""
    u0, u1, u2, u3 = u[at], u[at + 1], u[at + 2], u[at + 3]
    u4, u5, u6, u7 = u[at + 4], u[at + 5], u[at + 6], u[at + 7]
    for i in range(0, n, LANES):
        v = load8(levels, i) * u0
        v = minimum(v, load8(levels, i + n) * u1)
        v = minimum(v, load8(levels, i + 2 * n) * u2)
        v = minimum(v, load8(levels, i + 3 * n) * u3)
        v = minimum(v, load8(levels, i + 4 * n) * u4)
        v = minimum(v, load8(levels, i + 5 * n) * u5)
        v = minimum(v, load8(levels, i + 6 * n) * u6)
        v = minimum(v, load8(levels, i + 7 * n) * u7)
        store(out, to + i, fma(v, np.float32(-2.0), load8(out, to + i)))


@helper
def sample(
    a: np.ndarray, a_at: int, b: np.ndarray, b_at: int, n: int, first: Any, step: Any,
    values: np.ndarray, at: int, samples: int,
) -> None:
    """Add v(s) = max over n entries of b - s a to `values[at:]` at s = first + k * step."""
    for k in range(0, samples, 4):
        s0 = -(first + np.float32(k) * step)
        s1 = s0 - step
        s2 = s1 - step
        s3 = s2 - step
        v0 = splat8(LOWEST)
        v1 = v0
        v2 = v0
        v3 = v0
        for i in range(0, n, LANES):
            p = load8(a, a_at + i)
            q = load8(b, b_at + i)
            v0 = maximum(v0, fma(p, s0, q))
            v1 = maximum(v1, fma(p, s1, q))
            v2 = maximum(v2, fma(p, s2, q))
            v3 = maximum(v3, fma(p, s3, q))
        values[at + k] += largest(v0)
        values[at + k + 1] += largest(v1)
        values[at + k + 2] += largest(v2)
        values[at + k + 3] += largest(v3)


@helper
def pick(a: np.ndarray, a_at: int, b: np.ndarray, b_at: int, n: int, s: Any) -> int:
    """The entry with the largest b - s a, the lowest of equals."""
    best = splat8(LOWEST)
    where = splat8(np.int32(0))
    for i in range(0, n, LANES):
        v = fma(load8(a, a_at + i), -s, load8(b, b_at + i))
        better = v > best
        best = select(better, v, best)
        where = select(better, np.int32(i), where)
    top = largest(best)
    entry = n
    for j in range(LANES):
        if lane(best, j) == top:
            entry = min(entry, lane(where, j) + j)
    return entry


@helper
def best_scale(values: np.ndarray, at: int, samples: int, first: Any, step: Any) -> Any:
    """The scale with the largest s * v(s), by a parabola through the best sample."""
    top = np.float32(-1.0)
    k = 0
    for i in range(samples):
        gain = (first + np.float32(i) * step) * values[at + i]
        if gain > top:
            top = gain
            k = i
    s = first + np.float32(k) * step
    if 0 < k < samples - 1:
        left = (s - step) * values[at + k - 1]
        right = (s + step) * values[at + k + 1]
        bend = (top - left) + (top - right)
        if bend > 0:
            s += np.float32(0.5) * step * (right - left) / bend
    return s


@helper
def fit_unit(
    values: np.ndarray, samples: int, first: np.ndarray, step: np.ndarray, best: np.ndarray,
    tries: np.ndarray, top: int,
) -> Any:
    """The unit for which block scales unit * (2 l + 1), l <= top, save most in all blocks."""
    peak = np.float32(0.0)
    for b in range(best.size):
        peak = max(peak, best[b])
    best_gain = np.float32(-1.0)
    unit = np.float32(0.0)
    for j in range(0, tries.size, LANES):
        units = load8(tries, j) * peak
        total = splat8(np.float32(0.0))
        for b in range(best.size):
            total = total + block_gain(
                values, b * samples, samples, first[b], step[b], units, best[b], top
            )[0]
        for i in range(LANES):
            if lane(total, i) > best_gain:
                best_gain = lane(total, i)
                unit = lane(units, i)
    return unit


@helper
def block_gain(
    values: np.ndarray, at: int, samples: int, first: Any, step: Any, units: Any, best: Any,
    top: int,
) -> Any:
    """What a block saves at the best l for each unit, and that l, as vectors."""
    middle = rint((best / units - np.float32(1.0)) * np.float32(0.5))
    gain = splat8(LOWEST)
    chosen = middle
    for d in range(-1, 2):
        l = minimum(maximum(middle + np.float32(d), np.float32(0.0)), np.float32(top))
        s = units * (l + l + np.float32(1.0))
        t = (s - first) / step
        k = maximum(minimum(as_i32(t), np.int32(samples - 2)), np.int32(0))
        low = take(values, k + np.int32(at))
        v = fma(take(values, k + np.int32(at + 1)) - low, t - as_f32(k), low)
        better = s * v > gain
        gain = select(better, s * v, gain)
        chosen = select(better, l, chosen)
    return gain, chosen
