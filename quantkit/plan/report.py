"""A plan as numbers to print: by role, by shard, and whole as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quantkit.types import GgmlType, Plan, PlannedTensor


@dataclass(slots=True)
class RoleLine:
    """Sum over the tensors of one role."""

    role: str
    n_tensors: int = 0
    n_weights: int = 0
    n_bytes: int = 0
    types: Counter[str] = field(default_factory=Counter)


def by_role(plan: Plan) -> list[RoleLine]:
    """One line per role, largest first."""
    lines: dict[str, RoleLine] = {}
    for tensor in plan.tensors:
        role = tensor.spec.role
        line = lines.setdefault(role, RoleLine(role))
        line.n_tensors += 1
        line.n_weights += tensor.spec.n_weights
        line.n_bytes += tensor.n_bytes
        line.types[tensor.type.name] += 1
    return sorted(lines.values(), key=lambda line: (-line.n_bytes, line.role))


def tensors_per_shard(plan: Plan) -> list[int]:
    """Number of tensors in each shard."""
    counts = Counter(tensor.shard for tensor in plan.tensors)
    return [counts[number] for number in range(len(plan.shards))]


def substitutions(plan: Plan) -> Iterator[str]:
    """Sentences about tensors that get another type than the recipe asked for."""
    changed: Counter[tuple[str, GgmlType, GgmlType, int]] = Counter()
    for tensor in plan.tensors:
        if tensor.type is not tensor.wanted:
            changed[tensor.spec.role, tensor.wanted, tensor.type, tensor.spec.grid[1]] += 1
    for (role, wanted, given, n_cols), count in sorted(changed.items()):
        yield (
            f"{role}: {count} tensors get {given.name} instead of {wanted.name}, "
            f"rows of {n_cols} do not divide into blocks of {wanted.block_size}"
        )


def work(plan: Plan) -> dict[str, int]:
    """What has to be done, in bytes and weights: `encode` are weights, the rest bytes."""
    repacked = sum(t.spec.n_weights for t in plan.tensors if t.repack)
    return {
        "read_bytes": plan.n_source_bytes,
        "write_bytes": plan.n_bytes,
        "repack_weights": repacked,
        "encode_weights": plan.n_weights - repacked,
    }


def formats(tensor: PlannedTensor) -> list[str]:
    """How the weights of a tensor are stored; none for constants."""
    return sorted({slab.weight.format.value for slab in tensor.spec.slabs})


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain data."""
    return {
        "stem": plan.stem,
        "architecture": plan.arch,
        "recipe": plan.recipe_name,
        "digest": plan.digest,
        "n_bytes": plan.n_bytes,
        "n_weights": plan.n_weights,
        "bpw": plan.bpw,
        "work": work(plan),
        "shards": [{"file": s.file, "n_bytes": s.n_bytes} for s in plan.shards],
        "tensors": [_tensor(plan, tensor) for tensor in plan.tensors],
    }


def _tensor(plan: Plan, tensor: PlannedTensor) -> dict[str, Any]:
    return {
        "name": tensor.spec.name,
        "role": tensor.spec.role,
        "layer": tensor.spec.layer,
        "shape": list(tensor.spec.shape),
        "type": tensor.type.name,
        "wanted": tensor.wanted.name,
        "source": formats(tensor),
        "repack": tensor.repack,
        "shard": plan.shards[tensor.shard].file,
        "begin": tensor.begin,
        "n_bytes": tensor.n_bytes,
        "n_sources": len({slab.weight.name for slab in tensor.spec.slabs}),
    }
