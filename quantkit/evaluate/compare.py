"""Base and quantised models side by side through the layers: scores, and where the error arises.

Nothing of a model is held but the weights at work: every stream takes a layer in turn, then their
hidden states are compared, and the heads' logits meet tile by tile.
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

    `hidden` f64[n_quants, n_layers] is |h_q - h| / |h| over all tokens; `router` the share of
    (token, slot) choices that differ, NaN for dense layers.
    """

    def __init__(self, n_quants: int, n_layers: int) -> None:
        """Traces of no quants compare nothing."""
        self.hidden = np.zeros((n_quants, n_layers))
        self.router = np.full((n_quants, n_layers), np.nan)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `Memory`."""
        return {"hidden_error": self.hidden, "router": self.router}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """See `Memory`."""
        self.hidden[:], self.router[:] = arrays["hidden_error"], arrays["router"]

    def see(self, layer: int, base: Stream, quants: Sequence[Stream]) -> None:
        """Compare the states after a layer."""
        for k, quant in enumerate(quants[: len(self.hidden)]):
            self.hidden[k, layer] = _distance(base, quant)
            if base.routing is not None and quant.routing is not None:
                self.router[k, layer] = _disagreement(base.routing, quant.routing)

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

    @classmethod
    def of(cls, chunks: Ids, bos: int | None) -> Windows:
        """`bos` takes the place of every chunk's first token."""
        return cls(chunks, with_bos(chunks, bos))

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Scored positions among all tokens, i64[n_scored], ascending."""
        n_chunks, n_ctx = self.chunks.shape
        starts = np.arange(n_chunks, dtype=np.int64) * n_ctx
        return np.add.outer(starts, np.array(scored_positions(n_ctx))).ravel()


def compare(
    base: Party | BaseFile,
    quants: Sequence[Party],
    text: Windows,
    settings: Settings,
    identity: str,
    progress: Progress,
) -> tuple[Scores, Traces | None, Sweep]:
    """Scores of the second half of every chunk, of all quants against the base.

    Traces need a base that runs too, so a file of its log-probabilities gives None. `identity`
    names models and settings, for resuming. Raises `UsageError` where models differ in vocabulary
    or depth.
    """
    parties = [base, *quants] if isinstance(base, Party) else list(quants)
    n_layers = parties[0].hyper.n_layers
    if isinstance(base, BaseFile):
        _check_file(base, parties[0], text)
    traces = Traces(len(parties) - 1, n_layers)
    with torch.inference_mode():
        streams, sweep = advanced(
            parties, Sequences.of(text.inputs), settings, identity, traces, progress
        )
        scores = _score(base if isinstance(base, BaseFile) else None, streams, text, settings)
    return scores, traces if isinstance(base, Party) else None, sweep


def save_base(
    base: Party, text: Windows, settings: Settings, identity: str, path: Path, progress: Progress
) -> Sweep:
    """Write the base's log-probabilities as llama-perplexity's `--kl-divergence-base` file."""
    traces = Traces(0, base.hyper.n_layers)
    with torch.inference_mode():
        (stream,), sweep = advanced(
            [base], Sequences.of(text.inputs), settings, identity, traces, progress
        )
        n_vocab = base.weights.shape(output_name(base.weights))[0]
        with LogitsWriter(path, text.chunks, n_vocab) as writer:
            for begin, places in portions(text.places):
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
    said = f"{identity} {sequences.lengths} {settings.compute}".encode()
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
    file: BaseFile | None, streams: Sequence[Stream], text: Windows, settings: Settings
) -> Scores:
    """Logits of all streams, tile by tile, for a few thousand positions at a time."""
    targets = targets_of(text.chunks)
    n_quants = len(streams) if file else len(streams) - 1
    parts = []
    for begin, places in portions(text.places):
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


def _distance(base: Stream, quant: Stream) -> float:
    step = max(1, _COMPARED_BYTES // (4 * base.hidden.n_cols))
    error = norm = 0.0
    for begin in range(0, base.hidden.n_rows, step):
        end = min(begin + step, base.hidden.n_rows)
        b, q = base.hidden.read(begin, end), quant.hidden.read(begin, end)
        norm += float(b.square().sum(dtype=torch.float64))
        error += float(q.sub_(b).square_().sum(dtype=torch.float64))
    return float(np.sqrt(error / norm)) if norm else 0.0


def _disagreement(base: npt.NDArray[np.int16], quant: npt.NDArray[np.int16]) -> float:
    shared = sum(int((base == quant[:, k, np.newaxis]).sum()) for k in range(quant.shape[1]))
    return 1 - shared / base.size
