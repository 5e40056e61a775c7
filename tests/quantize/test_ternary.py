"""TQ1_0, TQ2_0, Q1_0, Q2_0."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.quantize import decode, encode
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.naive.scale import least_error

TYPES = [GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.Q1_0, GgmlType.Q2_0]
EFFORTS = ["fast", "default", "best"]
LEVELS = {
    GgmlType.TQ1_0: [-1.0, 0.0, 1.0],
    GgmlType.TQ2_0: [-1.0, 0.0, 1.0, 2.0],
    GgmlType.Q1_0: [-1.0, 1.0],
    GgmlType.Q2_0: [-1.0, 0.0, 1.0, 2.0],
}
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
@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("data", laws.DATA)
@pytest.mark.parametrize(
    ("weighted", "bars"),
    [(True, (0.6, 0.5, 0.999, 0.5)), (False, (0.6, 0.5, 1.00001, 0.5))],
    ids=["importance", "uniform"],
)
def test_error_is_below_ggmls(
    type_: GgmlType, data: str, weighted: bool, bars: tuple[float, ...], effort: str
) -> None:
    """ggml rounds to the peak and takes no importance; only its Q1_0 is best without any."""
    importance = laws.log_normal() if weighted else None
    ratio = laws.error_ratio(type_, laws.DATA[data](48), importance, effort)
    assert ratio <= bars[TYPES.index(type_)]


@every_type
def test_best_comes_close_to_an_exhaustive_search(type_: GgmlType) -> None:
    x, q = laws.student(4, 512), laws.log_normal(512)
    decoded = decode(encode(x, type_.name, q, "best"), type_.name)
    ours = float((q * (x - decoded.astype(np.float64)) ** 2).sum())
    bound = sum(
        least_error(block, w, np.array(LEVELS[type_]))
        for row in x.astype(np.float64)
        for block, w in zip(
            row.reshape(-1, type_.block_size),
            q.astype(np.float64).reshape(-1, type_.block_size),
            strict=True,
        )
    )
    assert bound * 0.9999 <= ours <= bound * 1.001


@every_type
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("scale", [0.03125, -0.0173])
def test_weights_on_the_levels_are_kept_exactly(type_: GgmlType, effort: str, scale: float) -> None:
    rng = np.random.default_rng(11)
    d = np.float32(np.float16(scale))
    x = rng.choice(np.array(LEVELS[type_], np.float32), (4, laws.COLS)) * d
    for importance in (None, laws.log_normal()):
        decoded = decode(encode(x, type_.name, importance, effort), type_.name)
        assert np.array_equal(decoded, x)


def test_ternary_weights_are_kept_exactly_where_a_fourth_level_exists() -> None:
    rng = np.random.default_rng(12)
    x = rng.integers(-1, 2, (4, laws.COLS)).astype(np.float32) * np.float32(0.25)
    for name in ("TQ2_0", "Q2_0"):
        assert np.array_equal(decode(encode(x, name), name), x)
