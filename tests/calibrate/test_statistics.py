"""Sums of squares: what adding, merging and describing them gives."""

from __future__ import annotations

from itertools import permutations
from math import log2, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.statistics import (
    LazySums,
    Statistics,
    Sums,
    add,
    figures,
    layer_figures,
    merged,
)
from quantkit.errors import GgufError, NonFiniteError, QuantkitError
from quantkit.types import Kv, KvType
from tests.calibrate.builders import equal, statistics

SHAPES = {"blk.0.a.weight": (1, 3), "blk.0.ffn_up_exps.weight": (4, 2)}


def test_sums_of_parts_are_the_sums_of_the_whole():
    x = np.random.default_rng(0).standard_normal((100, 5))
    stats = Statistics()
    for part in (x[:30], x[30:31], x[31:]):
        add(stats.sums, "a.weight", (part**2).sum(0), len(part))
    np.testing.assert_allclose(stats.mean("a.weight"), (x**2).mean(0)[np.newaxis], rtol=1e-14)
    assert stats.sums["a.weight"].counts.tolist() == [100]


def test_each_expert_has_its_own_row_and_count():
    stats = Statistics()
    add(stats.sums, "e.weight", [4.0, 8.0], 2, row=2, n_rows=3)
    add(stats.sums, "e.weight", [1.0, 1.0], 1, row=0, n_rows=3)
    assert stats.sums["e.weight"].counts.tolist() == [1, 0, 2]
    assert stats.mean("e.weight").tolist() == [[1, 1], [0, 0], [2, 4]]


def test_priors_are_kept_apart():
    stats = Statistics()
    add(stats.priors, "e.weight", [4.0], 2, row=1, n_rows=2)
    assert not stats.sums
    assert stats.priors["e.weight"].counts.tolist() == [0, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_with_tensor_and_column(bad):
    stats = Statistics()
    with pytest.raises(NonFiniteError, match=r"tensor a\.weight: .* in column 1"):
        add(stats.sums, "a.weight", [1.0, bad], 1)
    assert not stats.sums


@pytest.mark.parametrize(
    ("sum2", "count", "row", "n_rows"),
    [
        ([-1.0], 1, 0, 1),
        ([1.0], -1, 0, 1),
        ([1.0], float("nan"), 0, 1),
        ([1.0], 1, 1, 1),
        ([1.0], 1, -1, 1),
        ([[1.0]], 1, 0, 1),
        ([], 1, 0, 1),
    ],
)
def test_what_is_no_sum_of_squares_is_refused(sum2, count, row, n_rows):
    with pytest.raises(QuantkitError, match="no sum of squares"):
        add(Statistics().sums, "a.weight", sum2, count, row=row, n_rows=n_rows)


def test_another_shape_for_a_known_name_is_refused():
    stats = statistics(SHAPES)
    with pytest.raises(GgufError, match="1 × 4 values cannot be added to 1 × 3"):
        add(stats.sums, "blk.0.a.weight", np.ones(4), 1)
    with pytest.raises(GgufError, match="5 × 2"):
        add(stats.sums, "blk.0.ffn_up_exps.weight", np.ones(2), 1, n_rows=5)


def test_merging_is_independent_of_order_and_grouping():
    def parts():
        return [
            statistics(SHAPES | {f"only-{seed}": (1, 2)}, seed=seed, chunk_size=256 << seed)
            for seed in range(3)
        ]

    results = []
    for order in permutations(range(3)):
        made = parts()
        a, b, c = (made[k] for k in order)
        results += [merged([a, b, c]), merged([a, merged([b, c])])]
    for result in results:
        assert result.sums.keys() == results[0].sums.keys()
        assert (result.chunk_size, result.n_tokens) == (1024, 3 * 1024)
        assert set(result.datasets) == {"text-0", "text-1", "text-2"}
        for name, sums in result.sums.items():
            assert np.array_equal(sums.counts, results[0].sums[name].counts)
            # three additions in f64
            np.testing.assert_allclose(sums.sum2, results[0].sums[name].sum2, rtol=1e-15)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 1000), st.integers(0, 2**20)), max_size=12
    ),
    st.data(),
)
def test_merging_whole_numbers_is_exact_however_they_are_split(additions, data):
    whole = Statistics()
    parts = [Statistics() for _ in range(3)]
    for row, count, value in additions:
        part = parts[data.draw(st.integers(0, 2))]
        for stats in (whole, part):
            add(stats.sums, "e.weight", [value, 1.0], count, row=row, n_rows=4)
            add(stats.priors, "e.weight", [value, 2.0], count, row=row, n_rows=4)
    together = merged(data.draw(st.permutations(parts)))
    assert equal(together.sums, whole.sums)
    assert equal(together.priors, whole.priors)


def test_statistics_that_are_merged_stay_what_they_are():
    shapes = {"x": (1, 2), "y": (3, 2)}
    a, b = statistics(shapes), statistics(shapes, seed=1)
    together = merged([a, b])
    assert together.sums["y"].counts.tolist() == (a.sums["y"].counts + b.sums["y"].counts).tolist()
    assert equal(a.sums, statistics(shapes).sums)
    assert equal(b.sums, statistics(shapes, seed=1).sums)


def test_merging_touches_no_value_before_a_weight_is_asked_for():
    asked = []

    def make(name: str) -> Sums:
        asked.append(name)
        return Sums(np.ones((1, 2)), np.ones(1))

    parts = [Statistics(sums=LazySums({"x": (1, 2), "y": (1, 2)}, make)) for _ in range(2)]
    together = merged(parts)
    assert set(together.sums) == {"x", "y"}
    assert asked == []
    assert together.sums["y"].sum2.tolist() == [[2.0, 2.0]]
    assert asked == ["y", "y"]


def test_other_models_are_refused_by_name():
    a, b, c = (statistics({"x": (1, 2), **extra}) for extra in ({}, {"y": (1, 2)}, {"y": (2, 2)}))
    with pytest.raises(GgufError, match="tensor y: 2 × 2 values") as caught:
        merged([a, b, c])
    assert "different models" in caught.value.hint


def test_merging_keeps_the_metadata_that_all_agree_on():
    same = {"quantkit.x": Kv(KvType.U32, 1)}
    parts = [Statistics(kvs={**same, "quantkit.y": Kv(KvType.U32, n)}) for n in (1, 2)]
    assert merged(parts).kvs == same


def test_figures_are_those_of_a_plain_reading_of_the_formulas():
    stats = statistics({"blk.1.e.weight": (3, 4), "blk.0.e.weight": (3, 4)})
    sums = stats.sums["blk.1.e.weight"]
    sums.sum2[1] = sums.counts[1] = 0
    sums.sum2[2, 0] = 0
    of = figures(stats)["blk.1.e.weight"]

    v = [sums.sum2[i, j] / sums.counts[i] for i in (0, 2) for j in range(4)]
    mean = sum(v) / 8
    std = sqrt(sum((x - mean) ** 2 for x in v) / 8)
    entropy = -sum(x / sum(v) * log2(x / sum(v)) for x in v if x > 0)
    before = stats.sums["blk.0.e.weight"].sum2
    cosine = (sums.sum2 * before).sum() / sqrt((sums.sum2**2).sum() * (before**2).sum())
    assert of.n_values == 8
    assert (of.least, of.most, of.active) == (0, max(v), 7 / 8)
    assert (of.total, of.mean, of.deviation) == pytest.approx((sum(v), mean, std))
    assert (of.entropy, of.entropy_share) == pytest.approx((entropy, entropy / 3))
    assert of.above_one_deviation == sum(x > mean + std for x in v) / 8
    assert of.cosine == pytest.approx(cosine)
    assert figures(stats)["blk.0.e.weight"].cosine is None


def test_layer_figures_weigh_a_tensor_by_its_size():
    stats = statistics(
        {"blk.7.a.weight": (1, 2), "blk.7.b.weight": (2, 3), "output.weight": (1, 2)}
    )
    by_name = figures(stats)
    a, b = by_name["blk.7.a.weight"], by_name["blk.7.b.weight"]
    (layer,) = layer_figures(by_name).items()
    assert layer[0] == 7
    assert layer[1]["total"] == pytest.approx((2 * a.total + 6 * b.total) / 8)
    assert layer[1]["cosine"] == 0


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0, 3.0], [5.0]])
def test_figures_of_degenerate_weights_are_finite(values):
    stats = Statistics()
    add(stats.sums, "blk.0.a.weight", values, 1)
    add(stats.sums, "blk.0.unseen.weight", [0.0], 0)
    (of,) = figures(stats).values()
    assert np.isfinite([of.entropy, of.entropy_share, of.above_one_deviation]).all()
    assert of.above_one_deviation == 0


def test_an_unseen_row_has_a_mean_of_zero_and_no_warning():
    assert Sums(np.zeros((2, 2)), np.array([0.0, 2.0])).mean().tolist() == [[0, 0], [0, 0]]
