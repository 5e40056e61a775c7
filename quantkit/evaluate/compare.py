"""Base and quantised models side by side through the layers: scores, and where the error arises.

Nothing of a model is held but the weights at work: every stream takes a layer in turn, then their
hidden states are compared, and the heads' logits meet tile by tile.

The text can be shared: see `shares`. Scores are of single tokens; what is summed up over tokens is
kept by span.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.errors import UsageError
from quantkit.evaluate.logits_file import BaseFile, LogitsWriter, RecordEncoder
from quantkit.evaluate.report import Layer
from quantkit.evaluate.scores import Scores, TileScorer
from quantkit.evaluate.summary import scored_positions, targets_of, with_bos
from quantkit.forward.hyper import Hyper
from quantkit.forward.matrices import Matrices, output_name
from quantkit.forward.spans import SPAN_TOKENS, Spans
from quantkit.forward.stream import Sequences, Stream
from quantkit.forward.sweep import Settings, Sweep
from quantkit.forward.weights import Weights

Progress = Callable[[float], None]  # told parts of the whole
Ids = npt.NDArray[np.int32]

_HEAD_TOKENS = 4096  # scored at once
_COMPARED_BYTES = 64 << 20


@dataclass(frozen=True)
class Party:
    """A model that takes part: its weights, its numbers, and a name for messages."""

    name: str
    weights: Weights
    hyper: Hyper


class Traces:
    """Per quant and layer: relative error of the hidden state, and of the router's choices.

    Both are kept as sums by span: `sums` f64[n_spans, n_layers, n_quants, 4] are |h_q - h|^2 and
    |h|^2 over a span's tokens, and of the (token, slot) choices those that differ and all.
    """

    def __init__(self, n_quants: int, n_layers: int, n_spans: int = 1) -> None:
        """Traces of no quants compare nothing."""
        self.sums = np.zeros((n_spans, n_layers, n_quants, 4))

    @property
    def hidden(self) -> npt.NDArray[np.float64]:
        """f64[n_quants, n_layers]: |h_q - h| / |h| over all tokens."""
        error, norm, *_ = self._total()
        return np.sqrt(np.divide(error, norm, out=np.zeros_like(error), where=norm > 0))

    @property
    def router(self) -> npt.NDArray[np.float64]:
        """f64[n_quants, n_layers]: the share of choices that differ, NaN for dense layers."""
        *_, lost, n = self._total()
        return np.divide(lost, n, out=np.full_like(lost, np.nan), where=n > 0)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `Memory`."""
        return {"traces": self.sums}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """See `Memory`."""
        self.sums[:] = arrays["traces"]

    def see(self, layer: int, base: Stream, quants: Sequence[Stream]) -> None:
        """Compare the states after a layer."""
        for span, (begin, end) in enumerate(base.sequences.spans[: len(self.sums)]):
            for k, quant in enumerate(quants[: self.sums.shape[2]]):
                into = self.sums[span, layer, k]
                into[:2] = _distance(base, quant, begin, end)
                if base.routing is not None and quant.routing is not None:
                    mine, theirs = base.routing[begin:end], quant.routing[begin:end]
                    into[2:] = _differing(mine, theirs), mine.size

    def _total(self) -> npt.NDArray[np.float64]:
        """f64[4, n_quants, n_layers], span after span."""
        total = np.zeros(self.sums.shape[1:])
        for sums in self.sums:
            total += sums
        return total.transpose(2, 1, 0)

    def layers(self, quant: int) -> list[Layer]:
        """For the report."""
        return [
            Layer(
                layer=i,
                hidden_error=float(error),
                router_disagreement=None if np.isnan(router) else float(router),
            )
            for i, (error, router) in enumerate(
                zip(self.hidden[quant], self.router[quant], strict=True)
            )
        ]


@dataclass(frozen=True)
class Windows:
    """`chunks` i32[n_chunks, n_ctx] to predict; `inputs` the same with BOS where models want it."""

    chunks: Ids
    inputs: Ids
    span_tokens: int = SPAN_TOKENS

    @classmethod
    def of(cls, chunks: Ids, bos: int | None, span_tokens: int = SPAN_TOKENS) -> Windows:
        """`bos` takes the place of every chunk's first token."""
        return cls(chunks, with_bos(chunks, bos), span_tokens)

    @property
    def spans(self) -> Spans:
        """The spans of the text."""
        return Spans.of(self.chunks.shape, self.span_tokens)

    def rows(self, span: int) -> range:
        """The scored positions of a span among those of the whole text."""
        n_scored, chunks = len(scored_positions(self.chunks.shape[1])), self._chunks(span)
        return range(chunks.start * n_scored, chunks.stop * n_scored)

    def portions(self, span: int, share: range) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """(first of the span's `rows`, places among the tokens of the share) at a time."""
        n_ctx, chunks = self.chunks.shape[1], self._chunks(span)
        first = self._chunks(share.start).start
        starts = np.arange(chunks.start - first, chunks.stop - first, dtype=np.int64) * n_ctx
        for begin, places in portions(
            np.add.outer(starts, np.array(scored_positions(n_ctx))).ravel()
        ):
            yield self.rows(span).start + begin, places

    def _chunks(self, span: int) -> slice:
        return self.spans.chunks(range(span, span + 1))


@dataclass(frozen=True)
class Comparison:
    """A base, the quants to be compared with it, the text, and how they are run.

    `identity` names models and settings: a state of the same in `settings.work` is taken up.
    """

    base: Party | BaseFile
    quants: Sequence[Party]
    text: Windows
    settings: Settings
    identity: str

    @property
    def n_layers(self) -> int:
        """Of each model."""
        return self.quants[0].hyper.n_layers

    @property
    def traced(self) -> int:
        """Quants whose hidden states are compared: a file of log-probabilities has none."""
        return len(self.quants) if isinstance(self.base, Party) else 0


def compare(job: Comparison, progress: Progress) -> tuple[Scores, Traces | None, Sweep]:
    """Scores of the second half of every chunk, of all quants against the base.

    Traces need a base that runs too, so a file of its log-probabilities gives None. Raises
    `UsageError` where models differ in vocabulary or depth.
    """
    scores, traces, sweep = compare_share(job, job.text.spans.all(), progress)
    return Scores.join(scores), traces if isinstance(job.base, Party) else None, sweep


def compare_share(
    job: Comparison, share: range, progress: Progress
) -> tuple[list[Scores], Traces, Sweep]:
    """As `compare`, of some spans of the text; the scores span by span."""
    base, text, settings = job.base, job.text, job.settings
    text.spans.check(share)
    parties = [base, *job.quants] if isinstance(base, Party) else list(job.quants)
    if isinstance(base, BaseFile):
        _check_file(base, parties[0], text)
    traces = Traces(job.traced, job.n_layers, len(share))
    with torch.inference_mode():
        sequences = Sequences.share(text.inputs, text.spans, share)
        streams, sweep = advanced(parties, sequences, settings, job.identity, traces, progress)
        file = base if isinstance(base, BaseFile) else None
        scores = [_score(file, streams, text, span, share, settings) for span in share]
    return scores, traces, sweep


def save_base(
    base: Party, text: Windows, settings: Settings, identity: str, path: Path, progress: Progress
) -> Sweep:
    """Write the base's log-probabilities as llama-perplexity's `--kl-divergence-base` file."""
    traces, share = Traces(0, base.hyper.n_layers), text.spans.all()
    with torch.inference_mode():
        sequences = Sequences.share(text.inputs, text.spans, share)
        (stream,), sweep = advanced([base], sequences, settings, identity, traces, progress)
        n_vocab = base.weights.shape(output_name(base.weights))[0]
        with LogitsWriter(path, text.chunks, n_vocab) as writer:
            for span in share:
                for begin, places in text.portions(span, share):
                    encoder = RecordEncoder(len(places))
                    for _, tile in stream.logits(places):
                        encoder.measure(tile.cpu().numpy())
                    for first, tile in stream.logits(places):
                        writer.write_tile(begin, first, encoder, tile.cpu().numpy())
                    writer.write_heads(begin, encoder)
            writer.commit()
    return sweep


def advanced(
    parties: Sequence[Party],
    sequences: Sequences,
    settings: Settings,
    identity: str,
    traces: Traces,
    progress: Progress,
) -> tuple[list[Stream], Sweep]:
    """Streams of all parties behind the last layer. See `compare`."""
    for party in parties[1:]:
        _check_alike(parties[0], party)
    hyper = parties[0].hyper
    rows = settings.rows_for(hyper, len(sequences), len(parties))
    said = f"{identity} {sequences.lengths} {sequences.ends} {settings.compute}".encode()
    digest = hashlib.sha256(said + sequences.ids.tobytes()).hexdigest()
    streams = [
        Stream(Matrices(party.weights, settings.compute), party.hyper, sequences, rows)
        for party in parties
    ]
    share = 1 / (len(parties) * hyper.n_layers)
    sweep = Sweep(streams, traces, settings.work, digest)
    first = sweep.start()
    progress(first / hyper.n_layers)
    sweep.run(
        first,
        lambda layer: traces.see(layer, streams[0], streams[1:]),
        lambda part: progress(part * share),
    )
    return streams, sweep


def _score(
    file: BaseFile | None,
    streams: Sequence[Stream],
    text: Windows,
    span: int,
    share: range,
    settings: Settings,
) -> Scores:
    """Logits of all streams, tile by tile, for a few thousand positions of a span at a time."""
    targets = targets_of(text.chunks)
    n_quants = len(streams) if file else len(streams) - 1
    parts = []
    for begin, places in text.portions(span, share):
        end = begin + len(places)
        scorer = TileScorer(
            targets[begin:end],
            n_quants,
            settings.compute.device,
            base_is_log_probs=file is not None,
        )
        tiles = [stream.logits(places) for stream in streams]
        for together in zip(*tiles, strict=True):
            first, logits = together[0][0], [tile for _, tile in together]
            if file:
                last = first + logits[0].shape[1]
                logits.insert(0, torch.from_numpy(file.tile(begin, end, first, last)))
            scorer.add(first, logits[0], logits[1:])
        parts.append(scorer.finish())
    return Scores.join(parts)


def portions(places: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(first, places) of a few thousand places at a time."""
    for begin in range(0, len(places), _HEAD_TOKENS):
        yield begin, places[begin : begin + _HEAD_TOKENS]


def _check_file(base: BaseFile, quant: Party, text: Windows) -> None:
    n_vocab = quant.weights.shape(output_name(quant.weights))[0]
    if base.n_vocab != n_vocab:
        raise UsageError(
            f"vocabulary of {base.n_vocab}, {quant.name}'s has {n_vocab}", where=base.where
        )
    if not np.array_equal(base.tokens, text.chunks):
        raise UsageError("its tokens are not those of the text", where=base.where)


def _check_alike(base: Party, quant: Party) -> None:
    for what, mine, theirs in (
        ("layers", base.hyper.n_layers, quant.hyper.n_layers),
        ("hidden width", base.hyper.hidden, quant.hyper.hidden),
        (
            "vocabulary",
            base.weights.shape("token_embd.weight")[0],
            quant.weights.shape("token_embd.weight")[0],
        ),
    ):
        if mine != theirs:
            raise UsageError(
                f"{what} {theirs}, the base model {base.name} has {mine}",
                where=quant.name,
                hint="a quantised file can be compared with the model that it was made of only",
            )


def _distance(base: Stream, quant: Stream, first: int, last: int) -> tuple[float, float]:
    """Squared distance of the states of some tokens, and their squared norm."""
    step = max(1, _COMPARED_BYTES // (4 * base.hidden.n_cols))
    error = norm = 0.0
    for begin in range(first, last, step):
        end = min(begin + step, last)
        b, q = base.hidden.read(begin, end), quant.hidden.read(begin, end)
        norm += float(b.square().sum(dtype=torch.float64))
        error += float(q.sub_(b).square_().sum(dtype=torch.float64))
    return error, norm


def _differing(base: npt.NDArray[np.int16], quant: npt.NDArray[np.int16]) -> int:
    """Choices i16[n_tok, n_used] of the base that the quant does not make."""
    shared = sum(int((base == quant[:, k, np.newaxis]).sum()) for k in range(quant.shape[1]))
    return base.size - shared
