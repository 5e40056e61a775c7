"""What there is to decide: groups of tensors that share a type, and the types each may have.

Which types a consumer runs is read off llama.cpp's backends: its CUDA code has no matrix product
for TQ1_0 and TQ2_0, Metal none for TQ1_0 and NVFP4; CUDA has no quantised matrix-matrix kernel for
IQ1_M, so that prompts go through a dequantised copy; NVFP4, Q1_0 and Q2_0 are of 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from math import isinf, isnan

from quantkit.container.layout import DEFAULT_ALIGNMENT, padded, tensor_n_bytes
from quantkit.errors import NonFiniteError, UsageError
from quantkit.types import GgmlType, TensorSpec


@dataclass(frozen=True, slots=True)
class Option:
    """A type that a group may get: bytes in the file, padding included, and what it costs.

    `cost` is in whatever unit all groups share, such as nats of KL at the output; costs add up.
    """

    type: GgmlType
    n_bytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that get one type, and the types to choose from."""

    name: str
    tensors: tuple[str, ...]
    n_weights: int
    options: tuple[Option, ...]


class Consumer(StrEnum):
    """Who has to run the file well."""

    CPU = "cpu"
    CUDA = "cuda"
    CUDA_PROMPTS = "cuda-prompts"  # CUDA, at full speed on long prompts too
    METAL = "metal"
    VULKAN = "vulkan"
    OLDER = "older"  # llama.cpp of 2025


# Types that a consumer does not have, or only at a crawl.
_LACKS: dict[Consumer, frozenset[GgmlType]] = {
    Consumer.CPU: frozenset(),
    Consumer.CUDA: frozenset({GgmlType.TQ1_0, GgmlType.TQ2_0}),
    Consumer.CUDA_PROMPTS: frozenset({GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.IQ1_M}),
    Consumer.METAL: frozenset({GgmlType.TQ1_0, GgmlType.NVFP4}),
    Consumer.VULKAN: frozenset(),
    Consumer.OLDER: frozenset({GgmlType.NVFP4, GgmlType.Q1_0, GgmlType.Q2_0}),
}

DEFAULT_CONSUMERS = (Consumer.CPU, Consumer.CUDA, Consumer.OLDER)

# Every type with blocks; which of them are worth their bytes is for the costs to say.
CANDIDATES = tuple(sorted((t for t in GgmlType if t.block_size > 1), key=lambda t: (t.bpw, t.name)))

# Roles that share a type within a layer where gate and up run as one kernel.
GATE_UP = tuple((f"{kind}.gate", f"{kind}.up") for kind in ("routed_expert", "shared_expert"))

Cost = Callable[[TensorSpec, GgmlType], float]

_FLOOR = re.compile(r"\s*([^\s<>=]+)\s*>=\s*(\w+)\s*")


@dataclass(frozen=True, slots=True)
class Floor:
    """Tensors whose role matches the glob `role` get no type of fewer bits than `type`."""

    role: str
    type: GgmlType


@dataclass(frozen=True, slots=True)
class Legal:
    """Which types tensors may get, beyond what their rows allow.

    All floors whose role matches hold. `share` names roles that get one type in each layer.
    """

    types: tuple[GgmlType, ...] = CANDIDATES
    consumers: tuple[Consumer, ...] = DEFAULT_CONSUMERS
    floors: tuple[Floor, ...] = ()
    share: tuple[tuple[str, ...], ...] = ()

    def of(self, tensors: Sequence[TensorSpec]) -> tuple[GgmlType, ...]:
        """Types that all of `tensors` may have, smallest first; F16 alone where there is none."""
        floor = max((f.type.bpw for f in self.floors if _governs(f, tensors)), default=0.0)
        allowed = usable(self.types, self.consumers)
        fitting = [
            t
            for t in allowed
            if t.bpw >= floor and all(x.grid[1] % t.block_size == 0 for x in tensors)
        ]
        return tuple(fitting) or (GgmlType.F32 if floor > GgmlType.F16.bpw else GgmlType.F16,)


def usable(
    types: Iterable[GgmlType], consumers: Collection[Consumer] = DEFAULT_CONSUMERS
) -> tuple[GgmlType, ...]:
    """Those of `types` that every consumer runs, smallest first, each once."""
    lacking = frozenset[GgmlType]().union(*(_LACKS[consumer] for consumer in consumers))
    return tuple(sorted(set(types) - lacking, key=lambda t: (t.bpw, t.name)))


def parse_floor(text: str) -> Floor:
    """A floor such as `attention.*>=Q5_K`. Raises `UsageError`."""
    found = _FLOOR.fullmatch(text)
    if not found or found[2].upper() not in GgmlType.__members__:
        raise UsageError(
            f"{text!r} is no floor", hint="a role, >= and a type: attention.*>=Q5_K, output>=Q6_K"
        )
    return Floor(found[1], GgmlType[found[2].upper()])


def build_groups(
    specs: Sequence[TensorSpec], cost: Cost, legal: Legal | None = None
) -> tuple[Group, ...]:
    """Groups of all tensors that a recipe may change, by name; `keep` tensors are in none.

    `cost` is asked for every tensor and type that is legal for it; a group's cost is the sum over
    its tensors. An infinite cost strikes the type out, NaN is a `NonFiniteError`. Raises
    `UsageError` where no type is left.
    """
    legal = legal or Legal()
    together: dict[str, list[TensorSpec]] = {}
    for spec in sorted(specs, key=lambda spec: spec.name):
        if spec.keep is None:
            together.setdefault(_key(spec, legal.share), []).append(spec)
    groups = (_group(tensors, cost, legal) for tensors in together.values())
    return tuple(sorted(groups, key=lambda group: group.name))


def stored_bytes(spec: TensorSpec, type_: GgmlType) -> int:
    """Bytes that a tensor takes up in a file, with the padding behind it."""
    return padded(tensor_n_bytes(spec.shape, type_, where=spec.name), DEFAULT_ALIGNMENT)


def _group(tensors: Sequence[TensorSpec], cost: Cost, legal: Legal) -> Group:
    name = "+".join(spec.name for spec in tensors)
    options = []
    for type_ in legal.of(tensors):
        total = sum(cost(spec, type_) for spec in tensors)
        if isnan(total) or total == float("-inf"):
            raise NonFiniteError(f"the cost of {type_.name} is {total}", where=name)
        if not isinf(total):
            n_bytes = sum(stored_bytes(spec, type_) for spec in tensors)
            options.append(Option(type_, n_bytes, total))
    if not options:
        raise UsageError(
            "every type that this tensor may have is struck out by an infinite cost", where=name
        )
    names = tuple(spec.name for spec in tensors)
    return Group(name, names, sum(spec.n_weights for spec in tensors), tuple(options))


def _key(spec: TensorSpec, share: Iterable[tuple[str, ...]]) -> str:
    for roles in share:
        if any(fnmatchcase(spec.role, role) for role in roles):
            return f"{spec.layer} {roles}"
    return spec.name


def _governs(floor: Floor, tensors: Iterable[TensorSpec]) -> bool:
    return any(fnmatchcase(spec.role, floor.role) for spec in tensors)
