"""Distances between two sets of logits over the same positions, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: Any) -> NDArray[np.float64]:
    """Log probabilities over the last axis, f64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    log_p: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_p


def same_top1(a: Any, b: Any) -> float:
    """Share of positions, 0 to 1, where both logits [..., n_vocab] have the same first maximum."""
    return float(np.mean(np.argmax(a, axis=-1) == np.argmax(b, axis=-1)))


def mean_kl(p_logits: Any, q_logits: Any) -> float:
    """Mean over positions of KL(p || q) in nats; both are logits [..., n_vocab]."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return float(np.mean((np.exp(p) * (p - q)).sum(axis=-1)))


def perplexity(logits: Any, token_ids: Any, first: int = 0) -> float:
    """exp of the mean negative log-likelihood of the next token.

    `logits` [n_seq, n_tok, n_vocab], `token_ids` [n_seq, n_tok]; positions `first`..n_tok-2 predict
    their successors. llama.cpp's convention is chunks of n_ctx tokens and first = n_ctx / 2.
    """
    log_p = log_softmax(np.asarray(logits)[..., first:-1, :])
    targets = np.asarray(token_ids)[..., first + 1 :, None]
    return float(np.exp(-np.take_along_axis(log_p, targets, axis=-1).mean()))
