"""What errors in each part of a model do to its output: one sweep that carries disturbed copies.

A copy of a small text's hidden states branches off the reference where a group of tensors is
rounded to few bits, and runs beside it through all layers that follow. Weights are read once per
layer for all copies. Copies of one group keep the reference's choice of experts: a choice that
flips costs about as much for a tiny error as for a large one, and would drown what is measured.
A few copies have everything disturbed at once, experts chosen anew: what groups cost together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from quantkit.allocate.errors import Rounder
from quantkit.errors import UsageError
from quantkit.forward import blocks
from quantkit.forward.hyper import Hyper, Moe
from quantkit.forward.matrices import Compute, Matrices, output_name
from quantkit.forward.rows import RamRows, Rows
from quantkit.forward.stream import RowsMaker, Sequences, Stream
from quantkit.forward.weights import Tile, Weights
from quantkit.types import GgmlType, Kv

Tensor = torch.Tensor
Importances = Mapping[str, npt.NDArray[np.float32]]

_HEAD_BYTES = 64 << 20  # of logits' tiles, f32
_HEAD_INPUTS = 512 << 20  # bytes of all copies' inputs of the head at once


@dataclass(frozen=True)
class Copy:
    """Tensors that a copy has rounded, and their types; `frozen`: experts are the reference's."""

    name: str
    types: Mapping[str, GgmlType]
    frozen: bool = True


class Scorer(Protocol):
    """Compares logits with a reference's, tile by tile of the vocabulary."""

    def add(self, first: int, base: Tensor, quants: Sequence[Tensor]) -> None:
        """Logits f32[n, v] of tokens from number `first` on."""

    def kld(self) -> npt.NDArray[np.float64]:
        """KL in nats by copy, summed over places: f64[n_copies]."""


# Of so many places and copies.
MakeScorer = Callable[[int, int], Scorer]


class Cache:
    """Rows that were read or rounded a moment ago, up to so many bytes."""

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes
        self._tiles: OrderedDict[tuple[object, ...], Tile] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[object, ...], make: Callable[[], Tile]) -> Tile:
        """What `make` gave last time, or gives now."""
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        tile = make()
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = tile
                self._left -= tile.nbytes
            while self._left < 0 and len(self._tiles) > 1:
                self._left += self._tiles.popitem(last=False)[1].nbytes
        return tile


@dataclass
class Disturbed:
    """`Weights` with some tensors rounded to the nearest; `importances` fill while layers pass."""

    base: Weights
    cache: Cache
    types: Mapping[str, GgmlType]
    rounder: Rounder
    importances: Importances

    @property
    def kvs(self) -> Mapping[str, Kv]:
        """See `Weights`."""
        return self.base.kvs

    def __contains__(self, name: str) -> bool:
        return name in self.base

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self.base.shape(name)

    def type(self, name: str) -> GgmlType:
        """See `Weights`. Inputs are not rounded here, so all count as F32."""
        return GgmlType.F32

    def read(self, name: str, begin: int, end: int) -> Tile:
        """See `Weights`."""
        key = (name, begin, end)
        exact = self.cache.get(key, lambda: self.base.read(name, begin, end))
        type_ = self.types.get(name)
        if type_ is None:
            return exact
        weight = self.importances.get(name)
        return self.cache.get((*key, type_), lambda: self.rounder.nearest(exact, type_, weight))


@dataclass
class Copies:
    """All copies' hidden states, one copy's tokens after the other's.

    `first` is the layer that each branches off in; the embedding counts as layer 0, the output as
    one behind the last.
    """

    reference: Stream
    copies: Sequence[Copy]
    sequences: Sequences
    hyper: Hyper
    compute: Compute
    weights: Callable[[Mapping[str, GgmlType]], Weights]
    make_rows: RowsMaker
    first: Sequence[int]
    _hidden: Rows = field(init=False)
    _spare: Rows | None = field(init=False)

    def __post_init__(self) -> None:
        n_rows = len(self.copies) * self.n_tok
        self._hidden = self.make_rows(n_rows, self.hyper.hidden)
        self._spare = self.make_rows(n_rows, self.hyper.hidden) if self.hyper.moe else None
        self._plain = self._stream({})
        self._streams = [self._stream(copy.types) for copy in self.copies]

    @property
    def n_tok(self) -> int:
        """Tokens of a copy, the first of the reference's."""
        return len(self.sequences)

    def embed(self) -> None:
        """Start those whose embedding is rounded."""
        for k, copy in enumerate(self.copies):
            if "token_embd.weight" in copy.types:
                stream = Stream(
                    self._streams[k].matrices, self.hyper, self.sequences, self.make_rows
                )
                stream.embed()
                self._hidden.write(k * self.n_tok, stream.hidden.read(0, self.n_tok))

    def branch(self, layer: int) -> None:
        """Copy the reference's state before a layer to those that begin there."""
        for k, copy in enumerate(self.copies):
            if self.first[k] == layer and "token_embd.weight" not in copy.types:
                self._hidden.write(k * self.n_tok, self.reference.hidden.read(0, self.n_tok))

    def advance(self, layer: int, progress: Callable[[float], None]) -> None:
        """Pass a layer, after the reference has."""
        active = [k for k in range(len(self.copies)) if self.first[k] <= layer]
        if not active:
            return
        routed = blocks.is_routed(self._plain.matrices, layer)
        for k in active:
            stream = self._at(k, layer)
            for begin, end, lengths in self._plain.sequence_blocks():
                at = k * self.n_tok + begin
                h = self._hidden.read(at, at + end - begin).to(stream.device)
                h = h + stream.attention(layer, h, lengths)
                if not routed:
                    h = h + stream.dense_ffn(layer, h)
                self._hidden.write(at, h.cpu())
            progress((0.3 if routed else 1.0) / len(active))
        if routed:
            self._routed(layer, active, progress)

    def kld(self, places: npt.NDArray[np.int64], make: MakeScorer) -> list[float]:
        """Mean KL of every copy at the places i64[n] of their text."""
        n = len(self.copies)
        step = max(1, _HEAD_INPUTS // (4 * self.hyper.hidden * (n + 1)))
        total = np.zeros(n)
        for begin in range(0, len(places), step):
            part = torch.from_numpy(places[begin : begin + step])
            total += self._scores(part, make(len(part), n))
        return [float(x) for x in total / max(1, len(places))]

    def _stream(self, types: Mapping[str, GgmlType]) -> Stream:
        """Operators of a layer; its hidden states are not used."""
        matrices = Matrices(self.weights(types), self.compute)
        return Stream(matrices, self.hyper, self.sequences, lambda _, width: RamRows(0, width))

    def _at(self, copy: int, layer: int) -> Stream:
        prefix = f"blk.{layer}."
        own = any(name.startswith(prefix) for name in self.copies[copy].types)
        return self._streams[copy] if own else self._plain

    def _routed(self, layer: int, active: Sequence[int], progress: Callable[[float], None]) -> None:
        moe, spare, routing = self.hyper.moe, self._spare, self.reference.routing
        if moe is None or spare is None or routing is None:
            raise UsageError(f"layer {layer} has experts, the metadata has none")
        chosen = np.full((self._hidden.n_rows, moe.n_used), -1, np.int16)
        gates = torch.zeros(self._hidden.n_rows, moe.n_used)
        for k in active:
            self._route(layer, k, moe, routing, (chosen, gates, spare))
        by_stream: dict[int, list[int]] = {}
        for k in active:
            by_stream.setdefault(id(self._at(k, layer)), []).append(k)
        for expert in range(moe.n_experts):
            for members in by_stream.values():
                self._expert(layer, expert, members, (chosen, gates, spare))
            progress(0.7 / moe.n_experts)
        self._hidden, self._spare = spare, self._hidden

    def _route(
        self,
        layer: int,
        k: int,
        moe: Moe,
        routing: npt.NDArray[np.int16],
        into: tuple[npt.NDArray[np.int16], Tensor, Rows],
    ) -> None:
        """Choose a copy's experts, and begin its sum with what every token passes."""
        chosen, gates, out = into
        stream, m = self._at(k, layer), self._at(k, layer).matrices
        for begin in range(0, self.n_tok, stream.n_block):
            end = min(begin + stream.n_block, self.n_tok)
            rows = slice(k * self.n_tok + begin, k * self.n_tok + end)
            h = self._hidden.read(rows.start, rows.stop).to(stream.device)
            x = stream.ffn_input(layer, h)
            given = None
            if self.copies[k].frozen:
                given = torch.from_numpy(routing[begin:end].astype(np.int64)).to(x.device)
            ids, weights = blocks.route(m, moe, layer, x, given)
            chosen[rows], gates[rows] = ids.cpu().numpy(), weights.cpu()
            out.write(rows.start, (h + blocks.shared_ffn(m, layer, x)).cpu())

    def _expert(
        self,
        layer: int,
        expert: int,
        members: Sequence[int],
        of: tuple[npt.NDArray[np.int16], Tensor, Rows],
    ) -> None:
        """Add what an expert gives to copies that share its weights."""
        chosen, gates, out = of
        stream = self._at(members[0], layer)
        found = [np.nonzero(chosen[k * self.n_tok :][: self.n_tok] == expert) for k in members]
        offsets = [k * self.n_tok for k in members]
        places = np.concatenate([at + by for by, (at, _) in zip(offsets, found, strict=True)])
        slots = np.concatenate([slot for _, slot in found])
        index = torch.from_numpy(places)
        share = gates[index, torch.from_numpy(slots)]
        for part, weight in zip(
            index.split(stream.n_block), share.split(stream.n_block), strict=True
        ):
            if len(part):
                x = stream.ffn_input(layer, self._hidden.take(part).to(stream.device))
                y = stream.matrices.swiglu(f"blk.{layer}.ffn", "_exps", x, expert)
                out.add(part, (y * weight[:, None].to(y.device)).cpu())

    def _scores(self, places: Tensor, scorer: Scorer) -> npt.NDArray[np.float64]:
        m, n_layers = self._plain.matrices, self.hyper.n_layers
        name, norm = output_name(m.weights), m.vector("output_norm.weight")
        base = self.reference.final(places)
        inputs = []
        for k in range(len(self.copies)):
            h = base if self.first[k] > n_layers else None
            if h is None:
                rows = self._hidden.take(places + k * self.n_tok).to(base.device)
                h = blocks.rms_norm(rows, norm, self.hyper.eps)
            inputs.append(h)
        own = [k for k, copy in enumerate(self.copies) if name in copy.types]
        n_vocab, n_cols = m.weights.shape(name)
        step = max(1, _HEAD_BYTES // (4 * max(n_cols, len(places))))
        for first in range(0, n_vocab, step):
            last = min(first + step, n_vocab)
            tile = self._tile(m, name, first, last)
            logits = [
                m.product(name, x, self._tile(self._streams[k].matrices, name, first, last))
                if k in own
                else m.product(name, x, tile)
                for k, x in enumerate(inputs)
            ]
            scorer.add(first, m.product(name, base, tile), logits)
        return scorer.kld()

    def _tile(self, m: Matrices, name: str, first: int, last: int) -> Tensor:
        rows = torch.from_numpy(m.weights.read(name, first, last))
        return rows.to(self.compute.device, self.compute.dtype)


def first_layer(copy: Copy, n_layers: int, head: str) -> int:
    """Where a copy parts from the reference; behind the last layer for the output alone."""
    layers = [int(name.split(".")[1]) for name in copy.types if name.startswith("blk.")]
    if "token_embd.weight" in copy.types:
        return 0
    if not layers and head in copy.types:
        return n_layers + 1
    return min(layers)
