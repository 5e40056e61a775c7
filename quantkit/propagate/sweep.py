"""Teacher and student through all layers, the student's weights quantised on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.forward import blocks
from quantkit.forward.hyper import Hyper
from quantkit.forward.matrices import Matrices
from quantkit.forward.stream import RowsMaker, Sequences, Stream
from quantkit.forward.sweep import Settings, Sweep
from quantkit.forward.weights import Weights
from quantkit.propagate.experts import ExpertLayer
from quantkit.propagate.layer import Pair, Quantiser, attention_stages, dense_stages, pass_dense
from quantkit.propagate.moments import Moments
from quantkit.propagate.student import StudentWeights

_N_SHARDS = 16  # neighbouring chunks stay together, for they may be of one document
_HELD = 4  # every fourth of them is held back


class _Nothing:
    """A sweep that learns nothing that must survive it."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `Memory`."""
        return {}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """See `Memory`."""


def held_back(n_seq: int, n_tok: int) -> torch.Tensor:
    """Tokens that are held back from fitting, bool[n_seq * n_tok]: every fourth shard."""
    shard = np.arange(n_seq) * min(_N_SHARDS, n_seq) // max(1, n_seq)
    return torch.from_numpy(np.repeat(shard % _HELD == _HELD - 1, n_tok))


def propagate(
    weights: Weights,
    student: StudentWeights,
    hyper: Hyper,
    chunks: npt.NDArray[np.integer],
    quantiser: Quantiser,
    settings: Settings,
    state: tuple[Path | None, str, int],
    after_layer: Callable[[int], None],
    on_resume: Callable[[int], None],
) -> None:
    """Quantise every weight that `quantiser` wants, layer by layer, on token ids [n_seq, n_tok].

    `state` is the folder where the sweep is saved between layers, the digest of all that it depends
    on, and the number of leading layers whose weights are all written: beyond them no saved state
    is taken up. `after_layer(layer)` is called when a layer's weights are done, `on_resume(layers)`
    when some were done before.
    """
    sequences = Sequences.of(chunks)
    make = settings.rows_for(hyper, len(sequences), 2)
    teacher_run, student_run = (
        Stream(Matrices(w, settings.compute), hyper, sequences, make) for w in (weights, student)
    )
    pair = Pair(teacher_run, student_run, held_back(*chunks.shape))
    folder, digest, n_done = state
    sweep = Sweep(pair.streams, _Nothing(), folder, digest)
    first = sweep.start(at_most=n_done)
    if first:
        on_resume(first)

    def advance(layer: int) -> None:
        _pass_layer(pair, quantiser, layer, make)
        student.clear()
        after_layer(layer)

    sweep.run_layers(first, advance)
    _output(pair, quantiser)
    sweep.clear()


def _pass_layer(
    pair: Pair,
    quantiser: Quantiser,
    layer: int,
    make: RowsMaker,
) -> None:
    teacher = pair.teacher
    stages = attention_stages(teacher.matrices, teacher.hyper, layer)

    def attention(stream: Stream, begin: int, end: int, lengths: list[int]) -> torch.Tensor:
        return stream.attention(layer, stream.read(begin, end), lengths)

    def ffn(stream: Stream, begin: int, end: int, lengths: list[int]) -> torch.Tensor:
        return stream.dense_ffn(layer, stream.read(begin, end))

    pass_dense(pair, quantiser, stages, attention, make)
    if blocks.is_routed(teacher.matrices, layer):
        ExpertLayer(pair, quantiser, layer).run()
    else:
        pass_dense(pair, quantiser, dense_stages(layer), ffn, make)
    for stream in pair.streams:
        stream.check(layer)


def _output(pair: Pair, quantiser: Quantiser) -> None:
    name = "output.weight"
    if not quantiser.wants(name):
        return
    moments = Moments(1, pair.student.hyper.hidden, device=pair.student.device)
    for begin, end in pair.student.token_blocks():
        places = torch.arange(begin, end)
        x, student = (stream.final(places)[:, None] for stream in pair.streams)
        moments.add(pair.held[begin:end], x, student)
    quantiser.take(name, 0, moments, 0)
