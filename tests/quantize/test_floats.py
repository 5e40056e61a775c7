"""F32, F16, BF16."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantkit.quantize import decode, encode
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.ggml import ggml_encode

TYPES = [GgmlType.F32, GgmlType.F16, GgmlType.BF16]
every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
rows = arrays(
    np.float32, (1, 16), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@every_type
def test_blocks_decode_to_ggmls_floats(type_: GgmlType) -> None:
    laws.check_decodes_like_ggml(type_)


@every_type
def test_bytes_do_not_depend_on_tiles_or_threads(type_: GgmlType) -> None:
    laws.check_rows_are_independent(type_)


@every_type
@pytest.mark.parametrize("make", [laws.gauss, laws.student, laws.lattice])
def test_ordinary_weights_get_ggmls_bytes(type_: GgmlType, make: object) -> None:
    x = make(8)  # type: ignore[operator]
    assert np.array_equal(encode(x, type_.name), ggml_encode(x, type_))


@given(rows)
def test_f32_keeps_every_bit(x: np.ndarray) -> None:
    assert np.array_equal(encode(x, "F32").view(np.uint32), x.view(np.uint32))


@given(rows)
def test_f16_rounds_to_nearest_even_and_saturates(x: np.ndarray) -> None:
    expected = np.clip(x, -65504, 65504).astype(np.float16)
    assert np.array_equal(encode(x, "F16").view(np.uint16), expected.view(np.uint16))


@given(rows)
def test_bf16_takes_the_nearest_finite_value(x: np.ndarray) -> None:
    stored = encode(x, "BF16").view(np.uint16)
    around = stored[None] + np.array([0xFFFF, 0, 1], np.uint16)[:, None, None]
    values = (around.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.where(np.isfinite(values), np.abs(values - x), np.inf)
    assert (distance[1] <= np.nanmin(distance, axis=0)).all()
    assert np.isfinite(decode(encode(x, "BF16"), "BF16")).all()
    assert np.array_equal(stored >> 15, x.view(np.uint32) >> 31)


def test_bf16_ties_go_to_even() -> None:
    bits = np.array([[0x3F808000, 0x3F818000, 0xBF808000, 0x7F7FFFFF]], np.uint32)
    stored = encode(bits.view(np.float32), "BF16").view(np.uint16)
    assert stored.tolist() == [[0x3F80, 0x3F82, 0xBF80, 0x7F7F]]


@every_type
def test_a_vector_of_one_column_is_encoded(type_: GgmlType) -> None:
    column = laws.gauss(1, 64).T
    assert encode(column, type_.name).shape == (64, type_.block_bytes)
