"""Weights in, blocks out: a new aim where it pays, then rounding with feedback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from quantkit.forward.weights import Weights
from quantkit.propagate.moments import Moments
from quantkit.propagate.retarget import Retarget, Strengths, sampled_rows
from quantkit.propagate.student import StudentWeights
from quantkit.quantize.codec import Blocks, Codec, How
from quantkit.quantize.feedback import Feedback, Metric, encode_with_feedback
from quantkit.types import GgmlType

_AT_ONCE = 32 << 20  # weights of a matrix in memory at a time

# Gram matrices of few tokens are trusted less: below 20 tokens per column damping grows.
_DAMPING = 0.01
_ENOUGH = 20

Sink = Callable[[str, int, Blocks], None]


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded. `retargets` says whether they follow what their inputs become."""

    how: How
    feedback: Feedback
    retargets: bool = True
    n_threads: int = 1


class FeedbackQuantiser:
    """Quantises matrices as their inputs become known and puts them into the student.

    `types` are the tensors to be rounded by their inputs; `sink(name, matrix, blocks)` receives
    what goes into the file.
    """

    def __init__(
        self,
        teacher: Weights,
        student: StudentWeights,
        types: Mapping[str, GgmlType],
        codec_of: Callable[[GgmlType], Codec],
        rounding: Rounding,
        sink: Sink,
    ) -> None:
        self._teacher, self._student, self._types = teacher, student, types
        self._codec_of, self._rounding, self._sink = codec_of, rounding, sink
        self._last: tuple[Moments, int, Metric] | None = None
        self.strengths: dict[tuple[str, int], Strengths] = {}

    def wants(self, name: str) -> bool:
        """See `Quantiser`."""
        return name in self._types

    def take(self, name: str, matrix: int, moments: Moments, at: int) -> None:
        """See `Quantiser`."""
        rows, n = self._teacher.shape(name)[-2:]
        codec, metric = self._codec_of(self._types[name]), self._metric(moments, at)
        aim = self._retarget(name, matrix, moments, at)
        step = max(1, _AT_ONCE // n)
        done = []
        for begin in range(0, rows, step):
            w = self._rows(name, matrix, begin, min(begin + step, rows))
            if aim is not None:
                w = aim(w.to(moments.device), begin).cpu()
            x = np.ascontiguousarray(w.numpy())
            r = self._rounding
            done.append(encode_with_feedback(codec, x, metric, r.how, r.feedback, r.n_threads))
        blocks = np.concatenate(done)
        self._sink(name, matrix, blocks)
        self._student.put(name, matrix, codec.type, blocks)

    def _rows(self, name: str, matrix: int, begin: int, end: int) -> torch.Tensor:
        first = matrix * self._teacher.shape(name)[-2]
        return torch.from_numpy(self._teacher.read(name, first + begin, first + end))

    def _metric(self, moments: Moments, at: int) -> Metric:
        if self._last is None or self._last[0] is not moments or self._last[1] != at:
            sums = moments.all().of(at)
            gram = sums.gram[0].cpu() / max(float(sums.weight[0]), 1e-30)
            n_tok = max(1, sums.n_tokens)
            damping = _DAMPING * max(1.0, _ENOUGH * len(gram) / n_tok)
            self._last = moments, at, Metric(gram, damping)
        return self._last[2]

    def _retarget(self, name: str, matrix: int, moments: Moments, at: int) -> Retarget | None:
        if not self._rounding.retargets:
            return None
        n_rows, n = self._teacher.shape(name)[-2:]
        sampled = sampled_rows(n_rows)
        if n_rows * n <= _AT_ONCE:
            rows = self._rows(name, matrix, 0, n_rows)[sampled]
        else:
            rows = torch.cat([self._rows(name, matrix, k, k + 1) for k in sampled.tolist()])
        aim = Retarget(moments, at, rows.to(moments.device), sampled)
        self.strengths[name, matrix] = aim.strengths
        return aim
