"""IQ1_S and IQ1_M: against a search of all entries and shifts."""

from __future__ import annotations

import pytest

from quantkit.quantize import Effort, Weighting
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.naive import bounds, iq

TYPES = [GgmlType.IQ1_S, GgmlType.IQ1_M]
# Error beyond the search of all entries and shifts at the stored scales, and the share of choices
# that are not the best: the scale is refitted after the last of them, and only entries near to free
# rounding are tried. Over five seeds there were at most 0.23 % and 21 % (IQ1_S at fast).
CHOICES: dict[GgmlType, dict[Effort, tuple[float, float]]] = {
    GgmlType.IQ1_S: {"fast": (0.004, 0.25), "default": (0.004, 0.16), "best": (0.004, 0.14)},
    GgmlType.IQ1_M: {"fast": (0.004, 0.1), "default": (0.004, 0.05), "best": (0.004, 0.04)},
}
# Error beyond the search of scales and all else together.
TOGETHER: dict[GgmlType, dict[Effort, float]] = {
    GgmlType.IQ1_S: {"default": 0.008, "best": 0.006},
    GgmlType.IQ1_M: {"default": 0.01, "best": 0.006},
}
every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)


@every_type
def test_numbers_lie_where_the_format_says(type_: GgmlType) -> None:
    bounds.check_layout(type_)


@every_type
def test_ggmls_weighting_can_be_chosen(type_: GgmlType) -> None:
    laws.check_weighting_is_switchable(type_, iq.FORMS[type_].c, iq.SUPER)


@every_type
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
@pytest.mark.parametrize("weighting", ["importance", "ggml"])
def test_entries_are_the_best_of_the_codebook_at_the_stored_scales(
    type_: GgmlType, effort: Effort, weighting: Weighting
) -> None:
    slack, missed = CHOICES[type_][effort]
    bounds.check_choices(type_, effort, weighting, slack=slack, missed=missed)


@every_type
@pytest.mark.parametrize("effort", ["default", "best"])
def test_searching_everything_at_once_gains_little(type_: GgmlType, effort: Effort) -> None:
    bounds.check_joint_search(type_, effort, slack=TOGETHER[type_][effort])


@every_type
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
@pytest.mark.parametrize("weighting", ["importance", "ggml", "blend"])
def test_no_neighbour_of_the_scale_is_better(
    type_: GgmlType, effort: Effort, weighting: Weighting
) -> None:
    bounds.check_scale(type_, effort, weighting)
