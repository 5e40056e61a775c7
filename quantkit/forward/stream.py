"""One model's hidden states on their way through the layers, all sequences at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quantkit.errors import NonFiniteError, UsageError
from quantkit.forward import blocks
from quantkit.forward.hyper import Hyper
from quantkit.forward.matrices import Matrices, output_name
from quantkit.forward.rotary import Turns
from quantkit.forward.rows import Rows
from quantkit.forward.spans import Spans

_WORK_BYTES = 384 << 20  # of activations in flight, about
_LOGIT_BYTES = 32 << 20  # of logits at once, by each model of a comparison
_PRIOR_TOKENS = 256  # of all tokens, for experts that see few of their own
_GAP = 16  # rows of the embedding between two needed ones that are read rather than skipped

_ATTENTION = 0.25  # of a layer's time, for progress only

RowsMaker = Callable[[int, int], Rows]
Progress = Callable[[float], None]


def _unheard(part: float) -> None:
    """What nobody asked for."""


@dataclass(frozen=True)
class Sequences:
    """Token ids i64[n_tok] of all sequences, one after the other, and the sequences' lengths.

    `ends` are where spans end, the last at n_tok; without any, all is one span. `n_all` are the
    tokens of the whole text where these are a share of it.
    """

    ids: npt.NDArray[np.int64]
    lengths: tuple[int, ...]
    ends: tuple[int, ...] = ()
    n_all: int | None = None

    @classmethod
    def of(cls, chunks: npt.NDArray[np.integer]) -> Sequences:
        """Equal sequences, ids [n_seq, n_tok]."""
        return cls(chunks.ravel().astype(np.int64), (chunks.shape[1],) * len(chunks))

    @classmethod
    def share(cls, chunks: npt.NDArray[np.integer], spans: Spans, share: range) -> Sequences:
        """The sequences of some spans of a text, ids [n_seq, n_tok]."""
        mine = cls.of(chunks[spans.chunks(share)])
        return cls(mine.ids, mine.lengths, spans.ends(share), spans.n_tokens)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First token and end of each span."""
        ends = self.ends or (len(self),)
        return list(zip((0, *ends), ends, strict=False))

    def __len__(self) -> int:
        return len(self.ids)


class Stream:
    """Hidden states f32[n_tok, hidden] of one model, advanced layer by layer.

    Weights are read once per layer (once per block of tokens where they are too large to be kept),
    an expert at a time. `routing` holds the experts chosen in the last layer, i16[n_tok, n_used],
    or None after a dense one. `on_span` is told the number of the span whose tokens the matrices'
    observer sees next.
    """

    def __init__(
        self,
        matrices: Matrices,
        hyper: Hyper,
        sequences: Sequences,
        make_rows: RowsMaker,
        on_span: Callable[[int], None] = _unheard,
    ) -> None:
        self.matrices = matrices
        self.hyper = hyper
        self.sequences = sequences
        self._on_span = on_span
        self.hidden = make_rows(len(sequences), hyper.hidden)
        self.routing: npt.NDArray[np.int16] | None = None
        # Where a routed layer gathers what comes out, before it becomes the hidden states.
        self.spare = make_rows(len(sequences), hyper.hidden) if hyper.moe else None
        n_pos = max(sequences.lengths, default=0)
        self._turns = Turns.of(matrices.weights, hyper, n_pos, matrices.compute.device)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.matrices.compute.device

    def embed(self) -> None:
        """Start: rows of the embedding table, of which only the needed ones are read."""
        ids = torch.from_numpy(self.sequences.ids)
        table = self.matrices.weights
        n_vocab = table.shape("token_embd.weight")[0]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_vocab:
            raise UsageError(f"token {int(ids.max())} in a vocabulary of {n_vocab}")
        for begin, end in _ranges(self.sequences.ids):
            rows = torch.from_numpy(table.read("token_embd.weight", begin, end))
            rows = rows * self.hyper.embedding_scale
            places = torch.nonzero((ids >= begin) & (ids < end)).ravel()
            for part in places.split(self.n_block):
                self.hidden.add(part, rows[ids[part] - begin])

    def advance(self, layer: int, progress: Progress = _unheard) -> None:
        """Pass one layer, telling parts of it as they are done.

        Raises `NonFiniteError` where a hidden state overflows.
        """
        n = max(1, len(self.sequences))
        with self._keeping():
            for begin, end, lengths in self.sequence_blocks():
                self._enter(begin)
                h = self.read(begin, end)
                self.hidden.write(begin, (h + self.attention(layer, h, lengths)).cpu())
                progress(_ATTENTION * (end - begin) / n)
        self.routing = None
        if blocks.is_routed(self.matrices, layer):
            self._routed(layer, progress)
        else:
            self._dense(layer, progress)
        self.check(layer)

    def attention(self, layer: int, h: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """What attention adds to the hidden states h f32[n_tok, hidden] of whole sequences."""
        m = self.matrices
        x = blocks.rms_norm(h, m.vector(f"blk.{layer}.attn_norm.weight"), self.hyper.eps)
        return blocks.attention(m, self.hyper, layer, x, lengths, self._turns)

    def dense_ffn(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """What a dense feed-forward adds to the hidden states h f32[n_tok, hidden]."""
        return blocks.dense_ffn(self.matrices, self.hyper, layer, self.ffn_input(layer, h))

    def ffn_input(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """Hidden states h f32[n_tok, hidden] as the feed-forward sees them."""
        weight = self.matrices.vector(blocks.ffn_norm(self.matrices, layer))
        return blocks.rms_norm(h, weight, self.hyper.eps)

    def logits(self, places: npt.NDArray[np.int64]) -> Iterator[tuple[int, torch.Tensor]]:
        """(first token id, logits f32[n, tile]) of the places i64[n], ascending, tile by tile."""
        m, name = self.matrices, output_name(self.matrices.weights)
        x = self.final(torch.from_numpy(places))
        step = max(1, _LOGIT_BYTES // (4 * max(1, len(places))))
        for first, tile in m.tiles(name):
            for begin in range(0, len(tile), step):
                yield first + begin, m.product(name, x, tile[begin : begin + step])

    def final(self, places: torch.Tensor) -> torch.Tensor:
        """The head's input at the places i64[n], ascending: f32[n, hidden]."""
        m = self.matrices
        return blocks.rms_norm(self.take(places), m.vector("output_norm.weight"), self.hyper.eps)

    def observe_output(self) -> None:
        """Show the head's input of all tokens to the observer."""
        if self.matrices.observer:
            for begin, end in self.token_blocks():
                self._enter(begin)
                x = self.final(torch.arange(begin, end))
                self.matrices.observer.see((output_name(self.matrices.weights),), x)

    def _dense(self, layer: int, progress: Progress) -> None:
        n = max(1, len(self.sequences))
        with self._keeping():
            for begin, end in self.token_blocks():
                self._enter(begin)
                h = self.read(begin, end)
                self.hidden.write(begin, (h + self.dense_ffn(layer, h)).cpu())
                progress((1 - _ATTENTION) * (end - begin) / n)

    def _routed(self, layer: int, progress: Progress) -> None:
        moe, m, out = self.hyper.moe, self.matrices, self.spare
        if moe is None or out is None:
            raise UsageError(f"layer {layer} has experts, the metadata has none")
        routing = np.empty((self.hidden.n_rows, moe.n_used), np.int16)
        gates = torch.empty(self.hidden.n_rows, moe.n_used)
        with self._keeping():
            for begin, end in self.token_blocks():
                self._enter(begin)
                h = self.read(begin, end)
                x = self.ffn_input(layer, h)
                chosen, weights = blocks.route(m, moe, layer, x)
                routing[begin:end] = chosen.cpu().numpy()
                gates[begin:end] = weights.cpu()
                out.write(begin, (h + blocks.shared_ffn(m, layer, x)).cpu())
        for expert in range(moe.n_experts):
            places, slots = np.nonzero(routing == expert)
            share = gates[torch.from_numpy(places), torch.from_numpy(slots)]
            with m.keeping():
                for begin, end in self.sequences.spans:
                    mine = slice(*np.searchsorted(places, (begin, end)))
                    self._enter(begin)
                    self._expert(layer, expert, torch.from_numpy(places[mine]), share[mine], out)
                    self._show_prior(layer, expert, begin, end, mine.stop - mine.start)
            progress((1 - _ATTENTION) / moe.n_experts)
        self.hidden, self.spare, self.routing = out, self.hidden, routing

    def _expert(
        self,
        layer: int,
        expert: int,
        index: torch.Tensor,
        share: torch.Tensor,
        out: Rows,
    ) -> None:
        m, prefix = self.matrices, f"blk.{layer}.ffn"
        for part, weight in zip(index.split(self.n_block), share.split(self.n_block), strict=True):
            if len(part):
                x = self.ffn_input(layer, self.take(part))
                y = m.swiglu(prefix, "_exps", x, expert)
                out.add(part, (y * weight[:, None].to(y.device)).cpu())

    def _show_prior(self, layer: int, expert: int, begin: int, end: int, n_own: int) -> None:
        """Show an expert a span's share of the sample of all tokens, where it sees few of its own.

        Few in proportion: whoever sees few in all does so in one span at least, so that no span
        need know of the others.
        """
        m, prefix, n = self.matrices, f"blk.{layer}.ffn", end - begin
        down, n_all = f"{prefix}_down_exps.weight", self.sequences.n_all or len(self.sequences)
        if m.observer and n and m.observer.wants_prior(down, n_own * n_all // n):
            n_sample = min(n, -(-_PRIOR_TOKENS * n // n_all))
            sample = begin + torch.linspace(0, n - 1, n_sample, dtype=torch.float64).long()
            x = self.ffn_input(layer, self.take(sample))
            inner = m.swiglu_inner(prefix, "_exps", x, expert)
            m.observer.see_prior(down, inner, expert, m.weights.shape(down)[0])

    def _enter(self, place: int) -> None:
        """Tell of the span of a token."""
        self._on_span(bisect_right(self.sequences.ends, place))

    def _keeping(self) -> AbstractContextManager[None]:
        """Keep matrices, where there are several blocks of tokens to multiply them with."""
        one = len(self.sequences) <= self.n_block and len(self.sequences.spans) == 1
        return nullcontext() if one else self.matrices.keeping()

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Hidden states of the tokens `index` i64[n], ascending: f32[n, hidden] on the device."""
        return self.hidden.take(index).to(self.device)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Hidden states of the tokens begin .. end, f32[n, hidden] on the device."""
        return self.hidden.read(begin, end).to(self.device)

    @property
    def n_block(self) -> int:
        """Tokens whose activations fit the working memory."""
        hyper, weights = self.hyper, self.matrices.weights
        widest = max(hyper.n_heads * max(hyper.k_dim, hyper.v_dim), 3 * hyper.hidden)
        for name in ("blk.0.ffn_up.weight", "blk.0.attn_q_b.weight"):
            if name in weights:
                widest = max(widest, weights.shape(name)[0])
        return max(64, _WORK_BYTES // (4 * 4 * widest))

    def token_blocks(self) -> Iterator[tuple[int, int]]:
        """Blocks of tokens of a span each, whose activations fit the working memory."""
        for first, last in self.sequences.spans:
            for begin in range(first, last, self.n_block):
                yield begin, min(begin + self.n_block, last)

    def sequence_blocks(self) -> Iterator[tuple[int, int, list[int]]]:
        """Blocks of tokens of a span each that end where sequences end."""
        begin = end = 0
        lengths: list[int] = []
        for n in self.sequences.lengths:
            if lengths and (end + n - begin > self.n_block or end in self.sequences.ends):
                yield begin, end, lengths
                begin, lengths = end, []
            lengths.append(n)
            end += n
        if lengths:
            yield begin, end, lengths

    def check(self, layer: int) -> None:
        """Raise `NonFiniteError` where a hidden state is no number."""
        for begin, end in self.token_blocks():
            if not torch.isfinite(self.hidden.read(begin, end).sum(-1)).all():
                raise NonFiniteError(
                    f"the hidden state after layer {layer} is not finite",
                    hint="the weights are damaged, or the compute type is too narrow: try f32",
                )


def _ranges(ids: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of table rows that cover the ids; near ones together, up to a few thousand rows."""
    needed = np.unique(ids)
    begin = 0
    for k in range(1, len(needed) + 1):
        if (
            k == len(needed)
            or needed[k] - needed[k - 1] > _GAP
            or needed[k] - needed[begin] >= 1024
        ):
            yield int(needed[begin]), int(needed[k - 1]) + 1
            begin = k
