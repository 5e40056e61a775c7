"""Per-token scores of quantised models against their base, from logits in vocabulary tiles.

Logits of all tokens times all of a large vocabulary are never held: every quantity is a sum that
can be rescaled when a larger maximum turns up in a later tile. All sums are f64, because a KL
divergence is the small difference of large sums: with logits of size 30 its rounding error stays
below 1e-13 nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.errors import NonFiniteError, UsageError

# Below this log-probability llama-perplexity leaves a base token out of the KL divergence: its
# files hold nothing smaller than 16 nats below the maximum.
BASE_FLOOR = -16.0
_ROUNDING = 1e-12  # nats; a KL divergence this little below zero is zero
_CELLS = 1 << 23  # logits worked on at once: 64 MiB per f64 temporary


@dataclass(frozen=True)
class Scores:
    """What one base and `n_quants` quantised models make of the same `n_tok` next tokens.

    `nll_base` f64 [n_tok] and `nll` f64 [n_quants, n_tok] are negative log-likelihoods in nats;
    `kld` f64 [n_quants, n_tok] is KL(base || quant) in nats; `same_top` bool [n_quants, n_tok]
    tells whether both have the same most likely token (the first of equals); `dp` f64
    [n_quants, n_tok] is p_quant(target) - p_base(target), from -1 to 1.
    """

    nll_base: NDArray[np.float64]
    nll: NDArray[np.float64]
    kld: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    dp: NDArray[np.float64]

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """Scores of consecutive stretches of text, of the same models."""
        return Scores(
            np.concatenate([part.nll_base for part in parts]),
            *(
                np.concatenate([getattr(part, name) for part in parts], axis=1)
                for name in ("nll", "kld", "same_top", "dp")
            ),
        )

    @staticmethod
    def stack(parts: Sequence[Scores]) -> Scores:
        """Scores of different quants of one base, on the same text."""
        return Scores(
            parts[0].nll_base,
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("nll", "kld", "same_top", "dp")
            ),
        )


class TileScorer:
    """Scores `n_tok` positions of `n_quants` models, one vocabulary tile after another.

    `targets` i64 [n_tok] are the tokens that come next. With `base_is_log_probs` the base tiles
    are rows of a `BaseFile`: taken as they are, not normalised, and without what lies below
    `BASE_FLOOR`, as llama-perplexity takes them. `device` is where the arithmetic happens; it has
    to know f64.
    """

    def __init__(
        self,
        targets: Tensor | NDArray[Any],
        n_quants: int,
        device: str | torch.device = "cpu",
        *,
        base_is_log_probs: bool = False,
    ) -> None:
        self._targets = torch.as_tensor(targets, device=device).to(torch.int64)
        n_tok = len(self._targets)
        self._device = device
        self._fixed_base = base_is_log_probs
        self._n_columns = 0
        self._base = _Softmax(n_tok, self._device)
        self._quants = [_Softmax(n_tok, self._device) for _ in range(n_quants)]
        # Sum of p_base * (base - quant), in units of exp(base maximum).
        self._cross = torch.zeros(n_quants, n_tok, dtype=torch.float64, device=device)

    def add(self, first: int, base: Tensor, quants: Sequence[Tensor]) -> None:
        """Take columns `first`, `first` + 1, ... of the logits; tiles come in order.

        `base` and each of `quants` are [n_tok, v], of any float type.
        """
        shape = (len(self._targets), base.shape[1])
        if first != self._n_columns:
            raise ValueError(f"tile at column {first}, expected {self._n_columns}")
        if len(quants) != len(self._quants) or any(t.shape != shape for t in (base, *quants)):
            raise ValueError(f"expected a base and {len(self._quants)} quants of shape {shape}")
        self._n_columns += shape[1]
        for rows in _slices(shape[0], shape[1]):
            self._add_rows(rows, first, base[rows], [quant[rows] for quant in quants])

    def _add_rows(self, rows: slice, first: int, base: Tensor, quants: list[Tensor]) -> None:
        b = base.to(self._device, torch.float64)
        targets = self._targets[rows] - first
        if self._fixed_base:
            weight, decay = self._base.add_log_probs(rows, first, b, targets)
        else:
            weight, decay = self._base.add(rows, first, b, targets)
        for k, (state, quant) in enumerate(zip(self._quants, quants, strict=True)):
            q = quant.to(self._device, torch.float64)
            state.add(rows, first, q, targets)
            cross = self._cross[k, rows]
            cross *= decay
            cross += torch.where(weight > 0, weight * (b - q), 0).sum(1)

    def finish(self) -> Scores:
        """The scores, once all columns have been added.

        Raises `UsageError` for a target outside the vocabulary, and `NonFiniteError` where a score
        is NaN or infinite. A logit of -inf (a masked token) is none of it where the base has it.
        """
        targets = self._targets
        if bool(((targets < 0) | (targets >= self._n_columns)).any()):
            raise UsageError(
                f"the text has tokens outside the model's vocabulary of {self._n_columns}",
                hint="tokenise the text with this model's own tokenizer",
            )
        base = self._base
        one = torch.ones_like(base.total)
        if self._fixed_base:  # sums are in probabilities, which need not add up to one
            unit, mass, log_base = one, base.total, torch.zeros_like(one)
        else:
            unit, mass, log_base = base.total, one, base.log_total()
        nll_base = log_base - base.target
        _require_finite(nll_base, "the base model")
        nll, kld, dp = (torch.empty_like(self._cross) for _ in range(3))
        same_top = torch.empty_like(self._cross, dtype=torch.bool)
        for k, quant in enumerate(self._quants):
            nll[k] = quant.log_total() - quant.target
            kld[k] = self._cross[k] / unit + mass * quant.log_total() - log_base
            _require_finite(nll[k] + kld[k], f"quantised model {k + 1}")
            same_top[k] = quant.top == base.top
            dp[k] = torch.exp(-nll[k]) - torch.exp(-nll_base)
        if not self._fixed_base:
            kld[(kld < 0) & (kld > -_ROUNDING)] = 0
        return Scores(*(t.cpu().numpy() for t in (nll_base, nll, kld, same_top, dp)))


class _Softmax:
    """Running maximum (and its first column), sum of exponentials and target logit per row."""

    def __init__(self, n_tok: int, device: str | torch.device) -> None:
        self.max = torch.full((n_tok,), -torch.inf, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.max)  # in units of exp(max)
        self.target = torch.full_like(self.max, torch.nan)
        self.top = torch.zeros(n_tok, dtype=torch.int64, device=device)

    def add(self, rows: slice, first: int, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take a tile [n, v]; exp(x - max) [n, v], and the factor [n] on sums made before."""
        previous = self.max[rows].clone()
        self._find(rows, first, x, targets)
        decay = torch.exp(previous - self.max[rows])
        weight = torch.exp(x - self.max[rows, None])
        total = self.total[rows]
        total *= decay
        total += weight.sum(1)
        return weight, decay

    def add_log_probs(
        self, rows: slice, first: int, x: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take a tile of log-probabilities; their exp where above the floor, and ones."""
        self._find(rows, first, x, targets)
        weight = torch.where(x > BASE_FLOOR, torch.exp(x), 0)
        self.total[rows] += weight.sum(1)
        return weight, torch.ones_like(self.total[rows])

    def _find(self, rows: slice, first: int, x: Tensor, targets: Tensor) -> None:
        top = x.max(dim=1)  # the first of equal maxima
        larger = top.values > self.max[rows]
        self.top[rows] = torch.where(larger, top.indices + first, self.top[rows])
        self.max[rows] = torch.maximum(self.max[rows], top.values)
        inside = (targets >= 0) & (targets < x.shape[1])
        values = x.gather(1, targets.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
        self.target[rows] = torch.where(inside, values, self.target[rows])

    def log_total(self) -> Tensor:
        """log of the sum of exponentials, nats."""
        return self.max + torch.log(self.total)


def _slices(n_rows: int, n_columns: int) -> Iterator[slice]:
    step = max(1, _CELLS // max(1, n_columns))
    for begin in range(0, n_rows, step):
        yield slice(begin, min(begin + step, n_rows))


def _require_finite(values: Tensor, whose: str) -> None:
    bad = torch.nonzero(~torch.isfinite(values))
    if len(bad):
        raise NonFiniteError(
            f"logits of {whose} give NaN or infinity at {len(bad)} of {len(values)} scored"
            f" positions, first at {int(bad[0, 0])}"
        )
