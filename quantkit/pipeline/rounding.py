"""Rounding with feedback: run the model on text, and write each weight as its inputs are known."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from quantkit.container.kv import string, u32
from quantkit.evaluate.summary import with_bos
from quantkit.forward.hyper import require_feedback
from quantkit.forward.sweep import Settings, clear_state
from quantkit.forward.weights import Tile
from quantkit.hub.session import Place
from quantkit.pipeline.calibration import tell_text
from quantkit.pipeline.opening import Reading, Running, opened, read_tokens
from quantkit.plan.rounding import rounded_by_inputs
from quantkit.propagate.quantiser import FeedbackQuantiser, Rounding
from quantkit.propagate.student import StudentWeights
from quantkit.propagate.sweep import propagate
from quantkit.quantize.codec import Blocks, How
from quantkit.quantize.feedback import Feedback
from quantkit.quantize.gain import encode_rows
from quantkit.quantize.tiles import Encoding
from quantkit.recipe import FeedbackOptions
from quantkit.run import fs
from quantkit.run.events import Reporter
from quantkit.text.tokens import TokenSet, chunks
from quantkit.types import GgmlType, Kv, Plan, PlannedTensor
from quantkit.write.writer import ShardWriter


@dataclass(frozen=True)
class Text:
    """The text that a model is run on while its weights are rounded."""

    model: Place
    tokens: TokenSet
    n_tokens: int
    n_ctx: int
    running: Running

    @classmethod
    def read(cls, model: Place, corpus: str, n_tokens: int, running: Running) -> Text:
        """`n_tokens` from all over a corpus. Raises what opening a model and reading text raise."""
        saved = corpus.endswith(".safetensors")
        reading = Reading(corpus, None if saved else n_tokens * _SPREAD)
        with opened(model, running.constants) as described:
            require_feedback(described.hyper)
            tokens = read_tokens(described, reading)
        return cls(model, tokens, n_tokens, reading.n_ctx, running)

    def _chunks(self) -> npt.NDArray[np.int32]:
        """Chunks for `n_tokens` from all over the text, whose beginning may be of one kind."""
        cut = chunks(self.tokens, self.n_ctx)
        n = max(1, min(len(cut), self.n_tokens // self.n_ctx))
        return cut[np.arange(n) * len(cut) // n]

    @property
    def kvs(self) -> dict[str, Kv]:
        """What the file says of it."""
        return {
            "quantkit.rounding": string("feedback"),
            "quantkit.rounding.dataset": string(self.tokens.name),
            "quantkit.rounding.tokens": string(self.tokens.digest),
            "quantkit.rounding.n_tokens": u32(self._chunks().size),
        }

    def round(
        self,
        plan: Plan,
        encoding: Encoding,
        options: FeedbackOptions,
        writer: ShardWriter,
        n_threads: int,
        reporter: Reporter,
    ) -> None:
        """Write every tensor of the plan that is rounded by its inputs; the rest is left alone.

        Killed, it goes on from the last saved layer and ends in the same bytes.
        """
        types = rounded_by_inputs(plan)
        sink = _TileSink(plan, writer, reporter)
        n_done = sink.n_done_layers(types)
        if sink.is_done(types):
            clear_state(writer.work)
            return
        with opened(self.model, self.running.constants) as model, fs.claimed(writer.work):
            cut = self._chunks()
            tell_text(self.tokens, len(cut), self.n_ctx, reporter)
            n_per_column = cut.size / model.hyper.hidden
            reporter.stage("text", f"{n_per_column:.0f} tokens per column of the hidden state")
            if n_per_column < _ENOUGH:
                worse = " and below 4 the file may be worse than without feedback"
                reporter.warn(
                    f"fewer than {_ENOUGH} tokens per column: rounding leans on them less,"
                    f"{worse} (--calibration-tokens, --corpus)"
                )
            student = StudentWeights(model.weights, partial(_nearest, _planned(plan), encoding))
            # Scales aim at the least error here: what it leaves is small, and feedback sees it.
            how = How(encoding.how.effort, "importance", 0.0)
            feedback = Feedback(options.passes)
            rounding = Rounding(how, feedback, options.retarget, n_threads)
            quantiser = FeedbackQuantiser(
                model.weights, student, types, encoding.codec_of, rounding, sink.take
            )
            # Whoever runs the file rounds activations in a way of his own.
            compute = replace(self.running.compute(), activations="exact")
            digest = hashlib.sha256(f"{plan.digest} {self.n_ctx} {compute}".encode()).hexdigest()
            propagate(
                model.weights,
                student,
                model.hyper,
                with_bos(cut, model.bos),
                quantiser,
                Settings(compute, self.running.memory, writer.work),
                (writer.work, digest, n_done),
                lambda layer: writer.sync(),
                lambda done: reporter.stage(
                    "resume", f"{done} of {model.hyper.n_layers} layers are done"
                ),
            )
        _tell(quantiser, reporter)


_ENOUGH = 20  # tokens per column
_SPREAD = 8  # so many times the text that is wanted is read, to choose from


def _tell(quantiser: FeedbackQuantiser, reporter: Reporter) -> None:
    found = list(quantiser.strengths.values())
    followed = sum(s.share > 0 for s in found)
    reporter.stage(
        "round",
        f"{len(found):,} matrices with feedback, {followed:,} of them aimed at what their inputs"
        " have become",
    )


def _planned(plan: Plan) -> dict[str, PlannedTensor]:
    return {tensor.spec.name: tensor for tensor in plan.tensors}


def _nearest(
    planned: dict[str, PlannedTensor], encoding: Encoding, name: str, rows: Tile, matrix: int
) -> Tile:
    """Rows of a tensor that is rounded without looking at inputs, as they will be decoded."""
    type_ = planned[name].type
    if type_ is GgmlType.F32 or planned[name].repack:
        return rows
    codec = encoding.codec_of(type_)
    importance = encoding.importances.get(name) if encoding.importances else None
    weight = None if importance is None else importance[matrix if len(importance) > 1 else 0]
    return codec.decode(encode_rows(codec, np.ascontiguousarray(rows), weight, encoding.how))


class _TileSink:
    """Puts matrices together to the tiles of a plan."""

    def __init__(self, plan: Plan, writer: ShardWriter, reporter: Reporter) -> None:
        self._numbers = {tensor.spec.name: k for k, tensor in enumerate(plan.tensors)}
        self._plan, self._writer, self._reporter = plan, writer, reporter
        self._missing = set(writer.missing())
        self._parts: dict[tuple[int, int], tuple[Blocks, int]] = {}

    def n_done_layers(self, types: dict[str, GgmlType]) -> int:
        """How many of the first layers have all their tiles."""
        layers = [
            self._plan.tensors[tensor].spec.layer
            for tensor, _ in self._missing
            if self._plan.tensors[tensor].spec.name in types
        ]
        n_layers = max((t.spec.layer or 0 for t in self._plan.tensors), default=0) + 1
        return min((n_layers if layer is None else layer for layer in layers), default=n_layers)

    def is_done(self, types: dict[str, GgmlType]) -> bool:
        """Whether all tiles of these tensors are written."""
        return not any(self._plan.tensors[number].spec.name in types for number, _ in self._missing)

    def take(self, name: str, matrix: int, blocks: Blocks) -> None:
        """All rows of a matrix of a tensor."""
        number = self._numbers[name]
        tensor = self._plan.tensors[number]
        begin = matrix * len(blocks)
        end = begin + len(blocks)
        for tile in range(tensor.n_tiles):
            slab, first, last = tensor.tile(tile)
            first, last = slab * tensor.slab_rows + first, slab * tensor.slab_rows + last
            low, high = max(first, begin), min(last, end)
            if low < high:
                part = blocks[low - begin : high - begin]
                self._fill((number, tile), part, low - first, last - first)

    def _fill(self, key: tuple[int, int], part: Blocks, at: int, n_rows: int) -> None:
        if key not in self._missing:
            return
        data, n_filled = self._parts.pop(key, (None, 0))
        if data is None:
            data = np.empty((n_rows, part.shape[1]), np.uint8)
        data[at : at + len(part)] = part
        n_filled += len(part)
        if n_filled < n_rows:
            self._parts[key] = data, n_filled
            return
        view = data.data.cast("B")
        self._writer.write(*key, view, hashlib.sha256(view).digest())
        self._reporter.advance(view.nbytes)
        self._missing.discard(key)
