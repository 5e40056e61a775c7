"""From a described model and a recipe to the plan: a pure function of metadata."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from quantkit import __version__
from quantkit.container.layout import ShardLayout, TensorEntry, lay_out
from quantkit.errors import RecipeError
from quantkit.plan.fallback import fitting_type
from quantkit.plan.tiles import slab_rows, tile_rows
from quantkit.recipe import FILE_TYPES, Recipe
from quantkit.source.repack import repacks_to
from quantkit.types import (
    GgmlType,
    Kv,
    Plan,
    PlannedShard,
    PlannedTensor,
    TensorSpec,
    WeightFormat,
)

# The Hub refuses files of 50 GB and more.
MAX_SHARD_BYTES = 49_000_000_000

# What a file that is mostly of a type is called, where that is not the name of the type.
_FILE_TYPE_OF = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


@dataclass(frozen=True, slots=True)
class Limits:
    """How the output is cut into files."""

    max_shard_bytes: int | None = MAX_SHARD_BYTES
    max_shard_tensors: int | None = None


@dataclass(frozen=True, slots=True)
class _Choice:
    spec: TensorSpec
    wanted: GgmlType
    type: GgmlType
    repack: bool


class TypeChooser:
    """Types of one model's tensors, by recipe and shape; refuses what cannot be encoded."""

    def __init__(
        self, recipe: Recipe, tensors: Sequence[TensorSpec], encodable: Collection[GgmlType]
    ) -> None:
        missing = sorted(t.name for t in recipe.types() if t not in encodable)
        if missing:
            raise RecipeError(
                f"types that cannot be encoded: {', '.join(missing)}",
                where=f"recipe {recipe.name}",
                hint=f"choose from {', '.join(sorted(t.name for t in encodable))}",
            )
        self._wanted = recipe.assign(tensors)
        self.file_type = recipe.file_type

    def choose(self, spec: TensorSpec) -> _Choice:
        """Type of one of the model's tensors."""
        if spec.keep is not None:
            return _Choice(spec, spec.keep, spec.keep, can_repack(spec, spec.keep))
        wanted = self._wanted[spec.name]
        type_ = fitting_type(wanted, spec.grid[1])
        return _Choice(spec, wanted, type_, repack=can_repack(spec, type_))


def build_plan(
    specs: tuple[TensorSpec, ...],
    chooser: TypeChooser,
    kvs: Mapping[str, Kv],
    *,
    stem: str,
    arch: str,
    recipe_name: str,
    source_fingerprint: str,
    limits: Limits,
) -> Plan:
    """Types, tiles, shards and absolute offsets of every tensor."""
    choices = [chooser.choose(spec) for spec in specs]
    shards = lay_out(
        stem,
        kvs,
        [TensorEntry(c.spec.name, c.spec.shape, c.type) for c in choices],
        max_shard_bytes=limits.max_shard_bytes,
        max_shard_tensors=limits.max_shard_tensors,
    )
    tensors = _place(choices, shards)
    # Encoders may change between versions, and half a file of each would be neither.
    digest = hashlib.sha256(f"{__version__} {source_fingerprint}".encode())
    for shard in shards:
        digest.update(hashlib.sha256(shard.header).digest())
    for tensor in tensors:
        digest.update(f"{tensor.tile_rows},{tensor.repack};".encode())
    return Plan(
        stem,
        arch,
        recipe_name,
        tensors,
        tuple(PlannedShard(s.file_name, s.n_bytes, s.header) for s in shards),
        kvs,
        digest.hexdigest(),
    )


def file_type(specs: tuple[TensorSpec, ...], chooser: TypeChooser) -> int:
    """`general.file_type`: the recipe's, or that of the type that most weights have."""
    if chooser.file_type is not None:
        return FILE_TYPES[chooser.file_type]
    weights: Counter[GgmlType] = Counter()
    for spec in specs:
        weights[chooser.choose(spec).type] += spec.n_weights
    most = max(weights, key=lambda t: (weights[t], -t)).name
    return FILE_TYPES.get(_FILE_TYPE_OF.get(most, most), FILE_TYPES["F32"])


def _place(choices: list[_Choice], shards: tuple[ShardLayout, ...]) -> tuple[PlannedTensor, ...]:
    by_name = {c.spec.name: c for c in choices}
    tensors = []
    for number, shard in enumerate(shards):
        for place in shard.tensors:
            choice = by_name[place.name]
            tensors.append(
                PlannedTensor(
                    choice.spec,
                    choice.type,
                    choice.wanted,
                    choice.repack,
                    number,
                    place.begin,
                    place.n_bytes,
                    slab_rows(choice.spec),
                    tile_rows(choice.spec),
                )
            )
    return tuple(tensors)


def can_repack(spec: TensorSpec, type_: GgmlType) -> bool:
    """Whether blocks are copied bit by bit: those of a GGUF file, or those with the same levels.

    Rows may change their order, but stay whole. Scales are checked when they are read.
    """
    stored = {(slab.weight.format, slab.weight.data.dtype) for slab in spec.slabs}
    if stored == {(WeightFormat.GGUF, type_.name)}:
        return True
    return bool(spec.slabs) and all(
        repacks_to(slab.weight) is type_ and slab.op.keeps_rows_whole for slab in spec.slabs
    )
