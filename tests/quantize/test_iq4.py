"""IQ4_NL and IQ4_XS."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import quants

from quantkit.quantize import encode
from quantkit.quantize.kernels import iq4
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.ggml import ggml_decode
from tests.quantize.naive.scale import least_error

TYPES = [GgmlType.IQ4_NL, GgmlType.IQ4_XS]
EFFORTS = ["fast", "default", "best"]
every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)


def test_levels_are_those_of_the_gguf_package() -> None:
    assert iq4.LEVELS.tolist() == list(quants.IQ4_NL.kvalues)


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
@pytest.mark.parametrize(("data", "bar"), [("gauss", 0.94), ("student", 0.95), ("lattice", 0.9)])
def test_error_is_below_ggmls(type_: GgmlType, data: str, bar: float, weighted: bool) -> None:
    importance = laws.log_normal() if weighted else None
    assert laws.error_ratio(type_, laws.DATA[data](48), importance) <= bar


@every_type
def test_ggmls_weighting_can_be_chosen(type_: GgmlType) -> None:
    laws.check_weighting_is_switchable(type_, 2.0, 32 if type_ is GgmlType.IQ4_NL else 256)


@pytest.mark.parametrize(("effort", "slack"), [("default", 1.008), ("best", 1.004)])
def test_iq4_nl_comes_close_to_an_exhaustive_search(effort: str, slack: float) -> None:
    """So what is left to gain over ggml is not in the scale: no d does better than this."""
    x, q = laws.student(3, 512), laws.log_normal(512)
    reached = ggml_decode(encode(x, "IQ4_NL", q, effort), GgmlType.IQ4_NL)
    ours = float((q * (x - reached.astype(np.float64)) ** 2).sum())
    bound = sum(
        least_error(block.astype(np.float64), w.astype(np.float64), iq4.LEVELS.astype(np.float64))
        for row in x
        for block, w in zip(row.reshape(-1, 32), q.reshape(-1, 32), strict=True)
    )
    assert bound * 0.9999 <= ours <= bound * slack


def test_small_weights_are_not_lost_in_iq4_xs() -> None:
    x = laws.gauss(4) * np.float32(1e-3)
    decoded = ggml_decode(encode(x, "IQ4_XS"), GgmlType.IQ4_XS)
    assert laws.error(x, decoded, None) < 0.02
