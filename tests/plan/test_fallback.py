"""Types that do not fit a row length."""

from __future__ import annotations

import pytest

from quantkit.plan.fallback import fitting_type
from quantkit.types import GgmlType


@pytest.mark.parametrize(
    ("wanted", "n_cols", "given"),
    [
        ("IQ1_S", 256, "IQ1_S"),
        ("IQ1_S", 128, "IQ4_NL"),
        ("IQ4_XS", 64, "IQ4_NL"),
        ("Q2_K", 128, "Q4_0"),
        ("Q3_K", 128, "Q4_0"),
        ("Q4_K", 128, "Q5_0"),
        ("Q5_K", 128, "Q5_1"),
        ("Q6_K", 128, "Q8_0"),
        ("TQ1_0", 32, "Q4_0"),
        ("Q8_0", 33, "F16"),
        ("Q6_K", 100, "F16"),
        ("BF16", 7, "BF16"),
    ],
)
def test_rows_that_do_not_divide_get_llama_quantizes_substitute(wanted, n_cols, given):
    assert fitting_type(GgmlType[wanted], n_cols) is GgmlType[given]


@pytest.mark.parametrize("type_", list(GgmlType))
@pytest.mark.parametrize("n_cols", [1, 14, 32, 64, 96, 128, 576, 7168])
def test_the_substitute_always_fits(type_, n_cols):
    assert n_cols % fitting_type(type_, n_cols).block_size == 0
