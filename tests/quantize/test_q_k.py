"""Q2_K, Q3_K, Q4_K, Q5_K, Q6_K."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.quantize import decode, encode
from quantkit.types import GgmlType
from tests.quantize import laws

TYPES = [GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K]
AFFINE = [GgmlType.Q2_K, GgmlType.Q4_K, GgmlType.Q5_K]
EFFORTS = ["fast", "default", "best"]
# What a joint search of scales and codes gains at the least; ggml rounds them one after another.
BARS = {GgmlType.Q2_K: 0.93}
every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
every_affine = pytest.mark.parametrize("type_", AFFINE, ids=lambda t: t.name)


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
@pytest.mark.parametrize("effort", EFFORTS)
def test_every_code_is_the_nearest(type_: GgmlType, effort: str) -> None:
    laws.check_codes_are_nearest(type_, effort)


@every_type
def test_effort_pays(type_: GgmlType) -> None:
    laws.check_effort_pays(type_)


@every_type
@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "uniform"])
@pytest.mark.parametrize("data", laws.DATA)
def test_error_is_below_ggmls(type_: GgmlType, data: str, weighted: bool) -> None:
    importance = laws.log_normal() if weighted else None
    bar = BARS.get(type_, 1.0)
    assert laws.error_ratio(type_, laws.DATA[data](48), importance) <= bar
    assert laws.error_ratio(type_, laws.DATA[data](48), importance, "fast") <= 1.0


@pytest.mark.parametrize(
    ("type_", "c"),
    [(GgmlType.Q2_K, 1.0), (GgmlType.Q3_K, 2.0), (GgmlType.Q4_K, 2.0), (GgmlType.Q5_K, 2.0)],
    ids=["Q2_K", "Q3_K", "Q4_K", "Q5_K"],
)
def test_ggmls_weighting_can_be_chosen(type_: GgmlType, c: float) -> None:
    laws.check_weighting_is_switchable(type_, c, 256)


def test_q6_k_has_no_weighting_but_importance() -> None:
    x, q = laws.gauss(2), laws.log_normal()
    assert np.array_equal(encode(x, "Q6_K", q, "fast", "ggml"), encode(x, "Q6_K", q, "fast"))


@every_affine
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_on_one_side_of_zero_lose_no_codes(type_: GgmlType, sign: int) -> None:
    """ggml's minimum is never above zero, so there all-positive weights waste most codes."""
    x = sign * laws.positive(8)
    ratio = laws.error_ratio(type_, x, laws.log_normal())
    assert ratio < (0.3 if sign > 0 else 1.0)


@every_type
def test_weights_near_the_smallest_f16_are_not_lost(type_: GgmlType) -> None:
    """sub-scale * code reaches far above d, so d may be the smallest f16 and yet suffice."""
    x = laws.gauss(4) * np.float32(1e-3)
    assert laws.error(x, decode(encode(x, type_.name), type_.name), None) < 0.1


@pytest.mark.parametrize("type_", [GgmlType.Q2_K, GgmlType.Q3_K], ids=lambda t: t.name)
def test_ternary_weights_are_kept(type_: GgmlType) -> None:
    rng = np.random.default_rng(9)
    x = (rng.integers(-1, 2, (8, laws.COLS)) * 0.03125).astype(np.float32)
    for importance in (None, laws.log_normal()):
        decoded = decode(encode(x, type_.name, importance), type_.name)
        assert laws.error(x, decoded, importance) < 1e-6


@every_type
def test_a_sub_block_without_importance_does_not_spoil_its_neighbours(type_: GgmlType) -> None:
    """Dead columns of any size get no say in the scales that others share."""
    x, q = laws.gauss(4), laws.log_normal()
    dead = np.arange(laws.COLS) % 64 < 16
    q[dead] = 0
    quiet = x.copy()
    quiet[:, dead] *= np.float32(0.01)
    loud = x.copy()
    loud[:, dead] *= np.float32(3)
    errors = [
        laws.error(rows, decode(encode(rows, type_.name, q), type_.name), q)
        for rows in (quiet, loud)
    ]
    assert errors[1] < errors[0] * 1.15
