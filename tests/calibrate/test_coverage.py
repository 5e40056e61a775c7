"""How much importance relies on what an expert saw itself, and what is told about it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.coverage import FLOOR, KAPPA, Origin, coverage, filled, importance
from quantkit.calibrate.imatrix import read_imatrix
from quantkit.calibrate.statistics import Statistics, add
from quantkit.errors import GgufError, NonFiniteError
from tests.calibrate.builders import RECORDED, statistics

UP, DOWN = "blk.3.ffn_up_exps.weight", "blk.3.ffn_down_exps.weight"
K_B = "blk.3.attn_k_b.weight"


def experts(*rows: tuple[float, list[float]], name: str = UP) -> Statistics:
    """One row (count, means) an expert."""
    stats = Statistics()
    for row, (count, means) in enumerate(rows):
        add(stats.sums, name, np.multiply(means, count), count, row=row, n_rows=len(rows))
    return stats


def with_prior(stats: Statistics, *rows: tuple[float, list[float]], name: str = DOWN):
    for row, (count, means) in enumerate(rows):
        add(stats.priors, name, np.multiply(means, count), count, row=row, n_rows=len(rows))
    return stats


def test_a_plain_weight_s_importance_is_its_mean():
    stats = experts((30720, [0.5, 0.125, 3.7]), name="blk.0.attn_q_a.weight")
    found = importance(stats, "blk.0.attn_q_a.weight", (5, 3))
    np.testing.assert_array_equal(found.values, np.float32([[0.5, 0.125, 3.7]]))
    assert (found.values.dtype, found.origins, found.note) == (np.float32, (Origin.OWN,), "")


def test_a_plain_weight_is_taken_at_its_word_however_few_the_tokens():
    stats = experts((3, [1.0, 2.0]), name="blk.0.attn_q_a.weight")
    found = importance(stats, "blk.0.attn_q_a.weight", (5, 2))
    assert found.values.tolist() == [[1, 2]]


def test_heads_share_one_count_and_are_not_blended_with_each_other():
    stats = Statistics()
    add(stats.sums, K_B, np.arange(1.0, 7.0), 10)
    found = importance(stats, K_B, (3, 4, 2))
    np.testing.assert_allclose(found.values, np.arange(1, 7).reshape(3, 2) / 10, rtol=1e-7)
    assert found.note == ""


def twin(stats: Statistics, name: str, kappa: float) -> list[list[float]]:
    """The rule for experts, told with loops."""
    sums, prior = stats.sums[name], stats.priors.get(name)
    m, n = sums.sum2.shape
    result = []
    for e in range(m):
        row = []
        for j in range(n):
            target = sum(sums.sum2[i, j] for i in range(m)) / sum(sums.counts)
            if prior is not None and prior.counts[e]:
                target = prior.sum2[e, j] / prior.counts[e]
            row.append((sums.sum2[e, j] + kappa * target) / (sums.counts[e] + kappa))
        mean = sum(row) / n
        result.append([max(x, FLOOR * mean) for x in row])
    return result


@pytest.mark.parametrize("kappa", [1.0, KAPPA, 1000.0])
@pytest.mark.parametrize("name", [UP, DOWN])
def test_experts_are_blended_by_their_tokens(name, kappa):
    stats = statistics({name: (5, 6)}, seed=3)
    stats.sums[name].counts[1] = 7
    stats.sums[name].counts[2] = stats.sums[name].sum2[2] = 0
    if name == DOWN:
        prior = statistics({name: (5, 6)}, seed=4).sums[name]
        prior.counts[3] = prior.sum2[3] = 0
        stats.priors[name] = prior
    found = importance(stats, name, (5, 9, 6), kappa=kappa)
    np.testing.assert_allclose(found.values, twin(stats, name, kappa), rtol=1e-6)


def test_an_unseen_expert_takes_its_own_prior_and_else_the_layer_s_mean():
    rows = (0, [0.0, 0.0]), (3000, [1.0, 3.0]), (1000, [5.0, 3.0])
    found = importance(experts(*rows), UP, (3, 4, 2))
    assert found.values[0].tolist() == [2.0, 3.0]
    assert found.origins == (Origin.POOLED, Origin.OWN, Origin.OWN)
    assert found.note == (
        "1 of 3 matrices saw fewer than 64 tokens or only zeros, 1 of them none,"
        " importance mostly from all experts (1)"
    )

    stats = with_prior(experts(*rows, name=DOWN), (100, [9.0, 1.0]), (0, [0.0, 0.0]), (9, [1.0, 1]))
    found = importance(stats, DOWN, (3, 4, 2))
    assert found.values[0].tolist() == [9.0, 1.0]
    assert found.origins == (Origin.PRIOR, Origin.OWN, Origin.OWN)


def test_priors_alone_serve_experts_that_no_token_reached():
    stats = with_prior(Statistics(), (100, [9.0, 1.0]), (0, [0.0, 0.0]), (50, [1.0, 3.0]))
    found = importance(stats, DOWN, (3, 4, 2))
    assert found.values.tolist() == [[9, 1], [5, 2], [1, 3]]
    assert found.origins == (Origin.PRIOR, Origin.POOLED, Origin.PRIOR)


def test_half_of_the_weight_is_the_expert_s_own_at_kappa_tokens():
    stats = experts((KAPPA, [1.0, 3.0]), (1e9, [3.0, 1.0]))
    np.testing.assert_allclose(importance(stats, UP, (2, 4, 2)).values[0], [2, 2], rtol=1e-6)


def test_without_kappa_an_expert_is_taken_at_its_word():
    stats = experts((1, [1.0, 3.0]), (1e9, [3.0, 1.0]), (0, [0.0, 0.0]))
    found = importance(stats, UP, (3, 4, 2), kappa=0)
    assert found.values[0].tolist() == [1, 3]
    assert found.values[2].tolist() == pytest.approx([3, 1], rel=1e-6)


def test_where_nothing_is_known_there_is_no_importance_and_a_note():
    for stats, note in (
        (Statistics(), "no statistics"),
        (experts((0, [0.0, 0.0]), (0, [0.0, 0.0])), "always 0"),
        (experts((5, [0.0, 0.0]), (5, [0.0, 0.0])), "always 0"),
    ):
        found = importance(stats, UP, (2, 4, 2))
        assert found.values is None
        assert found.origins == (Origin.NONE, Origin.NONE)
        assert note in found.note


def test_an_expert_of_a_legacy_file_that_is_all_ones_has_seen_nothing():
    stats = Statistics()
    add(stats.sums, UP, np.array([2.0, 4.0, 1.0, 1.0, 4.0, 8.0]) * 1024, 1024)
    found = importance(stats, UP, (3, 9, 2))
    assert found.values.tolist() == [[2, 4], [3, 6], [4, 8]]
    assert found.origins == (Origin.OWN, Origin.POOLED, Origin.OWN)
    assert "of them none" not in found.note, "a legacy file has no counts"


def test_columns_that_were_never_active_keep_a_small_importance():
    stats = experts((1000, [0.0, 1.0, 3.0, 0.0]), name="output.weight")
    found = importance(stats, "output.weight", (8, 4))
    assert found.values[0] == pytest.approx([FLOOR, 1, 3, FLOOR])


@pytest.mark.parametrize("scale", [1e-300, 1e-42, 1e-30, 1e38])
def test_importance_is_positive_and_finite_at_every_scale(scale):
    stats = experts((1, [0.0, scale, 3 * scale]), name="output.weight")
    values = importance(stats, "output.weight", (8, 3)).values
    assert np.isfinite(values).all()
    assert (values > 0).all()


def test_importance_beyond_f32_is_refused_by_name():
    with pytest.raises(NonFiniteError, match=r"output\.weight"):
        importance(experts((1, [1e39]), name="output.weight"), "output.weight", (8, 1))


@pytest.mark.parametrize("shape", [(8, 5), (2, 8, 4), (8, 7), (3, 8, 3)])
def test_statistics_of_another_shape_are_refused_by_name(shape):
    with pytest.raises(GgufError, match=r"blk\.3\.ffn_up_exps\.weight: statistics of 3 × 4"):
        importance(statistics({UP: (3, 4)}), UP, shape)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.lists(st.floats(0, 1e6), min_size=3, max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1e4),
)
def test_importance_lies_between_what_an_expert_saw_and_what_all_saw(rows, kappa):
    stats = experts(*rows)
    found = importance(stats, UP, (len(rows), 2, 3), kappa=kappa)
    mean = stats.mean(UP)
    if found.values is None:
        assert not (mean > 0).any()
        return
    pooled = stats.sums[UP].sum2.sum(0) / max(1, stats.sums[UP].counts.sum())
    low = np.where(mean.any(1, keepdims=True), np.minimum(mean, pooled), pooled)
    high = np.where(mean.any(1, keepdims=True), np.maximum(mean, pooled), pooled)
    floor = FLOOR * high.mean(1, keepdims=True) * 1.001 + 1e-37
    assert (found.values > 0).all()
    assert (found.values >= low * 0.999999).all()
    assert (found.values <= np.maximum(high * 1.000001, floor)).all()


def test_coverage_counts_experts_below_the_thresholds():
    stats = experts((0, [0.0, 0.0]), (31, [1.0, 2.0]), (32, [1.0, 2.0]), (256, [2.0, 1.0]))
    stats.sums |= experts((9, [1.0]), (300, [2.0]), name="blk.10.ffn_down_exps.weight").sums
    add(stats.sums, "blk.3.attn_q_a.weight", [1.0], 1)
    add(stats.sums, "blk.3.unseen.weight", [0.0], 0)
    add(stats.sums, "blk.4.ffn_up_exps.weight", [1.0, 2.0], 1)
    found = coverage(stats)
    assert [layer.layer for layer in found.layers] == [3, 10]
    assert found.layers[0].counts == (0, 31, 32, 256)
    assert [found.layers[0].n_below(n) for n in (1, 32, 256)] == [1, 2, 3]
    assert found.share_below(32) == 3 / 6
    assert found.layers[0].origins == {"ffn_up_exps.weight": {"all experts": 3, "own": 1}}
    assert found.empty == ("blk.3.unseen.weight",)
    assert found.undivided == ("blk.4.ffn_up_exps.weight",)


def test_a_layer_s_count_is_that_of_the_tensor_that_saw_least():
    stats = experts((10, [1.0]), (2, [1.0]))
    stats.sums |= experts((4, [1.0]), (8, [1.0]), name=DOWN).sums
    (layer,) = coverage(stats).layers
    assert layer.counts == (4, 2)


def test_coverage_of_a_real_file_names_the_starved_expert():
    found = coverage(read_imatrix(RECORDED))
    assert [min(layer.counts) for layer in found.layers] == [653, 7, 3281]
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["n_experts"] == 24
    assert told["share_unseen"] == 0
    assert told["share_below_32"] == told["share_below_256"] == pytest.approx(1 / 24)
    made = told["layers"][1]["importance_from"]
    assert made["ffn_up_exps.weight"] == {"own": 7, "all experts": 1}
    head, *rows = found.rows()
    assert {len(row) for row in rows} == {len(head)}
    assert rows[1][:8] == ("2", "8", "7", "5557", "19314", "0", "1", "1")


def test_coverage_of_nothing_is_empty():
    found = coverage(Statistics())
    assert (found.layers, found.n_experts, found.share_below(32)) == ((), 0, 0)
    assert len(found.rows()) == 1


def test_filled_statistics_hold_the_blended_means_and_leave_no_expert_out():
    stats = experts((0, [0.0, 0.0]), (5, [1.0, 2.0]), (4000, [3.0, 0.0]))
    stats = with_prior(stats, (100, [1.0, 1.0]), (100, [3.0, 1.0]), (1, [1.0, 2.0]))
    add(stats.sums, "blk.3.attn_q_a.weight", [8.0, 4.0], 2)
    add(stats.sums, "blk.3.unseen.weight", [0.0], 0)
    made, missing = filled(stats)
    assert missing == ("blk.3.unseen.weight",)
    assert not made.priors
    assert made.sums[UP].counts.tolist() == [1, 5, 4000]
    for name, shape in ((UP, (3, 1, 2)), (DOWN, (3, 1, 2)), ("blk.3.attn_q_a.weight", (1, 2))):
        expected = importance(stats, name, shape).values
        np.testing.assert_allclose(made.mean(name), expected, rtol=1e-7)
        again = importance(made, name, shape).values
        np.testing.assert_allclose(again, expected, rtol=FLOOR)  # floors raise the mean
    assert made.sums[DOWN].counts.tolist() == [1, 1, 1]
    assert (made.chunk_size, made.n_tokens) == (stats.chunk_size, stats.n_tokens)
