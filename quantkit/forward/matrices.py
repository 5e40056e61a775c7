"""Products with a model's matrices, whose rows are read tile by tile and never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, Protocol

import torch
from torch.nn.functional import gelu, silu

from quantkit.forward.hyper import Activation, read_traits
from quantkit.forward.keeping import Kept
from quantkit.forward.loading import Loader, Part
from quantkit.forward.rounding import rounded
from quantkit.forward.weights import Weights

Activations = Literal["llama.cpp", "exact"]

_TILE_BYTES = 64 << 20  # of f32; an expert's matrix of Kimi K2 is just below


def _gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gelu(gate, approximate="tanh").mul_(up)


def _clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gpt-oss: swish with a slope of 1.702, both sides clamped at 7, and up + 1."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


_GATED: dict[Activation, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda gate, up: silu(gate).mul_(up),
    "gelu": _gelu,
    "clamped": _clamped,
}


class Observer(Protocol):
    """Sees the input of every matrix before it is multiplied."""

    def see(self, names: tuple[str, ...], x: torch.Tensor, row: int = 0, n_rows: int = 1) -> None:
        """x f32[n_tok, n]: inputs of the weights `names`; `row` of `n_rows` is the expert."""

    def wants_prior(self, name: str, n_tok: int) -> bool:
        """Whether an expert with `n_tok` tokens should also see a sample of all tokens."""

    def see_prior(self, name: str, x: torch.Tensor, row: int, n_rows: int) -> None:
        """x f32[n_tok, n]: inputs of expert `row`, had a sample of all tokens been routed to it."""


@dataclass(frozen=True)
class Compute:
    """Where and how exactly. `activations` "llama.cpp" rounds them as its CPU backend does."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    activations: Activations = "llama.cpp"


class Matrices:
    """A model's weights as operators."""

    def __init__(
        self, weights: Weights, compute: Compute, observer: Observer | None = None
    ) -> None:
        self.weights = weights
        self.compute = compute
        self.observer = observer
        self._traits = read_traits(weights.kvs)
        self._load = Loader(weights, compute.device, compute.dtype).load

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what is read of matrices inside the block for further products in it, see `Kept`."""
        load = self._load
        self._load = Kept(load).load
        try:
            yield
        finally:
            self._load = load

    def vector(self, name: str) -> torch.Tensor:
        """A norm or bias, f32[n] on the device."""
        return torch.from_numpy(self.weights.read(name, 0, 1)[0]).to(self.compute.device)

    def apply(self, name: str, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """x f32[n_tok, cols] times the transpose of a matrix, or of an expert's: f32[n_tok, rows].

        A bias of the same name is added.
        """
        with closing(self._load(self._parts(name, *self._rows_of(name, expert)))) as tiles:
            return self._applied(name, x, expert, tiles)

    def _applied(
        self, name: str, x: torch.Tensor, expert: int | None, tiles: Iterator[torch.Tensor]
    ) -> torch.Tensor:
        x = self._input(name, x)
        y = torch.empty(len(x), self._rows_of(name, expert)[1], device=x.device)
        begin = 0
        while begin < y.shape[1]:
            tile = next(tiles)
            y[:, begin : begin + len(tile)] = x @ tile.T
            begin += len(tile)
        bias = self._bias(name, expert)
        return y if bias is None else y.add_(bias)

    def heads(self, name: str) -> torch.Tensor:
        """All of a small 3-D tensor, f32[n_heads, rows, cols]."""
        shape = self.weights.shape(name)
        return torch.cat(list(self._load(self._parts(name, 0, shape[0] * shape[1])))).view(shape)

    def per_head(self, name: str, matrices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x f32[n_tok, n_heads, cols] by `heads(name)`: f32[n_heads, n_tok, rows]."""
        return self._input(name, x.transpose(0, 1)) @ matrices.transpose(1, 2)

    def swiglu(
        self, prefix: str, suffix: str, x: torch.Tensor, expert: int | None = None
    ) -> torch.Tensor:
        """The gated MLP down(act(gate(x)) * up(x)) of `{prefix}_gate{suffix}.weight` and siblings.

        The activation is the architecture's. Where there is no gate, up holds its rows too, first.
        """
        names = self._gate_up(prefix, suffix)
        down = f"{prefix}_down{suffix}.weight"
        row, n_rows = (0, 1) if expert is None else (expert, self.weights.shape(down)[0])
        if self.observer:
            self.observer.see(tuple(dict.fromkeys(names)), x, row, n_rows)
        parts = [*self._inner_parts(prefix, suffix, expert)]
        parts += self._parts(down, *self._rows_of(down, expert))
        with closing(self._load(parts)) as tiles:
            inner = self._inner(prefix, suffix, x, expert, tiles)
            if self.observer:
                self.observer.see((down,), inner, row, n_rows)
            return self._applied(down, inner, expert, tiles)

    def swiglu_inner(
        self, prefix: str, suffix: str, x: torch.Tensor, expert: int | None
    ) -> torch.Tensor:
        """What goes into the down projection, f32[n_tok, width]."""
        with closing(self._load([*self._inner_parts(prefix, suffix, expert)])) as tiles:
            return self._inner(prefix, suffix, x, expert, tiles)

    def _inner(
        self,
        prefix: str,
        suffix: str,
        x: torch.Tensor,
        expert: int | None,
        tiles: Iterator[torch.Tensor],
    ) -> torch.Tensor:
        gate, up = self._gate_up(prefix, suffix)
        n_rows = self._rows_of(up, expert)[1]
        skip = 0
        if gate == up:
            skip = n_rows = n_rows // 2
        gate_bias, up_bias = self._bias(gate, expert), self._bias(up, expert)
        combine = _GATED[self._traits.activation]
        inner = torch.empty(len(x), n_rows, device=x.device)
        into_gate, into_up = self._input(gate, x), self._input(up, x)
        begin = 0
        while begin < n_rows:
            gated, raised = into_gate @ next(tiles).T, into_up @ next(tiles).T
            end = begin + raised.shape[1]
            if gate_bias is not None:
                gated = gated + gate_bias[begin:end]
            if up_bias is not None:
                raised = raised + up_bias[skip + begin : skip + end]
            inner[:, begin:end] = combine(gated, raised)
            begin = end
        return inner

    def _inner_parts(self, prefix: str, suffix: str, expert: int | None) -> Iterator[Part]:
        """Tiles of gate and up in turns; where they are one tensor, gate is its upper half."""
        gate, up = self._gate_up(prefix, suffix)
        first, n_rows = self._rows_of(up, expert)
        skip = 0
        if gate == up:
            skip = n_rows = n_rows // 2
        pairs = zip(
            self._parts(gate, first, n_rows), self._parts(up, first + skip, n_rows), strict=True
        )
        return chain.from_iterable(pairs)

    def _gate_up(self, prefix: str, suffix: str) -> tuple[str, str]:
        gate, up = f"{prefix}_gate{suffix}.weight", f"{prefix}_up{suffix}.weight"
        return (gate, up) if gate in self.weights else (up, up)

    def _bias(self, name: str, expert: int | None) -> torch.Tensor | None:
        """The bias of a matrix, or of an expert's, f32[n_rows]; None where there is none."""
        bias = name.removesuffix(".weight") + ".bias"
        if bias not in self.weights:
            return None
        row = expert or 0
        return torch.from_numpy(self.weights.read(bias, row, row + 1)[0]).to(self.compute.device)

    def tiles(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, tile) of a matrix on the device."""
        parts = self._parts(name, 0, self.weights.shape(name)[0])
        with closing(self._load(parts)) as tiles:
            for part, tile in zip(parts, tiles, strict=True):
                yield part.first, tile

    def product(self, name: str, x: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
        """x f32[n_tok, cols] by a tile of the head, f32[n_tok, rows]: logits, soft-capped."""
        logits, cap = (self._input(name, x) @ tile.T).float(), self._traits.logit_cap
        return torch.tanh(logits / cap).mul_(cap) if cap else logits

    def _rows_of(self, name: str, expert: int | None) -> tuple[int, int]:
        """First row and number of rows, leading axes flattened."""
        shape = self.weights.shape(name)
        if expert is None:
            return 0, shape[0]
        return expert * shape[1], shape[1]

    def _input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.compute.activations == "llama.cpp":
            x = rounded(x, self.weights.type(name))
        return x.to(self.compute.dtype)

    def _parts(self, name: str, first: int, n_rows: int) -> list[Part]:
        """Tiles of `n_rows` rows from `first` on."""
        step = max(1, _TILE_BYTES // (4 * self.weights.shape(name)[-1]))
        last = first + n_rows
        return [Part(name, k, min(k + step, last)) for k in range(first, last, step)]


def output_name(weights: Weights) -> str:
    """The head's tensor; the token embedding where they are tied."""
    return "output.weight" if "output.weight" in weights else "token_embd.weight"
