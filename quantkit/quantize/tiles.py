"""One tile from the checkpoint to the bytes that go into the file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from quantkit.errors import NonFiniteError, QuantkitError
from quantkit.quantize.codec import Blocks, How, Tile, codec_of
from quantkit.source.checkpoint import Checkpoint
from quantkit.source.packed import read_tile, repack_q4_0
from quantkit.types import GgmlType, PlannedTensor, Slab, SlabOp


@dataclass(frozen=True, slots=True)
class EncodedTile:
    """The bytes of one tile, their sha256, and how many of its blocks could not be repacked."""

    tensor: int
    tile: int
    data: memoryview
    digest: bytes
    n_inexact: int = 0


def encode_tile(
    checkpoint: Checkpoint, tensors: tuple[PlannedTensor, ...], key: tuple[int, int], how: How
) -> EncodedTile:
    """Read, rearrange and encode tile `key` = (tensor, tile) of a plan's tensors."""
    planned = tensors[key[0]]
    slab, first, last = planned.tile(key[1])
    try:
        if planned.repack:
            blocks, n_inexact = _repacked(checkpoint, planned.spec.slabs[slab], first, last, how)
        else:
            x = _values(checkpoint, planned, slab, first, last)
            blocks, n_inexact = codec_of(planned.type).encode(x, None, how), 0
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error.message} (for {planned.spec.name})", where=error.where, hint=error.hint
        ) from None
    if not blocks.flags.c_contiguous:
        raise QuantkitError(f"{planned.type.name}: encoder gave strided blocks")
    data = blocks.data.cast("B")
    return EncodedTile(*key, data, hashlib.sha256(data).digest(), n_inexact)


def _values(
    checkpoint: Checkpoint, planned: PlannedTensor, slab: int, first: int, last: int
) -> Tile:
    """f32[rows, cols] of a tile, in the order of the GGUF tensor."""
    spec = planned.spec
    if spec.constant:
        return np.array(spec.constant, np.float32).reshape(spec.grid)
    source = spec.slabs[slab]
    if source.op is SlabOp.COPY:
        return _rows(checkpoint, source, source.row_begin + first, source.row_begin + last)
    return rearranged(_rows(checkpoint, source, source.row_begin, source.row_end), source.op)


def _rows(checkpoint: Checkpoint, slab: Slab, begin: int, end: int) -> Tile:
    if len(slab.weight.shape) == 1:  # a vector's rows are its elements
        return read_tile(checkpoint, slab.weight, 0, 1)[0, begin:end, np.newaxis]
    return read_tile(checkpoint, slab.weight, begin, end)


def rearranged(x: Tile, op: SlabOp) -> Tile:
    """The rows of a slab in the order that llama.cpp wants; see `SlabOp`."""
    n_rows, n_cols = x.shape
    if op is SlabOp.TRANSPOSE:
        return np.ascontiguousarray(x.T)
    if op is SlabOp.INTERLEAVE:
        return x.reshape(2, n_rows // 2, n_cols).swapaxes(0, 1).reshape(n_rows, n_cols)
    if op is SlabOp.SPLIT_2D:
        return x.reshape(n_rows // 4, 2, 2, n_cols).swapaxes(0, 1).reshape(n_rows, n_cols)
    return x


def _repacked(
    checkpoint: Checkpoint, slab: Slab, first: int, last: int, how: How
) -> tuple[Blocks, int]:
    """INT4 copied into Q4_0 blocks; blocks whose scale f16 cannot hold are encoded instead."""
    begin, end = slab.row_begin + first, slab.row_begin + last
    blocks, n_inexact, inexact = repack_q4_0(checkpoint, slab.weight, begin, end)
    if n_inexact:
        values = read_tile(checkpoint, slab.weight, begin, end)
        encoded = codec_of(GgmlType.Q4_0).encode(values, None, how)
        n_bytes = GgmlType.Q4_0.block_bytes
        blocks.reshape(-1, n_bytes)[inexact.ravel()] = encoded.reshape(-1, n_bytes)[inexact.ravel()]
    return blocks, n_inexact
