"""MXFP4 and NVFP4: with so few scales the best one can be told, and must be found."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import quants

from quantkit.quantize import decode, encode
from quantkit.quantize.kernels import fp4
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.naive.scale import least_error_of_scales

TYPES = [GgmlType.MXFP4, GgmlType.NVFP4]
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
@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "uniform"])
@pytest.mark.parametrize("data", laws.DATA)
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_error_is_no_larger_than_ggmls(
    type_: GgmlType, data: str, weighted: bool, effort: str
) -> None:
    importance = laws.log_normal() if weighted else None
    bar = 0.97 if effort == "default" else 1.0
    assert laws.error_ratio(type_, laws.DATA[data](48), importance, effort) <= bar


@pytest.mark.parametrize(
    ("type_", "size", "scales"),
    [
        (GgmlType.MXFP4, 32, 2.0 ** np.arange(-40, 20)),
        (GgmlType.NVFP4, 16, fp4._UE4M3[:127].astype(np.float64) / 2),
    ],
    ids=["MXFP4", "NVFP4"],
)
@pytest.mark.parametrize("effort", ["default", "best"])
def test_no_other_scale_does_better(
    type_: GgmlType, size: int, scales: np.ndarray, effort: str
) -> None:
    x, q = laws.student(4, 256) * np.float32(20), laws.log_normal(256)
    levels = np.unique(quants.MXFP4.kvalues).astype(np.float64)
    decoded = decode(encode(x, type_.name, q, effort), type_.name).astype(np.float64)
    ours = (q * (x - decoded) ** 2).reshape(-1, size).sum(axis=1)
    bound = np.array(
        [
            least_error_of_scales(block, w, levels, scales)
            for row in x.astype(np.float64)
            for block, w in zip(
                row.reshape(-1, size), q.astype(float).reshape(-1, size), strict=True
            )
        ]
    )
    assert (ours >= bound * 0.9999).all()
    assert ours.sum() <= bound.sum() * (1.0005 if effort == "default" else 1.00001)


def test_weights_on_the_fp4_levels_are_kept_exactly() -> None:
    rng = np.random.default_rng(3)
    levels = np.unique(quants.MXFP4.kvalues).astype(np.float32)
    x = rng.choice(levels, (4, 256)) * np.float32(2**-9)
    assert np.array_equal(decode(encode(x, "MXFP4"), "MXFP4"), x)
    assert np.array_equal(decode(encode(x, "NVFP4"), "NVFP4"), x)


def test_scales_stop_short_of_infinity() -> None:
    x = np.full((1, 64), np.finfo(np.float32).max, np.float32)
    assert decode(encode(x, "MXFP4"), "MXFP4")[0, 0] == 12 * 2.0**124
    assert decode(encode(x, "NVFP4"), "NVFP4")[0, 0] == 12 * 224
