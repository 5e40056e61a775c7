"""`quantkit.quantize.encode` and `decode`: what they take and what they refuse."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantkit.errors import NonFiniteError, UsageError
from quantkit.quantize import decode, encode
from quantkit.quantize.codec import encodable
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.ggml import ggml_valid


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_weight_is_an_error_that_names_its_place(value: float) -> None:
    x = laws.gauss(3, 64)
    x[1, 40] = value
    with pytest.raises(NonFiniteError, match=re.escape("[1, 40]")):
        encode(x, "Q4_0")


def test_non_finite_or_negative_importance_is_refused() -> None:
    x, q = laws.gauss(1, 64), laws.log_normal(64)
    q[7] = np.inf
    with pytest.raises(NonFiniteError, match=re.escape("[7]")):
        encode(x, "Q4_0", q)
    q[7] = -1
    with pytest.raises(UsageError, match=re.escape("[7]")):
        encode(x, "Q4_0", q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"type_name": "Q9_9"}, "unknown type"),
        ({"type_name": "I32"}, "cannot be encoded"),
        ({"type_name": "Q4_K"}, "multiple of 256"),
        ({"x": np.zeros(64, np.float32)}, "multiple of 32"),
        ({"importance": np.ones(63, np.float32)}, r"expected \(64,\)"),
        ({"effort": "utmost"}, "unknown effort"),
        ({"weighting": "none"}, "unknown weighting"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused(arguments: dict, message: str) -> None:
    call = {"x": np.zeros((2, 64), np.float32), "type_name": "Q4_0"} | arguments
    with pytest.raises(UsageError, match=message):
        encode(**call)


@pytest.mark.parametrize(
    "blocks", [np.zeros((2, 19), np.uint8), np.zeros((2, 18), np.int8), np.zeros(18, np.uint8)]
)
def test_blocks_that_are_none_are_refused(blocks: np.ndarray) -> None:
    with pytest.raises(UsageError, match="multiple of 18 bytes"):
        decode(blocks, "Q4_0")


def test_no_rows_give_no_blocks() -> None:
    for type_ in (GgmlType.Q8_0, GgmlType.Q4_K, GgmlType.BF16):
        x = np.zeros((0, 512), np.float32)
        blocks = encode(x, type_.name)
        assert blocks.shape == (0, type_.row_bytes(512))
        assert decode(blocks, type_.name).shape == (0, 512)


@settings(max_examples=40, deadline=None)
@given(
    x=arrays(
        np.float32, (2, 256), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    q=arrays(
        np.float32,
        256,
        elements=st.floats(0, 2.0**100, width=32, allow_nan=False, allow_infinity=False),
    ),
    name=st.sampled_from(["Q4_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "IQ4_XS", "NVFP4", "TQ2_0"]),
)
def test_any_finite_weights_give_valid_blocks_that_decode_finite(
    x: np.ndarray, q: np.ndarray, name: str
) -> None:
    blocks = encode(x, name, q)
    assert ggml_valid(blocks, GgmlType[name])
    assert np.isfinite(decode(blocks, name)).all()
    assert np.array_equal(encode(x[1:], name, q), blocks[1:])


def test_every_ggml_weight_type_of_these_families_is_registered() -> None:
    assert {GgmlType[n] for n in ("Q4_0", "Q4_K", "IQ4_XS", "MXFP4", "TQ1_0")} <= encodable()


def test_importing_the_package_does_not_import_numba() -> None:
    code = "import sys, quantkit.quantize; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
