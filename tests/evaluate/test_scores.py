"""Scores per token: the same from tiles as from whole rows, and right where they are tiny."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.errors import NonFiniteError, UsageError
from quantkit.evaluate import scores as module
from quantkit.evaluate.scores import BASE_FLOOR, Scores, TileScorer

N_TOK, N_VOCAB = 24, 500


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors; teams of threads that wait for a busy machine would take all the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_logits(seed: int, n_tok: int = N_TOK, n_vocab: int = N_VOCAB, spread: float = 3.0):
    rng = np.random.default_rng(seed)
    return (spread * rng.standard_normal((n_tok, n_vocab))).astype(np.float32)


def make_targets(n_tok: int = N_TOK, n_vocab: int = N_VOCAB):
    return np.random.default_rng(5).integers(0, n_vocab, n_tok)


def score(base, quants, targets, width=None, **options) -> Scores:
    scorer = TileScorer(targets, len(quants), **options)
    n_vocab = base.shape[1]
    for first in range(0, n_vocab, width or n_vocab):
        tile = slice(first, first + (width or n_vocab))
        scorer.add(
            first,
            torch.from_numpy(base[:, tile]),
            [torch.from_numpy(quant[:, tile]) for quant in quants],
        )
    return scorer.finish()


def log_softmax(row):
    row = row.astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def exact_kld(base, quant):
    """A sum of terms that are never negative, so that nothing cancels: p_b (r - 1 - ln r)."""
    p = np.exp(log_softmax(base))
    step = quant.astype(np.float64) - base.astype(np.float64)
    step -= p @ step
    ln_r = step - np.log1p(p @ np.expm1(step))
    return p @ (np.expm1(ln_r) - ln_r)


def twin(base, quant, targets):
    """nll of base and quant, KLD, same top and dp, whole rows in f64, one after another."""
    found = []
    for b, q, target in zip(base, quant, targets, strict=True):
        log_b, log_q = log_softmax(b), log_softmax(q)
        found.append(
            (
                -log_b[target],
                -log_q[target],
                np.exp(log_b) @ (log_b - log_q),
                b.argmax() == q.argmax(),
                np.exp(log_q[target]) - np.exp(log_b[target]),
            )
        )
    return [np.array(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("width", [1, 7, 100, 499, 500])
def test_scores_from_tiles_are_those_of_whole_rows(width):
    base, targets = make_logits(0), make_targets()
    quants = [base + 0.3 * make_logits(1), make_logits(2)]
    scores = score(base, quants, targets, width)
    for k, quant in enumerate(quants):
        nll_base, nll, kld, same_top, dp = twin(base, quant, targets)
        np.testing.assert_allclose(scores.nll_base, nll_base, rtol=1e-12)
        np.testing.assert_allclose(scores.nll[k], nll, rtol=1e-12)
        np.testing.assert_allclose(scores.kld[k], kld, rtol=1e-11)
        np.testing.assert_array_equal(scores.same_top[k], same_top)
        np.testing.assert_allclose(scores.dp[k], dp, atol=1e-14)
    assert 0 < scores.same_top[0].mean() < 1


@pytest.mark.parametrize("width", [2048, 163_840])
@pytest.mark.parametrize("kld", [1e-4, 1e-8, 1e-10])
def test_a_tiny_divergence_over_a_large_vocabulary_is_right_to_a_percent(kld, width):
    base = make_logits(0, 2, 163_840)
    noise = np.float32(np.sqrt(2 * kld)) * make_logits(1, 2, 163_840, 1.0)
    quant = base + noise
    seen = score(base, [quant], np.array([5, 70_000]), width).kld[0]
    expected = [exact_kld(b, q) for b, q in zip(base, quant, strict=True)]
    assert 0.2 * kld < min(expected) < max(expected) < 5 * kld
    np.testing.assert_allclose(seen, expected, rtol=0.01)


@pytest.mark.parametrize("width", [33, 500])
def test_a_model_does_not_diverge_from_itself(width):
    base = make_logits(0)
    scores = score(base, [base], make_targets(), width)
    assert not scores.kld.any()
    assert not scores.dp.any()
    assert scores.same_top.all()
    np.testing.assert_array_equal(scores.nll[0], scores.nll_base)


def test_a_constant_added_to_all_logits_changes_nothing():
    base = np.round(make_logits(0) * 64) / 64
    scores = score(base, [base + np.float32(4096)], make_targets(), 100)
    np.testing.assert_allclose(scores.kld, 0, atol=1e-11)
    assert (scores.kld >= -1e-12).all()
    np.testing.assert_allclose(scores.nll[0], scores.nll_base, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    logits=hnp.arrays(
        np.float32, (2, 3, 17), elements=st.floats(-60, 60, width=32, allow_nan=False)
    ),
    width=st.integers(1, 17),
)
def test_any_logits_give_the_twins_scores_and_no_negative_divergence(logits, width):
    base, quant = logits
    targets = np.array([0, 8, 16])
    scores = score(base, [quant], targets, width)
    nll_base, nll, kld, same_top, dp = twin(base, quant, targets)
    assert (scores.kld >= 0).all()
    np.testing.assert_allclose(scores.kld[0], kld, atol=1e-10)
    np.testing.assert_allclose(scores.nll[0], nll, atol=1e-11)
    np.testing.assert_allclose(scores.nll_base, nll_base, atol=1e-11)
    np.testing.assert_array_equal(scores.same_top[0], same_top)
    np.testing.assert_allclose(scores.dp[0], dp, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("base", "quant", "same"),
    [
        ([0, 2, 1, 2, 0, 2], [0, 2, 1, 1, 0, 2], True),  # the first of equals on both sides
        ([0, 1, 1, 2, 0, 2], [0, 1, 1, 1, 0, 2], False),  # 3 against 5
        ([1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2], True),
        ([-9, -9, -9, -9, -9, -8], [-9, -8, -9, -9, -9, -9], False),
    ],
)
def test_of_equal_logits_the_first_is_the_top(base, quant, same, width):
    rows = (np.array([row], np.float32) for row in (base, quant))
    scores = score(next(rows), [next(rows)], np.array([0]), width)
    assert bool(scores.same_top[0, 0]) is same


def test_logits_of_any_size_and_order_do_not_overflow():
    rising = np.linspace(-1e4, 1e4, N_VOCAB, dtype=np.float32)[None]
    scores = score(rising, [rising[:, ::-1].copy()], np.array([0]), 10)
    assert scores.nll_base[0] == pytest.approx(2e4, rel=1e-6)
    assert scores.nll[0, 0] == pytest.approx(0, abs=1e-6)
    assert scores.kld[0, 0] == pytest.approx(2e4, rel=1e-3)


def test_how_many_rows_are_worked_on_at_once_does_not_matter(monkeypatch):
    base, quant, targets = make_logits(0), make_logits(1), make_targets()
    whole = score(base, [quant], targets, 50)
    monkeypatch.setattr(module, "_CELLS", 120)  # two rows of 50
    sliced = score(base, [quant], targets, 50)
    np.testing.assert_allclose(sliced.kld, whole.kld, rtol=1e-13)
    np.testing.assert_array_equal(sliced.same_top, whole.same_top)


def test_log_probabilities_of_a_base_file_are_taken_as_they_are():
    """No normalisation, nothing at or below the floor, and a divergence may be negative."""
    quant, targets = make_logits(1), make_targets()
    base = np.array([log_softmax(row) for row in make_logits(0, spread=6.0)], np.float32) - 0.01
    assert (base < BASE_FLOOR).any()
    scores = score(base, [quant, base], targets, 77, base_is_log_probs=True)
    for i, (b, q) in enumerate(zip(base.astype(np.float64), quant, strict=True)):
        log_q = log_softmax(q)
        kept = b > BASE_FLOOR
        expected = np.exp(b[kept]) @ (b[kept] - log_q[kept])
        assert scores.kld[0, i] == pytest.approx(expected, rel=1e-11)
        assert scores.nll_base[i] == -b[targets[i]]
        assert scores.same_top[0, i] == (b.argmax() == q.argmax())
        p_base, p = np.exp(b[targets[i]]), np.exp(log_q[targets[i]])
        assert scores.dp[0, i] == pytest.approx(p - p_base, abs=1e-14)
    assert (scores.kld[1] < 0).all()


def test_a_base_alone_can_be_scored():
    base, targets = make_logits(0), make_targets()
    scores = score(base, [], targets, 64)
    assert scores.kld.shape == scores.nll.shape == (0, N_TOK)
    np.testing.assert_allclose(scores.nll_base, twin(base, base, targets)[0], rtol=1e-12)


def test_stretches_of_text_are_joined_and_quants_are_stacked():
    base, targets = make_logits(0), make_targets()
    quants = [make_logits(1), make_logits(2)]
    whole = score(base, quants, targets)
    joined = Scores.join(
        [
            score(base[part], [quant[part] for quant in quants], targets[part])
            for part in (slice(0, 10), slice(10, None))
        ]
    )
    stacked = Scores.stack([score(base, [quant], targets) for quant in quants])
    for name in ("nll_base", "nll", "kld", "same_top", "dp"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
        np.testing.assert_array_equal(getattr(stacked, name), getattr(whole, name))


def test_tokens_masked_in_the_base_count_for_nothing():
    base, quants, targets = make_logits(0), [make_logits(1), make_logits(2)], make_targets()
    masked = np.setdiff1d(np.arange(0, N_VOCAB, 9), targets)
    base[:, masked] = quants[0][:, masked] = -np.inf
    quants[1][:, masked] = -60  # finite, and as good as masked
    kept = np.setdiff1d(np.arange(N_VOCAB), masked)
    seen = score(base, quants, targets, 50)
    without = score(
        base[:, kept], [quant[:, kept] for quant in quants], np.searchsorted(kept, targets), 50
    )
    np.testing.assert_allclose(seen.kld, without.kld, rtol=1e-11)


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (0, np.nan, "the base model"),
        (0, np.inf, "the base model"),
        (2, np.nan, "quantised model 2"),
        (2, np.inf, "quantised model 2"),
        (2, -np.inf, "quantised model 2"),
    ],
)
def test_logits_that_are_not_finite_are_refused_by_model_and_position(where, value, named):
    rows = [make_logits(i) for i in range(3)]
    rows[where][7, 123] = value
    with pytest.raises(NonFiniteError, match=f"{named} .* first at 7"):
        score(rows[0], rows[1:], make_targets(), 50)


@pytest.mark.parametrize("target", [-1, N_VOCAB])
def test_targets_outside_the_vocabulary_are_refused(target):
    targets = make_targets()
    targets[3] = target
    with pytest.raises(UsageError, match="outside the model's vocabulary of 500"):
        score(make_logits(0), [make_logits(1)], targets, 50)


def test_tiles_out_of_order_or_of_other_shapes_are_refused():
    scorer = TileScorer(make_targets(), 1)
    tile = torch.zeros(N_TOK, 10)
    with pytest.raises(ValueError, match="expected 0"):
        scorer.add(10, tile, [tile])
    with pytest.raises(ValueError, match="1 quants of shape"):
        scorer.add(0, tile, [tile[:, :9]])
    with pytest.raises(ValueError, match="1 quants of shape"):
        scorer.add(0, tile, [])
