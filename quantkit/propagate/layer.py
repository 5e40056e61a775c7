"""One layer passed by teacher and student side by side, its weights quantised on the way.

A weight is quantised as soon as its inputs are known in both runs, and before anything behind it
is computed: attention's projections, its output, the feed-forward's, and in a mixture of experts
the routed experts one by one and the shared ones last, which see every token and can make good
what the routed ones lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quantkit.forward.hyper import Hyper
from quantkit.forward.matrices import Matrices
from quantkit.forward.stream import RowsMaker, Stream
from quantkit.propagate.moments import Moments

Tensor = torch.Tensor
# What a part of a layer adds to the tokens begin .. end, whole sequences of some lengths.
Part = Callable[[Stream, int, int, list[int]], Tensor]

# Beyond so many columns a Gram matrix and its factors would take gigabytes.
_WIDEST = 8192
_SUPER = 256


class Quantiser(Protocol):
    """Takes weights whose inputs are known."""

    def wants(self, name: str) -> bool:
        """Whether a tensor is rounded by its inputs at all."""

    def take(self, name: str, matrix: int, moments: Moments, at: int) -> None:
        """Quantise matrix `matrix` of a tensor; its inputs are number `at` of the moments.

        The columns of a very wide matrix lie in several of them, from `at` on.
        """

    def forget(self, name: str, matrix: int) -> None:
        """Both runs have passed a matrix, which is not read again."""


@dataclass(frozen=True)
class Stage:
    """Tensors that see the same inputs, or heads of one tensor that each see their own.

    `inputs` are tensors shown together; `until` is the tensor at whose inputs a pass may end.
    """

    inputs: tuple[tuple[str, ...], ...]
    until: str


def attention_stages(m: Matrices, hyper: Hyper, layer: int) -> list[Stage]:
    """The stages of a layer's attention, in the order of the computation."""
    blk = f"blk.{layer}."
    output = f"{blk}attn_output.weight"
    last = Stage(((output,),), output)
    if not hyper.mla:
        q, k, v = (f"{blk}attn_{part}.weight" for part in "qkv")
        return [Stage(((q, k, v),), q), last]
    heads = Stage(((f"{blk}attn_k_b.weight",), (f"{blk}attn_v_b.weight",)), output)
    kv_a = f"{blk}attn_kv_a_mqa.weight"
    if f"{blk}attn_q_a.weight" not in m:
        q = f"{blk}attn_q.weight"
        return [Stage(((q, kv_a),), q), heads, last]
    q_a, q_b = f"{blk}attn_q_a.weight", f"{blk}attn_q_b.weight"
    return [Stage(((q_a, kv_a),), q_a), Stage(((q_b,),), q_b), heads, last]


def dense_stages(layer: int) -> list[Stage]:
    """The stages of a dense feed-forward."""
    gate, up, down = (f"blk.{layer}.ffn_{part}.weight" for part in ("gate", "up", "down"))
    return [Stage(((gate, up),), gate), Stage(((down,),), down)]


class Pair:
    """Teacher and student at the same tokens; `held` bool[n_tok] are those held back."""

    def __init__(self, teacher: Stream, student: Stream, held: Tensor) -> None:
        self.teacher, self.student, self.held = teacher, student, held

    @property
    def streams(self) -> tuple[Stream, Stream]:
        """Both, the teacher first."""
        return self.teacher, self.student


def pass_dense(
    pair: Pair,
    quantiser: Quantiser,
    stages: Sequence[Stage],
    part: Part,
    make_rows: RowsMaker,
) -> None:
    """Quantise the weights of attention or of a dense feed-forward, then advance both streams.

    The last of the stages is the weight that writes the residual. Its inputs are kept in rows, so
    that nothing before it is computed again.
    """
    for stage in stages[:-1]:
        if any(quantiser.wants(name) for names in stage.inputs for name in names):
            moments: dict[str, Moments] = {}
            for begin, end, lengths in pair.student.sequence_blocks():
                seen = [_inputs(s, stage, part, begin, end, lengths) for s in pair.streams]
                for names, x, student in zip(stage.inputs, *seen, strict=True):
                    _add(moments, pair, names[0], slice(begin, end), x, student)
            _take(pair, quantiser, stage, moments)
    _write(pair, quantiser, stages[-1], part, make_rows)


def _write(
    pair: Pair, quantiser: Quantiser, stage: Stage, part: Part, make_rows: RowsMaker
) -> None:
    name, moments = stage.until, dict[str, Moments]()
    width = pair.student.matrices.weights.shape(name)[-1]
    kept = [make_rows(len(pair.held), width) for _ in pair.streams]
    for begin, end, lengths in pair.student.sequence_blocks():
        x, student = (_inputs(s, stage, part, begin, end, lengths)[0] for s in pair.streams)
        for rows, seen in zip(kept, (x, student), strict=True):
            rows.write(begin, seen.cpu())
        if quantiser.wants(name):
            residual = pair.teacher.read(begin, end) - pair.student.read(begin, end)
            _add(moments, pair, name, slice(begin, end), x, student, residual)
    if quantiser.wants(name):
        _take(pair, quantiser, stage, moments)
    for stream, rows in zip(pair.streams, kept, strict=True):
        for begin, end in stream.token_blocks():
            y = stream.matrices.apply(name, rows.read(begin, end).to(stream.device))
            stream.hidden.write(begin, (stream.read(begin, end) + y).cpu())


def _add(
    moments: dict[str, Moments],
    pair: Pair,
    name: str,
    tokens: slice,
    x: Tensor,
    student: Tensor,
    residual: Tensor | None = None,
) -> None:
    """Add a block's inputs to the moments of the tensors that `name` is the first of."""
    shape = pair.student.matrices.weights.shape(name)
    n_matrices = shape[0] if len(shape) == 3 else column_parts(shape[-1])
    if len(shape) == 2 and n_matrices > 1:
        residual = None  # each of the parts would make good all of it
    if name not in moments:
        n_out = 0 if residual is None else shape[-2]
        n = shape[-1] if len(shape) == 3 else shape[-1] // n_matrices
        moments[name] = Moments(n_matrices, n, n_out, device=x.device)
    parts = (len(x), n_matrices, -1)
    moments[name].add(pair.held[tokens], x.view(parts), student.view(parts), residual)


def _take(pair: Pair, quantiser: Quantiser, stage: Stage, moments: dict[str, Moments]) -> None:
    for names in stage.inputs:
        for name in filter(quantiser.wants, names):
            shape = pair.student.matrices.weights.shape(name)
            for matrix in range(shape[0] if len(shape) == 3 else 1):
                quantiser.take(name, matrix, moments[names[0]], matrix)


def column_parts(n: int) -> int:
    """Into how many equal parts the columns of a matrix are taken, each by itself."""
    parts = 1
    while n // parts > _WIDEST or n % (parts * _SUPER):
        parts += 1
        if parts * _SUPER > n:
            return 1
    return parts


class _ReachedError(Exception):
    """A pass has shown all that was wanted."""


class _Watch:
    """An observer of some tensors' inputs."""

    def __init__(self, stage: Stage) -> None:
        self._until = stage.until
        self._parts: dict[str, list[Tensor]] = {names[0]: [] for names in stage.inputs}

    def see(self, names: tuple[str, ...], x: Tensor, row: int = 0, n_rows: int = 1) -> None:
        """See `Observer`."""
        if names[0] in self._parts:
            self._parts[names[0]].append(x)
        if names[0] == self._until:
            raise _ReachedError

    def wants_prior(self, name: str, n_tok: int) -> bool:
        """See `Observer`."""
        return False

    def see_prior(self, name: str, x: Tensor, row: int, n_rows: int) -> None:
        """See `Observer`."""

    def inputs(self) -> list[Tensor]:
        """What was seen, f32[n_tok, n] of each of the stage's inputs."""
        return [torch.cat(parts) for parts in self._parts.values()]


def _inputs(
    stream: Stream, stage: Stage, part: Part, begin: int, end: int, lengths: list[int]
) -> list[Tensor]:
    watch = _Watch(stage)
    stream.matrices.observer = watch
    try:
        part(stream, begin, end, lengths)
    except _ReachedError:
        pass
    finally:
        stream.matrices.observer = None
    return watch.inputs()
