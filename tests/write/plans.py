"""A plan without a model: tensors of F32 rows in a few shards."""

from __future__ import annotations

import hashlib

from quantkit.types import GgmlType, Plan, PlannedShard, PlannedTensor, TensorSpec

HEADER = b"header".ljust(64, b".")


def small_plan(n_shards: int = 2, n_tensors: int = 2, n_tiles: int = 8, cols: int = 64) -> Plan:
    """`n_tensors` in each shard, each of `n_tiles` tiles of two rows; the last has one."""
    n_rows = 2 * n_tiles - 1
    n_bytes = 4 * cols * n_rows
    tensors = tuple(
        PlannedTensor(
            TensorSpec(f"t{shard}.{n}", "ffn_up", 0, (n_rows, cols), constant=(0.0,)),
            GgmlType.F32,
            GgmlType.F32,
            repack=False,
            shard=shard,
            begin=len(HEADER) + n * n_bytes,
            n_bytes=n_bytes,
            slab_rows=n_rows,
            tile_rows=2,
        )
        for shard in range(n_shards)
        for n in range(n_tensors)
    )
    size = len(HEADER) + n_tensors * n_bytes
    shards = tuple(PlannedShard(f"m-{n}.gguf", size, HEADER) for n in range(n_shards))
    digest = hashlib.sha256(repr(tensors).encode()).hexdigest()
    return Plan("m", "llama", "r", tensors, shards, {}, digest)


def content(plan: Plan, tensor: int, tile: int) -> bytes:
    """What a tile holds."""
    _, first, last = plan.tensors[tensor].tile(tile)
    return bytes([1 + tensor, 1 + tile]) * ((last - first) * plan.tensors[tensor].row_bytes // 2)


def keys(plan: Plan) -> list[tuple[int, int]]:
    """(tensor, tile) of all tiles."""
    return [(n, k) for n, tensor in enumerate(plan.tensors) for k in range(tensor.n_tiles)]


def digest_of(data: bytes) -> bytes:
    """sha256."""
    return hashlib.sha256(data).digest()
