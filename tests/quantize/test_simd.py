"""Vectors in kernels: every lane computes what numpy computes for one value."""

from __future__ import annotations

import numpy as np
import pytest
from numba.core.errors import TypingError

from quantkit.quantize.kernels._common import kernel
from quantkit.quantize.kernels._simd import (
    absolute,
    as_f32,
    as_i32,
    bits_of,
    f16_near,
    float_of,
    fma,
    lane,
    largest,
    load8,
    lookup8,
    mask_bits,
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

A = np.array([-3.5, -1.25, -0.0, 0.5, 1.5, 2.5, 70000.0, 3e-6], np.float32)
B = np.array([2.0, -4.0, 1.0, 0.25, -1.5, 8.0, 0.5, 1e-3], np.float32)
FLOATS = {
    "a + b": A + B,
    "a - scalar": A - np.float32(0.1),
    "scalar * b": np.float32(3) * B,
    "a / b": A / B,
    "minimum": np.minimum(A, B),
    "maximum with a scalar": np.maximum(A, np.float32(0.25)),
    "absolute": np.abs(A),
    "rint": np.rint(A),
    "sqrt": np.sqrt(np.abs(A)),
    "select": np.where(A < B, A, np.float32(9)),
    "both masks": np.where((A < B) & (B > 0.5), A, B),
    "either mask": np.where((A >= 2.0) | (B <= -1.5), A, B),
    "f16": np.clip(A, -65504, 65504).astype(np.float16).astype(np.float32),
    "bits there and back": A,
    "fma": (A.astype(np.float64) * B + 1).astype(np.float32),
    "integers there and back": np.trunc(B),
    "table": A[[7, 6, 5, 4, 3, 2, 1, 0]],
}


@kernel
def _floats(a: np.ndarray, b: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    x, y = load8(a, 0), load8(b, 0)
    store(out, 0, x + y)
    store(out, 8, x - np.float32(0.1))
    store(out, 16, np.float32(3.0) * y)
    store(out, 24, x / y)
    store(out, 32, minimum(x, y))
    store(out, 40, maximum(x, np.float32(0.25)))
    store(out, 48, absolute(x))
    store(out, 56, rint(x))
    store(out, 64, sqrt(absolute(x)))
    store(out, 72, select(x < y, x, np.float32(9.0)))
    store(out, 80, select((x < y) & (y > 0.5), x, y))
    store(out, 88, select((x >= 2.0) | (y <= -1.5), x, y))
    store(out, 96, f16_near(maximum(minimum(x, np.float32(65504.0)), np.float32(-65504.0))))
    store(out, 104, float_of(bits_of(x)))
    store(out, 112, fma(x, y, np.float32(1.0)))
    store(out, 120, as_f32(as_i32(y)))
    store(out, 128, lookup8(x, load8(index, 0)))


def test_each_lane_computes_what_numpy_does() -> None:
    out = np.empty(8 * len(FLOATS), np.float32)
    _floats(A, B, np.arange(7, -1, -1, dtype=np.int32), out)
    for (name, expected), got in zip(FLOATS.items(), out.reshape(-1, 8), strict=True):
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), name


@kernel
def _integers(bytes_: np.ndarray, signed: np.ndarray, out: np.ndarray, packed: np.ndarray) -> None:
    u, s = load8(bytes_, 1), load8(signed, 0)
    store(out, 0, u + s)
    store(out, 8, (u >> 4) | ((s & 15) << 4))
    store(out, 16, select(s < 0, splat8(np.int32(1)), s * 2))
    store(packed, 0, u * 2)


def test_integers_are_widened_on_load_and_cut_on_store() -> None:
    unsigned = np.array([0, 1, 16, 128, 255, 7, 99, 200, 64], np.uint8)
    signed = np.array([-128, -1, 0, 1, 2, 3, 126, 127], np.int8)
    out, packed = np.empty(24, np.int32), np.empty(8, np.uint8)
    _integers(unsigned, signed, out, packed)
    u, s = unsigned[1:].astype(np.int32), signed.astype(np.int32)
    assert np.array_equal(out[:8], u + s)
    assert np.array_equal(out[8:16], u >> 4 | (s & 15) << 4)
    assert np.array_equal(out[16:], np.where(s < 0, 1, s * 2))
    assert np.array_equal(packed, (u * 2).astype(np.uint8))


@kernel
def _folds(a: np.ndarray) -> tuple:
    x = load8(a, 0)
    return total(x), largest(x), lane(x, 5), mask_bits(x > 1.0)


def test_lanes_fold_to_a_scalar() -> None:
    a = np.array([1, 2, 3, 4, -5, 6, 7, -80], np.float32)
    assert _folds(a) == (a.sum(), 7.0, 6.0, 0b01101110)


@kernel
def _transpose(a: np.ndarray, out: np.ndarray) -> None:
    transpose8(a, 3, 10, out, 4)


def test_transpose_gathers_rows_at_a_stride() -> None:
    a, out = np.arange(90, dtype=np.float32), np.zeros(70, np.float32)
    _transpose(a, out)
    expected = np.array([[a[3 + 10 * j + i] for j in range(8)] for i in range(8)])
    assert np.array_equal(out[4:68].reshape(8, 8), expected)
    assert not out[:4].any()
    assert not out[68:].any()


@kernel
def _first(a: np.ndarray) -> float:
    return lane(load8(a, 0), 0)


def test_a_strided_array_is_refused_not_misread() -> None:
    with pytest.raises(TypingError, match="contiguous"):
        _first(np.zeros(32, np.float32)[::2])
