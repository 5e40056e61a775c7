"""Giving back the energy that least squares loses."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.errors import UsageError
from quantkit.quantize import decode, encode
from quantkit.types import GgmlType

RAISED = ("Q2_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0")


def _weights(rows: int = 6, cols: int = 512) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    x = rng.standard_t(5, (rows, cols)).astype(np.float32)
    return x, rng.lognormal(0, 1, cols).astype(np.float32)


def _per_block(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float64).reshape(-1, 256).sum(1)


@pytest.mark.parametrize("name", RAISED)
def test_gain_of_a_half_gives_the_code_the_energy_of_the_weights(name):
    x, w = _weights()
    y = decode(encode(x, name, w, gain=0.5), name)
    np.testing.assert_allclose(_per_block(w * y * y), _per_block(w * x * x), rtol=2e-2)


@pytest.mark.parametrize("name", sorted(set(RAISED) - {"TQ1_0"}))
def test_full_gain_makes_the_error_nearly_orthogonal_to_the_weights(name):
    x, w = _weights()

    def slope(gain: float) -> float:
        y = decode(encode(x, name, w, gain=gain), name)
        return float((w * x * y).sum() / (w * x * x).sum())

    assert slope(0) < 0.999
    assert abs(1 - slope(1)) < 0.25 * (1 - slope(0))


@pytest.mark.parametrize("name", RAISED)
def test_full_gain_costs_little_squared_error(name):
    x, w = _weights()

    def error(gain: float) -> float:
        y = decode(encode(x, name, w, gain=gain), name)
        return float((w * (x - y) ** 2).sum() / (w * x * x).sum())

    least = error(0)
    assert least < error(1) <= 1.05 * least / (1 - least)


@pytest.mark.parametrize("name", RAISED)
def test_only_the_scales_change(name):
    x, w = _weights()
    plain, raised = encode(x, name, w), encode(x, name, w, gain=1)
    changed = (plain != raised).reshape(-1, GgmlType[name].block_bytes).any(0)
    assert changed.sum() <= (4 if name in ("Q2_K", "IQ1_M") else 2)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "Q8_0", "MXFP4", "BF16"])
def test_types_that_lose_next_to_nothing_are_left_alone(name):
    x, w = _weights()
    np.testing.assert_array_equal(encode(x, name, w, gain=1), encode(x, name, w))


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize(
    "row",
    [np.zeros(256), np.full(256, 65504.0), np.r_[1e38, np.zeros(255)], np.full(256, 1e-42)],
    ids=["zeros", "f16-max", "huge", "denormal"],
)
def test_degenerate_blocks_stay_finite(name, row):
    x = row.astype(np.float32)[np.newaxis]
    assert np.isfinite(decode(encode(x, name, np.ones(256, np.float32), gain=1), name)).all()


@pytest.mark.parametrize("name", RAISED)
def test_rows_are_independent_of_each_other(name):
    x, w = _weights()
    whole = encode(x, name, w, gain=1)
    np.testing.assert_array_equal(
        whole, np.concatenate([encode(x[i : i + 1], name, w, gain=1) for i in range(len(x))])
    )


@pytest.mark.parametrize("gain", [-0.1, 1.1, float("nan")])
def test_a_gain_beyond_its_range_is_refused(gain):
    with pytest.raises(UsageError, match="gain"):
        encode(np.zeros((1, 256)), "IQ2_XXS", gain=gain)
