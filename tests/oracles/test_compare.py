"""The distances that every comparison with an oracle is stated in."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles.compare import log_softmax, mean_kl, perplexity, same_top1


def test_logits_have_no_distance_from_themselves_nor_from_a_shifted_copy():
    logits = np.random.default_rng(0).normal(size=(3, 5, 11)).astype(np.float32)
    assert mean_kl(logits, logits) == 0
    assert mean_kl(logits, logits.astype(np.float64) + 4.0) == pytest.approx(0, abs=1e-12)
    assert same_top1(logits, logits) == 1


def test_kl_is_the_sum_of_p_log_p_over_q():
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert mean_kl(np.log(p)[None], np.log(q)[None]) == pytest.approx(expected, rel=1e-12)
    assert mean_kl(np.log(q)[None], np.log(p)[None]) != pytest.approx(expected, rel=1e-3)


def test_kl_survives_logits_beyond_the_range_of_exp():
    assert mean_kl([[2000.0, 0.0]], [[0.0, 0.0]]) == pytest.approx(np.log(2))


def test_same_top1_counts_positions():
    a = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0], [2.0, 3.0]])
    b = np.array([[1.0, 0.0], [1.0, 0.0], [3.0, 2.0], [2.0, 3.0]])
    assert same_top1(a, b) == 0.75


def test_perplexity_of_uniform_logits_is_the_vocabulary_size():
    assert perplexity(np.zeros((2, 6, 7)), np.ones((2, 6), int), 3) == pytest.approx(7)


def test_perplexity_scores_each_position_by_its_successor():
    ids = np.array([[0, 1, 2, 0, 1, 2]])
    logits = np.eye(3)[(ids + 1) % 3] * 50
    assert perplexity(logits, ids) == pytest.approx(1)
    assert log_softmax(logits).max() <= 0
