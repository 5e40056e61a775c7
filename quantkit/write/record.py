"""The manifest of a finished conversion, from the plan and the digests of its tiles."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import yaml

from quantkit import __version__
from quantkit.recipe import Recipe
from quantkit.types import Plan, PlannedTensor
from quantkit.write.manifest import (
    Manifest,
    RecipeRecord,
    ShardRecord,
    SourceRecord,
    TensorRecord,
    tensor_digest,
)

_CALIBRATION = ("quantize.imatrix.", "quantkit.rounding")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a file was made from."""

    source_name: str
    source_fingerprint: str
    recipe: Recipe


def manifest_of(
    plan: Plan, digests: Mapping[tuple[int, int], bytes], provenance: Provenance
) -> Manifest:
    """The record of a plan whose tiles all have a digest; `digests` is (tensor, tile) -> sha256."""
    shards: list[list[TensorRecord]] = [[] for _ in plan.shards]
    for number, tensor in enumerate(plan.tensors):
        sha256 = tensor_digest(digests[number, tile] for tile in range(tensor.n_tiles))
        shards[tensor.shard].append(_tensor_record(tensor, sha256))
    recipe = provenance.recipe
    text = yaml.safe_dump(recipe.canonical(), sort_keys=False)
    return Manifest(
        quantkit_version=__version__,
        created=datetime.now(UTC),
        plan=plan.digest,
        source=SourceRecord(name=provenance.source_name, fingerprint=provenance.source_fingerprint),
        recipe=RecipeRecord(name=recipe.name, digest=recipe.digest(), text=text),
        calibration={key: kv.value for key, kv in plan.kvs.items() if key.startswith(_CALIBRATION)},
        shards=tuple(
            ShardRecord(
                file=shard.file,
                n_bytes=shard.n_bytes,
                header_sha256=hashlib.sha256(shard.header).hexdigest(),
                tensors=tuple(records),
            )
            for shard, records in zip(plan.shards, shards, strict=True)
        ),
    )


def _tensor_record(tensor: PlannedTensor, sha256: str) -> TensorRecord:
    return TensorRecord(
        name=tensor.spec.name,
        type=tensor.type.name,
        begin=tensor.begin,
        n_bytes=tensor.n_bytes,
        n_slabs=tensor.n_slabs,
        chunk_bytes=tensor.tile_rows * tensor.row_bytes,
        sha256=sha256,
        repacked=tensor.repack,
    )
