"""From what a user asks for to bytes of files, and from there to an assignment that fits exactly.

A file is its header, the tensors whose type is fixed, and those that are allocated, each padded;
`Files` asks the layout for it, so what fits here fits when it is planned and written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from quantkit.allocate.choices import Group
from quantkit.allocate.solve import Allocation, solve
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.errors import UsageError
from quantkit.run.sizes import parse_size
from quantkit.types import GgmlType, Kv, TensorSpec

# Left alone in each memory: llama.cpp's --fit spares 1 GiB per device, its compute buffers for
# batches of 512 tokens and whatever else runs there take about as much.
RESERVE_BYTES = 2 << 30

_KV_CELLS = 256  # llama.cpp rounds a context up to a multiple of it
_BPW = re.compile(r"\s*(\d{1,3}(?:\.\d{1,18})?)\s*", re.ASCII)


@dataclass(frozen=True)
class Files:
    """A model's output: all its tensors, the KVs of its header, and how it is cut into shards."""

    specs: tuple[TensorSpec, ...]
    kvs: Mapping[str, Kv]
    max_shard_bytes: int | None = None
    max_shard_tensors: int | None = None

    def n_bytes(self, types: Mapping[str, GgmlType]) -> int:
        """Bytes of all files, given a type for every tensor that a recipe may change."""
        layouts = lay_out(
            "model",
            self.kvs,
            [
                TensorEntry(s.name, s.shape, types[s.name] if s.keep is None else s.keep)
                for s in self.specs
            ],
            max_shard_bytes=self.max_shard_bytes,
            max_shard_tensors=self.max_shard_tensors,
        )
        return sum(layout.n_bytes for layout in layouts)

    def n_header_bytes(self) -> int:
        """Bytes before the data if it is one file; shards take more."""
        entries = [TensorEntry(s.name, s.shape, s.keep or GgmlType.F32) for s in self.specs]
        (layout,) = lay_out("model", self.kvs, entries, max_shard_bytes=None)
        return layout.data_begin


@dataclass(frozen=True, slots=True)
class Fit:
    """Memories that have to hold the weights, the KV cache and a reserve each; all in bytes."""

    memories: tuple[int, ...]
    kv_cache: int
    reserve: int = RESERVE_BYTES

    @property
    def n_bytes(self) -> int:
        """What is left for the files."""
        return sum(self.memories) - self.reserve * len(self.memories) - self.kv_cache


def parse_bpw(text: str, files: Files) -> int:
    """Bytes of files whose tensors take at most so many bits per weight, such as `1.9`.

    The average is over all tensors, those of fixed types too, as `Plan.bpw` counts it.
    """
    found = _BPW.fullmatch(text)
    if not found or not Fraction(found[1]):
        raise UsageError(f"{text!r} are not bits per weight", hint="such as 1.9")
    n_weights = sum(spec.n_weights for spec in files.specs)
    return int(Fraction(Decimal(found[1])) * n_weights / 8) + files.n_header_bytes()


def parse_fit(
    text: str, *, kv_bytes_per_token: int = 0, n_ctx: int = 0, reserve: int = RESERVE_BYTES
) -> Fit:
    """Memories such as `24GB+256GB` that hold the weights beside a cache for `n_ctx` tokens.

    Raises `UsageError` where nothing is left for the weights.
    """
    cells = -(-n_ctx // _KV_CELLS) * _KV_CELLS
    memories = tuple(parse_size(part) for part in text.split("+"))
    fit = Fit(memories, kv_bytes_per_token * cells, reserve)
    if fit.n_bytes <= 0:
        raise UsageError(
            f"{text} leaves nothing for the weights: a cache for {n_ctx:,} tokens takes "
            f"{fit.kv_cache:,} bytes, and {reserve:,} are kept free in each memory",
            hint="ask for a smaller context",
        )
    return fit


def allocate(
    groups: Sequence[Group], files: Files, budget: int, *, type_penalty: float = 0.0
) -> Allocation:
    """The cheapest assignment whose files take at most `budget` bytes, headers and padding too.

    `groups` have to hold every tensor that a recipe may change. Raises `UsageError` where that is
    not so, and where nothing fits.
    """
    grouped = sorted(name for group in groups for name in group.tensors)
    free = sorted(spec.name for spec in files.specs if spec.keep is None)
    if grouped != free:
        odd = sorted(set(grouped) ^ set(free)) or grouped
        raise UsageError(
            f"groups and model do not have the same tensors; {odd[0]} is only in one, or in two"
        )
    smallest = {
        tensor: min(group.options, key=lambda o: o.n_bytes)
        for group in groups
        for tensor in group.tensors
    }
    least = files.n_bytes({tensor: option.type for tensor, option in smallest.items()})
    if least > budget:
        raise UsageError(
            f"{budget:,} bytes are too few, the smallest file takes {least:,}",
            hint="raise the target, lower the floors, or allow smaller types",
        )
    room = budget - least + sum(min(o.n_bytes for o in group.options) for group in groups)
    while True:
        found = solve(groups, room, type_penalty=type_penalty)
        excess = files.n_bytes(found.types()) - budget
        if excess <= 0:
            return found
        room -= excess  # more shards than the smallest file has, each with a header
