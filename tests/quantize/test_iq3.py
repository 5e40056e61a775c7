"""IQ3_XXS and IQ3_S: against a search of all entries and legal signs."""

from __future__ import annotations

import pytest

from quantkit.quantize import Effort, Weighting
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.naive import bounds, iq

TYPES = [GgmlType.IQ3_XXS, GgmlType.IQ3_S]
# Error beyond the search of all entries and signs at the stored scales, and the share of bytes of
# signs that, with their entries, are not the best: the scale is refitted after the last of them, at
# fast after the first. Over five seeds there were at most 3.5 % and 16 %.
CHOICES: dict[GgmlType, dict[Effort, tuple[float, float]]] = {
    GgmlType.IQ3_XXS: {"fast": (0.05, 0.2), "default": (0.006, 0.1), "best": (0.0001, 0.01)},
    GgmlType.IQ3_S: {"fast": (0.05, 0.2), "default": (0.03, 0.15), "best": (0.005, 0.08)},
}
# Error beyond the search of scales and all else together.
TOGETHER: dict[GgmlType, dict[Effort, float]] = {
    GgmlType.IQ3_XXS: {"default": 0.06, "best": 0.01},
    GgmlType.IQ3_S: {"default": 0.1, "best": 0.025},
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
