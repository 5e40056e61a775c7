"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.quantize import decode, encode
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.ggml import ggml_decode
from tests.quantize.naive.scale import least_error

TYPES = [GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0]
EFFORTS = ["fast", "default", "best"]
every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)


@every_type
def test_blocks_decode_to_ggmls_floats(type_: GgmlType) -> None:
    laws.check_decodes_like_ggml(type_)


@every_type
def test_bytes_do_not_depend_on_tiles_or_threads(type_: GgmlType) -> None:
    laws.check_rows_are_independent(type_)


@every_type
@pytest.mark.parametrize("effort", EFFORTS)
def test_hostile_weights_stay_finite(type_: GgmlType, effort: str) -> None:
    laws.check_hostile_rows_stay_finite(type_, effort)


@every_type
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_every_code_is_the_nearest(type_: GgmlType, effort: str) -> None:
    laws.check_codes_are_nearest(type_, effort)


@every_type
def test_effort_pays(type_: GgmlType) -> None:
    laws.check_effort_pays(type_)


@every_type
@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "uniform"])
@pytest.mark.parametrize("data", laws.DATA)
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_error_is_no_larger_than_ggmls(
    type_: GgmlType, data: str, weighted: bool, effort: str
) -> None:
    importance = laws.log_normal() if weighted else None
    assert laws.error_ratio(type_, laws.DATA[data](48), importance, effort) <= 1.0


@pytest.mark.parametrize(
    "type_", [t for t in TYPES if t is not GgmlType.Q8_0], ids=lambda t: t.name
)
def test_ggmls_weighting_can_be_chosen(type_: GgmlType) -> None:
    laws.check_weighting_is_switchable(type_, 1.0, laws.COLS)


@every_type
@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "uniform"])
def test_int4_lattice_is_kept_exactly(type_: GgmlType, weighted: bool) -> None:
    x = laws.lattice(16)
    importance = laws.log_normal() if weighted else None
    assert np.array_equal(decode(encode(x, type_.name, importance), type_.name), x)


@pytest.mark.parametrize("type_", [GgmlType.Q4_1, GgmlType.Q5_1], ids=lambda t: t.name)
def test_affine_lattice_is_kept_exactly(type_: GgmlType) -> None:
    rng = np.random.default_rng(1)
    top = 15 if type_ is GgmlType.Q4_1 else 31
    codes = rng.integers(0, top + 1, (8, 32, 32)).astype(np.float32)
    codes[:, :, :2] = 0, top
    d, m = (rng.standard_normal((2, 8, 32, 1)) * 0.1).astype(np.float16).astype(np.float32)
    x = (codes * np.abs(d) + m).reshape(8, -1)
    for effort in EFFORTS:
        assert np.array_equal(decode(encode(x, type_.name, None, effort), type_.name), x)


@pytest.mark.parametrize(
    ("type_", "low", "high", "slack"),
    [
        (GgmlType.Q4_0, -8, 7, 1.004),
        (GgmlType.Q5_0, -16, 15, 1.006),
        (GgmlType.Q8_0, -127, 127, 1.6),
    ],
    ids=["Q4_0", "Q5_0", "Q8_0"],
)
def test_best_comes_close_to_an_exhaustive_search(
    type_: GgmlType, low: int, high: int, slack: float
) -> None:
    """Q8_0's optimum lies among thousands of scales that differ by luck, and f16 has not all."""
    x, q = laws.student(2, 512), laws.log_normal(512)
    reached = ggml_decode(encode(x, type_.name, q, "best"), type_)
    ours = float((q * (x - reached.astype(np.float64)) ** 2).sum())
    levels = np.arange(low, high + 1.0)
    bound = sum(
        least_error(block.astype(np.float64), w.astype(np.float64), levels)
        for row in x
        for block, w in zip(row.reshape(-1, 32), q.reshape(-1, 32), strict=True)
    )
    assert bound * 0.9999 <= ours <= bound * slack


def test_an_outlier_saturates_the_scale_and_keeps_its_sign() -> None:
    x = laws.gauss(1)
    x[0, 3] = -1e30
    decoded = decode(encode(x, "Q4_0"), "Q4_0")
    assert decoded[0, 3] <= -7 * 65504
    assert np.array_equal(decoded[0, 32:], decode(encode(x[:, 32:], "Q4_0"), "Q4_0")[0])


def test_a_row_that_is_no_multiple_of_eight_blocks_is_encoded_block_by_block() -> None:
    x, q = laws.gauss(3, 32 * 11), laws.log_normal(32 * 11)
    for type_ in TYPES:
        whole = encode(x, type_.name, q)
        alone = [
            encode(x[:, i : i + 32], type_.name, q[i : i + 32]) for i in range(0, x.shape[1], 32)
        ]
        assert np.array_equal(np.concatenate(alone, axis=1), whole)
