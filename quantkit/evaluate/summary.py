"""What llama-perplexity prints about a quantised model, from the scores of its tokens.

Windows: a text is cut into chunks of n_ctx tokens, each is evaluated on its own, and only the
predictions of its second half count, so that each has some context.

Keys of a summary, all plain floats unless said otherwise, `None` where undefined; `*_error` is one
standard error, taking tokens as independent (llama-perplexity's rule):

| keys | unit | what |
|---|---|---|
| n_tokens | int | scored tokens |
| ppl, ppl_base (+ _error) | | exp of the mean negative log-likelihood |
| ln_ppl_cor | % | correlation of both log-likelihoods |
| ln_ppl_ratio, ppl_ratio, ppl_diff (+ _error) | | quant against base |
| kld_mean (+ _error), kld_max ... kld_median ... kld_min | nats | KL(base, quant) |
| kld_mean_ci | nats | [low, high], 95 %, whole windows resampled: tokens of one are correlated |
| mean_dp, rms_dp (+ _error), dp_max ... dp_median ... dp_min | % | p_quant - p_base of the token |
| same_top_p (+ _error) | % | tokens where both models' most likely token is the same |

Percentiles: p99_9 is the value at position 0.999 (n - 1) of the sorted ones, interpolated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.evaluate.scores import Scores

F64 = NDArray[np.float64]
Summary = dict[str, Any]

N_RESAMPLES = 2000
_SEED = 20260101
_DRAWS = 1 << 20  # indices held at once
_TAILS = (99.9, 99.0, 95.0, 90.0, 10.0, 5.0, 1.0, 0.1)
_PERCENTILES = {
    "kld": (*_TAILS, 50.0),
    "dp": (*_TAILS, 75.0, 50.0, 25.0),
}


def scored_positions(n_ctx: int) -> range:
    """Positions of a chunk whose logits are scored; position i predicts token i + 1."""
    if n_ctx < 3:
        raise UsageError(f"chunks of {n_ctx} tokens leave nothing to score", hint="at least 3")
    return range(n_ctx // 2, n_ctx - 1)


def targets_of(chunks: NDArray[np.int32]) -> NDArray[np.int64]:
    """Scored tokens of `chunks` [n_chunks, n_ctx] in order, i64 [n_chunks * n_scored]."""
    positions = scored_positions(chunks.shape[1])
    return chunks[:, positions.start + 1 : positions.stop + 1].astype(np.int64).ravel()


def with_bos(chunks: NDArray[np.int32], bos: int | None) -> NDArray[np.int32]:
    """What the model sees: `bos`, where there is one, takes the place of each first token."""
    seen = chunks.copy()
    if bos is not None:
        seen[:, 0] = bos
    return seen


def perplexity(nll: F64) -> tuple[float | None, float | None]:
    """Perplexity and its standard error from negative log-likelihoods [n] in nats."""
    mean, error = _mean_and_error(nll)
    return _exp(mean), _scaled(_exp(mean), error)


def summarise(scores: Scores, quant: int = 0, *, window: int) -> Summary:
    """All figures of quant number `quant`; `window` is the number of scored tokens per chunk."""
    nll_base, nll = scores.nll_base, scores.nll[quant]
    kld, dp = scores.kld[quant], 100 * scores.dp[quant]
    n = len(kld)
    if not n:
        raise UsageError("no token was scored")
    summary: Summary = {"n_tokens": n}
    summary |= _perplexities(nll_base, nll)
    summary |= _valued("kld_mean", *_mean_and_error(kld))
    low_high = mean_ci(kld, window)
    summary["kld_mean_ci"] = None if low_high is None else list(low_high)
    summary |= _percentiles("kld", kld)
    summary |= _valued("mean_dp", *_mean_and_error(dp))
    mean_square, error_square = _mean_and_error(dp**2)
    rms = float(np.sqrt(mean_square))
    summary |= _valued("rms_dp", rms, 0.5 / rms * error_square if rms else 0.0)
    summary |= _percentiles("dp", dp)
    p = float(scores.same_top[quant].mean())
    summary |= _valued("same_top_p", 100 * p, 100 * float(np.sqrt(p * (1 - p) / max(1, n - 1))))
    return summary


def mean_ci(values: F64, window: int) -> tuple[float, float] | None:
    """95 % interval of the mean of `values` [n], by resampling whole windows of `window` values.

    A last window that is not full is left out. The seed is fixed. None with fewer than two windows.
    """
    means = _window_means(values, window)
    if len(means) < 2:
        return None
    low, high = np.quantile(_resampled_means(means), [0.025, 0.975])
    return float(low), float(high)


def compare(kld_a: F64, kld_b: F64, window: int) -> dict[str, Any]:
    """Whether quant A is closer to the base than B: paired, on the same tokens in the same order.

    `kld_mean_diff` is mean KL of A minus that of B in nats, with a standard error over tokens and
    a 95 % interval over windows (`_ci`, None below two windows); `kld_ratio` is A / B;
    `windows_a_better` is the share of windows, 0 to 1, where A has the smaller mean.
    """
    if kld_a.shape != kld_b.shape:
        raise UsageError(f"runs over {len(kld_a)} and {len(kld_b)} tokens cannot be paired")
    mean, error = _mean_and_error(kld_a - kld_b)
    interval = mean_ci(kld_a - kld_b, window)
    mean_b = float(kld_b.mean())
    difference = _window_means(kld_a - kld_b, window)
    return {
        "kld_mean_diff": mean,
        "kld_mean_diff_error": error,
        "kld_mean_diff_ci": None if interval is None else list(interval),
        "kld_ratio": float(kld_a.mean()) / mean_b if mean_b else None,
        "windows_a_better": float((difference < 0).mean()) if len(difference) else None,
    }


def as_text(summary: Summary) -> str:
    """The figures under the names and in the order of llama-perplexity's final block."""

    def row(label: str, key: str, digits: int, unit: str = "") -> str:
        value, error = summary[key], summary.get(f"{key}_error")
        text = f"{label:<30}: " + (f"{value:11.{digits}f}" if value is not None else f"{'-':>11}")
        return text + (f" ± {error:.{digits}f}" if error is not None else "") + unit

    def rows(name: str, key: str, digits: int, unit: str = "") -> list[str]:
        labels = {"max": "Maximum"}
        for percent in sorted(_PERCENTILES[key], reverse=True):
            labels[_suffix(percent)] = "Median" if percent == 50 else f"{percent:.1f}%"
        labels["min"] = "Minimum"
        return [row(f"{label} {name}", f"{key}_{k}", digits, unit) for k, label in labels.items()]

    low_high = summary["kld_mean_ci"]
    interval = "-" if low_high is None else "{:.6f} to {:.6f}".format(*low_high)
    return "\n".join(
        [
            f"{summary['n_tokens']} tokens scored",
            "",
            row("Mean PPL(Q)", "ppl", 6),
            row("Mean PPL(base)", "ppl_base", 6),
            row("Cor(ln(PPL(Q)), ln(PPL(base)))", "ln_ppl_cor", 2, " %"),
            row("Mean ln(PPL(Q)/PPL(base))", "ln_ppl_ratio", 6),
            row("Mean PPL(Q)/PPL(base)", "ppl_ratio", 6),
            row("Mean PPL(Q)-PPL(base)", "ppl_diff", 6),
            "",
            row("Mean KLD", "kld_mean", 6),
            f"{'  95 %, over windows':<30}: {interval:>11}",
            *rows("KLD", "kld", 6),
            "",
            row("Mean Δp", "mean_dp", 3, " %"),
            *rows("Δp", "dp", 3, " %"),
            row("RMS Δp", "rms_dp", 3, " %"),
            row("Same top p", "same_top_p", 3, " %"),
        ]
    )


def _perplexities(nll_base: F64, nll: F64) -> Summary:
    mean_b, error_b = _mean_and_error(nll_base)
    mean_q, error_q = _mean_and_error(nll)
    n = len(nll)
    cov = float(((nll - mean_q) * (nll_base - mean_b)).mean()) / (n - 1) if n >= 10 else 0.0
    ln_ratio = mean_q - mean_b
    ln_error = float(np.sqrt(max(0.0, error_q**2 + error_b**2 - 2 * cov)))
    ppl, ppl_base, ratio = _exp(mean_q), _exp(mean_b), _exp(ln_ratio)
    diff = diff_error = None
    if ppl is not None and ppl_base is not None:
        diff = ppl - ppl_base
        variance = (ppl * error_q) ** 2 + (ppl_base * error_b) ** 2 - 2 * ppl * ppl_base * cov
        diff_error = float(np.sqrt(max(0.0, variance)))
    return {
        **_valued("ppl", ppl, _scaled(ppl, error_q)),
        **_valued("ppl_base", ppl_base, _scaled(ppl_base, error_b)),
        "ln_ppl_cor": 100 * cov / (error_q * error_b) if error_q and error_b else None,
        **_valued("ln_ppl_ratio", ln_ratio, ln_error),
        **_valued("ppl_ratio", ratio, _scaled(ratio, ln_error)),
        **_valued("ppl_diff", diff, diff_error),
    }


def _mean_and_error(values: F64) -> tuple[float, float]:
    """Mean and its standard error as llama-perplexity has it: 0 for 10 values or fewer."""
    n = len(values)
    error = float(np.sqrt(values.var() / (n - 1))) if n > 10 else 0.0
    return float(values.mean()), error


def _percentiles(name: str, values: F64) -> Summary:
    levels = _PERCENTILES[name]
    found = np.percentile(values, levels)
    summary = {f"{name}_{_suffix(p)}": float(v) for p, v in zip(levels, found, strict=True)}
    return summary | {f"{name}_max": float(values.max()), f"{name}_min": float(values.min())}


def _suffix(percent: float) -> str:
    return "median" if percent == 50 else "p" + f"{percent:g}".replace(".", "_")


def _valued(key: str, value: float | None, error: float | None) -> Summary:
    return {key: value, f"{key}_error": error}


def _exp(x: float) -> float | None:
    return float(np.exp(x)) if x < 700 else None  # beyond what a float holds


def _scaled(value: float | None, error: float) -> float | None:
    return None if value is None else value * error


def _window_means(values: F64, window: int) -> F64:
    n_windows = len(values) // window
    means: F64 = values[: n_windows * window].reshape(n_windows, window).mean(axis=1)
    return means


def _resampled_means(means: F64) -> F64:
    rng = np.random.default_rng(_SEED)
    n = len(means)
    at_once = max(1, _DRAWS // n)
    return np.concatenate(
        [
            means[rng.integers(0, n, (min(at_once, N_RESAMPLES - k), n))].mean(axis=1)
            for k in range(0, N_RESAMPLES, at_once)
        ]
    )
