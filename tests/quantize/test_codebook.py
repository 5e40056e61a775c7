"""IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: blocks over a codebook."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.types import GgmlType
from tests.quantize import laws

TYPES = [
    GgmlType.IQ1_S,
    GgmlType.IQ1_M,
    GgmlType.IQ2_XXS,
    GgmlType.IQ2_XS,
    GgmlType.IQ2_S,
    GgmlType.IQ3_XXS,
    GgmlType.IQ3_S,
]
# What searching the whole codebook under the true weights gains at the least over ggml's
# neighbour lists, on weights with heavy tails.
BARS = {
    GgmlType.IQ1_S: 0.85,
    GgmlType.IQ1_M: 0.90,
    GgmlType.IQ2_XXS: 0.85,
    GgmlType.IQ2_XS: 0.90,
    GgmlType.IQ2_S: 0.93,
    GgmlType.IQ3_XXS: 0.90,
    GgmlType.IQ3_S: 0.90,
}
every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)


@every_type
def test_blocks_decode_to_ggmls_floats(type_: GgmlType) -> None:
    laws.check_decodes_like_ggml(type_)


@every_type
def test_bytes_do_not_depend_on_tiles_or_threads(type_: GgmlType) -> None:
    laws.check_rows_are_independent(type_)


@every_type
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_hostile_weights_stay_finite(type_: GgmlType, effort: str) -> None:
    laws.check_hostile_rows_stay_finite(type_, effort)


@every_type
def test_effort_pays(type_: GgmlType) -> None:
    laws.check_effort_pays(type_)


@every_type
@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "uniform"])
@pytest.mark.parametrize("data", laws.DATA)
def test_error_is_below_ggmls(type_: GgmlType, data: str, weighted: bool) -> None:
    # ggml refuses three of these types without an imatrix; ones mean the same.
    importance = laws.log_normal() if weighted else np.ones(laws.COLS, np.float32)
    bar = BARS[type_] if data == "student" and weighted else 1.0
    assert laws.error_ratio(type_, laws.DATA[data](32), importance) <= bar
    assert laws.error_ratio(type_, laws.DATA[data](32), importance, "fast") <= 1.0
