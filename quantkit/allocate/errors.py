"""How far a tensor's outputs are off in a type: t^2 = tr(D H D') / tr(W H W'), on sampled rows.

D is the rounding error of rows W, H the Gram matrix of their inputs. Weights are rounded by one
part of the inputs and judged by another, for feedback fits the inputs that it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quantkit.forward.weights import Tile, Weights
from quantkit.quantize.codec import Codec, How
from quantkit.quantize.feedback import Feedback, Metric, encode_with_feedback
from quantkit.quantize.gain import encode_rows
from quantkit.quantize.layout import supports
from quantkit.types import GgmlType

_BLOCK = 32  # neighbouring tokens go to the same part
_HELD = 4  # every fourth block judges
_MIN_ROWS, _MAX_ROWS, _SHARE = 64, 256, 0.03
_MAX_MATRICES = 16  # experts or heads that rows are taken from
# Gram matrices of few tokens are trusted less: below 20 tokens per column damping grows.
_DAMPING = 0.01
_ENOUGH = 20


class Inputs:
    """Second moments of one weight's inputs, of all its experts or heads together."""

    def __init__(self, n_cols: int) -> None:
        self._grams = [torch.zeros(n_cols, n_cols) for _ in range(2)]
        self._n_tokens = [0, 0]

    def add(self, x: torch.Tensor) -> None:
        """Inputs f32[n_tok, n_cols]."""
        held = (torch.arange(len(x)) // _BLOCK) % _HELD == _HELD - 1
        for part, chosen in enumerate((~held, held)):
            seen = x[chosen.to(x.device)]
            self._grams[part] += (seen.T @ seen).cpu()
            self._n_tokens[part] += len(seen)

    def metric(self) -> Metric:
        """What weights are rounded by."""
        n = max(1, self._n_tokens[0])
        gram = self._grams[0] / n
        return Metric(gram, _DAMPING * max(1.0, _ENOUGH * len(gram) / n))

    def importance(self) -> npt.NDArray[np.float32]:
        """Mean squares of the columns."""
        n = max(1, self._n_tokens[0])
        return np.ascontiguousarray((self._grams[0].diagonal() / n).numpy())

    def judge(self) -> torch.Tensor:
        """The Gram matrix of what was held back, or of all if that is next to nothing."""
        enough = self._n_tokens[1] > _BLOCK
        return self._grams[1] if enough else self._grams[0] + self._grams[1]


class Watch:
    """An observer of the inputs of some tensors."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._inputs: dict[str, Inputs] = {}

    def see(self, names: tuple[str, ...], x: torch.Tensor, row: int = 0, n_rows: int = 1) -> None:
        """See `Observer`. Tensors with the same inputs share what is learnt of them."""
        n_cols = self._weights.shape(names[0])[-1]
        if names[0] not in self._inputs:
            shared = Inputs(n_cols)
            self._inputs.update(dict.fromkeys(names, shared))
        self._inputs[names[0]].add(x.reshape(-1, n_cols))

    def wants_prior(self, name: str, n_tok: int) -> bool:
        """See `Observer`."""
        return False

    def see_prior(self, name: str, x: torch.Tensor, row: int, n_rows: int) -> None:
        """See `Observer`."""

    def of(self, name: str) -> Inputs | None:
        """What a tensor's inputs were; None if none were seen."""
        return self._inputs.get(name)

    def clear(self) -> None:
        """Forget all."""
        self._inputs.clear()


@dataclass(frozen=True)
class Rounder:
    """How weights will be rounded; `feedback` None is to the nearest."""

    how: How
    codec_of: Callable[[GgmlType], Codec]
    feedback: Feedback | None
    n_threads: int = 1

    def nearest(self, x: Tile, type_: GgmlType, importance: Tile | None) -> Tile:
        """What rows decode to, rounded by the importance f32[n_cols] of their columns."""
        codec = self.codec_of(type_)
        return codec.decode(encode_rows(codec, np.ascontiguousarray(x), importance, self.how))

    def final(self, x: Tile, type_: GgmlType, metric: Metric | None) -> Tile:
        """What rows decode to as they will be rounded."""
        if metric is None or self.feedback is None or not supports(type_):
            return self.nearest(x, type_, None if metric is None else metric.importance)
        codec = self.codec_of(type_)
        n = self.n_threads
        return codec.decode(encode_with_feedback(codec, x, metric, self.how, self.feedback, n))


def sample_rows(weights: Weights, name: str) -> Tile:
    """A few per cent of a tensor's rows, evenly from its experts or heads."""
    shape = weights.shape(name)
    n_matrices = shape[0] if len(shape) == 3 else 1
    n_rows = shape[-2]
    wanted = int(min(_MAX_ROWS, max(_MIN_ROWS, _SHARE * n_rows * n_matrices)))
    chosen = _evenly(n_matrices, min(n_matrices, _MAX_MATRICES))
    rows = _evenly(n_rows, min(n_rows, -(-wanted // len(chosen))))
    parts = []
    for number, matrix in enumerate(chosen):
        shift = number * n_rows // (len(chosen) * len(rows))  # other rows in each
        for row in rows:
            at = matrix * n_rows + (row + shift) % n_rows
            parts.append(weights.read(name, at, at + 1))
    return np.concatenate(parts)


def relative_error(rows: Tile, rounded: Tile, gram: torch.Tensor | None) -> float:
    """t^2 of rows under a Gram matrix; without one, all columns count alike."""
    w = torch.from_numpy(rows)
    d = torch.from_numpy(rounded) - w
    if gram is None:
        error, norm = d.square().sum(), w.square().sum()
    else:
        error, norm = ((d @ gram) * d).sum(), ((w @ gram) * w).sum()
    return float(error.clamp_min(0) / norm.clamp_min(1e-30))


def error_row(
    rows: Tile, inputs: Inputs | None, types: Sequence[GgmlType], rounder: Rounder
) -> dict[str, float]:
    """t^2 of sampled rows in every type, by its name."""
    metric = inputs.metric() if inputs else None
    judge = inputs.judge() if inputs else None
    return {
        type_.name: relative_error(rows, rounder.final(rows, type_, metric), judge)
        for type_ in types
    }


def _evenly(n: int, n_chosen: int) -> list[int]:
    return [int((k + 0.5) * n / n_chosen) for k in range(n_chosen)]
