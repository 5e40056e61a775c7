"""Summaries are llama-perplexity's figures; windows are its windows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from quantkit.errors import UsageError
from quantkit.evaluate.scores import Scores
from quantkit.evaluate.summary import (
    as_text,
    compare,
    mean_ci,
    perplexity,
    scored_positions,
    summarise,
    targets_of,
    with_bos,
)

WINDOW = 50


def make_scores(n_tok: int = 1001, seed: int = 0, n_quants: int = 1) -> Scores:
    """Heavy-tailed, as real scores are; the quants' likelihoods follow the base's."""
    rng = np.random.default_rng(seed)
    nll_base = rng.gamma(1.2, 2.0, n_tok)
    nll = np.abs(nll_base + 0.1 * rng.standard_normal((n_quants, n_tok)))
    return Scores(
        nll_base=nll_base,
        nll=nll,
        kld=rng.lognormal(-4, 2, (n_quants, n_tok)),
        same_top=rng.random((n_quants, n_tok)) < 0.9,
        dp=np.exp(-nll) - np.exp(-nll_base),
    )


def make_constant(nll: float, n_tok: int = 20) -> Scores:
    zeros = np.zeros((1, n_tok))
    return Scores(zeros[0] + nll, zeros + nll, zeros, zeros == 0, zeros)


def twin(scores: Scores) -> dict[str, float]:
    """The rules of the tool, term by term, from plain running sums."""
    nll, base = scores.nll[0].tolist(), scores.nll_base.tolist()
    kld, dp = scores.kld[0].tolist(), scores.dp[0].tolist()
    n = len(kld)

    def mean_error(values):
        mean = sum(values) / n
        left = sum(v * v for v in values) / n - mean * mean
        return mean, math.sqrt(left / (n - 1)) if left > 0 and n > 10 else 0.0

    def percentile(values, fraction):
        place = fraction * (n - 1)
        low = int(place)
        values = sorted(values)
        return (low + 1 - place) * values[low] + (place - low) * values[min(low + 1, n - 1)]

    def median(values):
        values = sorted(values)
        return values[n // 2] if n % 2 else (values[n // 2] + values[n // 2 - 1]) / 2

    (m_q, u_q), (m_b, u_b) = mean_error(nll), mean_error(base)
    cov = sum(a * b for a, b in zip(nll, base, strict=True)) / n - m_q * m_b
    cov = cov / (n - 1) if n >= 10 else 0.0
    ppl, ppl_base, ratio = math.exp(m_q), math.exp(m_b), math.exp(m_q - m_b)
    u_ratio = math.sqrt(u_q**2 + u_b**2 - 2 * cov)
    square, u_square = mean_error([d * d for d in dp])
    p = sum(scores.same_top[0].tolist()) / n
    expected = {
        "n_tokens": n,
        "ppl": ppl,
        "ppl_error": ppl * u_q,
        "ppl_base": ppl_base,
        "ppl_base_error": ppl_base * u_b,
        "ln_ppl_cor": 100 * cov / (u_q * u_b),
        "ln_ppl_ratio": m_q - m_b,
        "ln_ppl_ratio_error": u_ratio,
        "ppl_ratio": ratio,
        "ppl_ratio_error": ratio * u_ratio,
        "ppl_diff": ppl - ppl_base,
        "ppl_diff_error": math.sqrt(
            (ppl * u_q) ** 2 + (ppl_base * u_b) ** 2 - 2 * ppl * ppl_base * cov
        ),
        "kld_mean": mean_error(kld)[0],
        "kld_mean_error": mean_error(kld)[1],
        "kld_median": median(kld),
        "kld_max": max(kld),
        "kld_min": min(kld),
        "mean_dp": 100 * mean_error(dp)[0],
        "mean_dp_error": 100 * mean_error(dp)[1],
        "rms_dp": 100 * math.sqrt(square),
        "rms_dp_error": 100 * 0.5 / math.sqrt(square) * u_square,
        "dp_median": 100 * median(dp),
        "dp_max": 100 * max(dp),
        "dp_min": 100 * min(dp),
        "same_top_p": 100 * p,
        "same_top_p_error": 100 * math.sqrt(p * (1 - p) / (n - 1)),
    }
    tails = {"p99_9": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9}
    tails |= {"p10": 0.1, "p5": 0.05, "p1": 0.01, "p0_1": 0.001}
    for name, fraction in tails.items():
        expected[f"kld_{name}"] = percentile(kld, fraction)
        expected[f"dp_{name}"] = 100 * percentile(dp, fraction)
    expected["dp_p75"] = 100 * percentile(dp, 0.75)
    expected["dp_p25"] = 100 * percentile(dp, 0.25)
    return expected


@pytest.mark.parametrize("n_tok", [11, 255, 1000, 1001])
def test_every_figure_follows_the_tools_rule(n_tok):
    scores = make_scores(n_tok)
    summary = summarise(scores, window=WINDOW)
    assert summary.pop("kld_mean_ci") is None or n_tok >= 2 * WINDOW
    assert summary == pytest.approx(twin(scores), rel=1e-9)


def test_quants_are_summarised_by_number():
    scores = make_scores(n_quants=3)
    means = [summarise(scores, k, window=WINDOW)["kld_mean"] for k in range(3)]
    np.testing.assert_allclose(means, scores.kld.mean(axis=1))


def test_ten_tokens_or_fewer_have_no_error_and_no_correlation():
    summary = summarise(make_scores(10), window=5)
    assert summary["ppl_error"] == summary["kld_mean_error"] == summary["rms_dp_error"] == 0
    assert summary["ln_ppl_cor"] is None


def test_a_model_against_itself_is_at_no_distance():
    nll = np.random.default_rng(0).gamma(1.2, 2.0, 300)
    zeros = np.zeros((1, 300))
    summary = summarise(Scores(nll, nll[None], zeros, zeros == 0, zeros), window=WINDOW)
    assert summary["ppl_ratio"] == 1
    assert summary["ln_ppl_ratio_error"] == pytest.approx(0, abs=1e-8)
    assert summary["ln_ppl_cor"] == pytest.approx(100)
    assert summary["kld_mean"] == summary["kld_max"] == summary["rms_dp"] == 0
    assert summary["rms_dp_error"] == 0
    assert summary["same_top_p"] == 100
    assert summary["same_top_p_error"] == 0


@pytest.mark.parametrize(
    "scores",
    [
        make_scores(1),
        make_constant(800.0),
        make_constant(0.0),
    ],
    ids=["one token", "perplexity beyond floats", "nothing varies"],
)
def test_undefined_figures_are_none_and_never_nan_or_infinite(scores):
    summary = summarise(scores, window=WINDOW)
    json.dumps(summary, allow_nan=False)
    assert summary["ln_ppl_cor"] is None
    assert "Mean KLD" in as_text(summary)


def test_no_tokens_are_refused():
    with pytest.raises(UsageError, match="no token was scored"):
        summarise(make_scores(0), window=WINDOW)


def test_the_perplexity_of_one_model_alone_has_its_error():
    nll = make_scores().nll_base
    summary = summarise(make_scores(), window=WINDOW)
    assert perplexity(nll) == (summary["ppl_base"], summary["ppl_base_error"])


def test_the_table_prints_every_figure_with_its_error():
    summary = summarise(make_scores(), window=WINDOW)
    lines = as_text(summary).splitlines()
    values = {line.split(":")[0].strip(): line.split(":")[1] for line in lines if ":" in line}
    assert len(values) == 6 + 13 + 16  # perplexities, divergences, probabilities
    assert float(values["Mean PPL(Q)"].split("±")[0]) == pytest.approx(summary["ppl"], abs=1e-6)
    assert float(values["Mean KLD"].split("±")[1]) == pytest.approx(
        summary["kld_mean_error"], abs=1e-6
    )
    assert values["99.9% KLD"].strip() == f"{summary['kld_p99_9']:.6f}"
    assert values["Median Δp"].strip() == f"{summary['dp_median']:.3f} %"
    assert values["Same top p"].endswith(f"± {summary['same_top_p_error']:.3f} %")
    printed = as_text(summary)
    for key, value in summary.items():
        if isinstance(value, float):
            digits = 2 if key == "ln_ppl_cor" else 3 if "dp" in key or "same" in key else 6
            assert f"{value:.{digits}f}" in printed, key


def test_the_interval_is_the_same_every_time_and_holds_the_mean():
    kld = make_scores().kld[0]
    low, high = mean_ci(kld, WINDOW)
    assert mean_ci(kld, WINDOW) == (low, high)
    assert low < kld.mean() < high


def test_the_interval_covers_the_true_mean_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        windows = rng.standard_normal((60, 1)) + 0.1 * rng.standard_normal((60, 20))
        low, high = mean_ci(windows.ravel(), 20)
        hits += low < 0 < high
    assert 0.90 <= hits / 200 <= 0.99


def test_tokens_that_move_together_widen_the_interval_of_windows():
    rng = np.random.default_rng(2)
    alone = rng.standard_normal(40 * WINDOW)
    together = np.repeat(rng.standard_normal(40), WINDOW)
    width = {name: np.ptp(mean_ci(v, WINDOW)) for name, v in {"a": alone, "t": together}.items()}
    assert width["t"] > 4 * width["a"]
    assert width["a"] == pytest.approx(2 * 1.96 / math.sqrt(len(alone)), rel=0.35)


@pytest.mark.parametrize("n_tok", [0, 1, WINDOW, 2 * WINDOW - 1])
def test_fewer_than_two_windows_have_no_interval(n_tok):
    assert mean_ci(np.ones(n_tok), WINDOW) is None


def test_a_paired_comparison_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(3)
    a = rng.lognormal(-4, 1.5, 60 * WINDOW)
    b = a * 1.03
    verdict = compare(a, b, WINDOW)
    low, high = verdict["kld_mean_diff_ci"]
    assert low < high < 0
    assert mean_ci(a, WINDOW)[1] > mean_ci(b, WINDOW)[0]
    assert verdict["kld_mean_diff"] == pytest.approx(a.mean() - b.mean())
    assert verdict["kld_mean_diff_error"] > 0
    assert verdict["kld_ratio"] == pytest.approx(1 / 1.03)
    assert verdict["windows_a_better"] == 1
    swapped = compare(b, a, WINDOW)
    assert swapped["kld_mean_diff_ci"] == pytest.approx([-high, -low])
    assert swapped["windows_a_better"] == 0


def test_equal_quants_compare_as_equal_and_unequal_texts_not_at_all():
    kld = make_scores().kld[0]
    verdict = compare(kld, kld, WINDOW)
    assert verdict["kld_mean_diff"] == 0
    assert verdict["kld_mean_diff_ci"] == [0, 0]
    assert compare(np.zeros(20), np.zeros(20), 30)["kld_ratio"] is None
    with pytest.raises(UsageError, match="1001 and 1000 tokens"):
        compare(kld, kld[1:], WINDOW)


@pytest.mark.parametrize(
    ("n_ctx", "positions"), [(512, range(256, 511)), (7, range(3, 6)), (3, range(1, 2))]
)
def test_the_second_half_of_a_chunk_is_scored(n_ctx, positions):
    assert scored_positions(n_ctx) == positions


@pytest.mark.parametrize("n_ctx", [0, 1, 2])
def test_chunks_without_scored_positions_are_refused(n_ctx):
    with pytest.raises(UsageError, match="nothing to score"):
        scored_positions(n_ctx)


def test_targets_are_the_tokens_after_the_scored_positions():
    chunks = np.arange(14, dtype=np.int32).reshape(2, 7)
    assert targets_of(chunks).tolist() == [4, 5, 6, 11, 12, 13]


def test_bos_takes_the_place_of_each_first_token_in_a_copy():
    chunks = np.arange(14, dtype=np.int32).reshape(2, 7)
    assert with_bos(chunks, 99)[:, 0].tolist() == [99, 99]
    assert with_bos(chunks, 99)[:, 1:].tolist() == chunks[:, 1:].tolist()
    assert with_bos(chunks, None).tolist() == chunks.tolist()
    assert chunks[1, 0] == 7
