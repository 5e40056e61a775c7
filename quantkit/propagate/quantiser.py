"""Weights in, blocks out: a new aim where it pays, then rounding with feedback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from quantkit.forward.weights import Weights
from quantkit.propagate.moments import Moments
from quantkit.propagate.retarget import Folds, Retarget, Strengths, sampled_rows
from quantkit.propagate.student import StudentWeights
from quantkit.quantize.codec import Blocks, Codec, How
from quantkit.quantize.feedback import Feedback, Metric, encode_with_feedback
from quantkit.types import GgmlType

_AT_ONCE = 32 << 20  # weights of a matrix in memory at a time

# Gram matrices of few tokens are trusted less: below 20 tokens per column damping grows.
_DAMPING = 0.01
_ENOUGH = 20

# Nothing to round here, but such weights can follow their inputs as well.
EXACT = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})

T = TypeVar("T")
Sink = Callable[[str, int, Blocks], None]


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded. `retargets` says whether they follow what their inputs become."""

    how: How
    feedback: Feedback
    retargets: bool = True
    n_threads: int = 1


class _Latest(Generic[T]):
    """What was made of one of some moments' matrices, for as long as no other's is wanted."""

    def __init__(self, make: Callable[[Moments, int], T]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[Moments, tuple[int, T]] = WeakKeyDictionary()

    def of(self, moments: Moments, at: int) -> T:
        """Made of matrix `at` now, if it was not the last."""
        if moments in self._made and self._made[moments][0] == at:
            return self._made[moments][1]
        self._made.pop(moments, None)  # before another takes its space as well
        made = self._make(moments, at)
        self._made[moments] = at, made
        return made


def _metric(moments: Moments, at: int) -> Metric:
    gram, weight, n_tok = moments.gram(at)
    gram /= max(weight, 1e-30)
    if not gram.is_cuda:  # of torch's devices the others may have no f64
        gram = gram.cpu()
    # Within the matrix itself, so that the search for scales trusts few tokens no more.
    extra = _DAMPING * max(0.0, _ENOUGH * len(gram) / max(1, n_tok) - 1)
    gram.diagonal().add_(extra * gram.diagonal().mean())
    return Metric(gram, _DAMPING)


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
        # Of every moments in use, for experts alternate between what they share and their own.
        self._metrics, self._folds = _Latest(_metric), _Latest(Folds)
        self.strengths: dict[tuple[str, int, int], Strengths] = {}

    def wants(self, name: str) -> bool:
        """See `Quantiser`."""
        return name in self._types

    def take(self, name: str, matrix: int, moments: Moments, at: int) -> None:
        """See `Quantiser`."""
        n_parts = self._teacher.shape(name)[-1] // moments.width
        parts = [self._part(name, matrix, moments, at, k) for k in range(n_parts)]
        blocks = parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
        self._sink(name, matrix, blocks)
        self._student.put(name, matrix, self._types[name], blocks)

    def _part(self, name: str, matrix: int, moments: Moments, at: int, part: int) -> Blocks:
        """All rows of a part of the columns."""
        rows, n = self._teacher.shape(name)[-2:]
        columns = slice(part * moments.width, (part + 1) * moments.width)
        step = max(1, _AT_ONCE // n)
        aim = self._retarget(name, matrix, moments, at + part, columns)
        done = []
        for begin in range(0, rows, step):
            w = self._rows(name, matrix, begin, min(begin + step, rows))[:, columns]
            if aim is not None:
                w = aim(w.to(moments.device), begin).cpu()
            done.append(self._encoded(name, w, moments, at + part))
        return np.concatenate(done)

    def _encoded(self, name: str, w: torch.Tensor, moments: Moments, at: int) -> Blocks:
        codec, r = self._codec_of(self._types[name]), self._rounding
        x = np.ascontiguousarray(w.numpy())
        if codec.type in EXACT:
            return codec.encode(x, None, r.how)
        metric = self._metrics.of(moments, at)
        return encode_with_feedback(codec, x, metric, r.how, r.feedback, r.n_threads)

    def forget(self, name: str, matrix: int) -> None:
        """See `Quantiser`."""
        self._student.forget(name, matrix)

    def _rows(self, name: str, matrix: int, begin: int, end: int) -> torch.Tensor:
        first = matrix * self._teacher.shape(name)[-2]
        return torch.from_numpy(self._teacher.read(name, first + begin, first + end))

    def _retarget(
        self, name: str, matrix: int, moments: Moments, at: int, columns: slice
    ) -> Retarget | None:
        if not self._rounding.retargets:
            return None
        n_rows, n = self._teacher.shape(name)[-2:]
        sampled = sampled_rows(n_rows)
        if n_rows * n <= _AT_ONCE:
            rows = self._rows(name, matrix, 0, n_rows)[sampled]
        else:
            rows = torch.cat([self._rows(name, matrix, k, k + 1) for k in sampled.tolist()])
        aim = Retarget(self._folds.of(moments, at), rows[:, columns].to(moments.device), sampled)
        self.strengths[name, matrix, columns.start] = aim.strengths
        return aim
