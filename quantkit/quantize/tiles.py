"""One tile from the source to the bytes that go into the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from quantkit.errors import NonFiniteError, QuantkitError
from quantkit.quantize import check_finite
from quantkit.quantize.codec import Blocks, Codec, How, Tile, codec_of
from quantkit.quantize.gain import RAISED, encode_rows
from quantkit.source.checkpoint import Checkpoint
from quantkit.source.gguf import GgufSource
from quantkit.source.packed import repack
from quantkit.source.slabs import read_slab, rearranged
from quantkit.types import GgmlType, PlannedTensor, SlabOp, WeightFormat

Source = Checkpoint | GgufSource


@dataclass(frozen=True, slots=True)
class EncodedTile:
    """The bytes of one tile, their sha256, and how many of its blocks could not be repacked."""

    tensor: int
    tile: int
    data: memoryview
    digest: bytes
    n_inexact: int = 0


class Importances(Protocol):
    """What is known of tensors' columns."""

    def get(self, name: str) -> npt.NDArray[np.float32] | None:
        """f32[m, cols], a row for each expert or head, or one for all; None for nothing."""


@dataclass(frozen=True)
class Encoding:
    """How tiles are encoded: columns that `importances` knows nothing of all count alike.

    A tile is made in strips of about `strip_weights`, which bound its memory and leave no trace in
    its bytes; None takes it whole.
    """

    how: How
    importances: Importances | None = None
    codec_of: Callable[[GgmlType], Codec] = codec_of
    strip_weights: int | None = None


def encode_tile(
    source: Source,
    tensors: tuple[PlannedTensor, ...],
    key: tuple[int, int],
    encoding: Encoding,
) -> EncodedTile:
    """Read, rearrange and encode tile `key` = (tensor, tile) of a plan's tensors."""
    planned = tensors[key[0]]
    slab, first, last = planned.tile(key[1])
    strips = list(_strips(planned, first, last, encoding.strip_weights))
    try:
        if len(strips) == 1:
            blocks, n_inexact = _blocks(source, planned, (slab, first, last), encoding)
        else:
            blocks, n_inexact = np.empty((last - first, planned.row_bytes), np.uint8), 0
            for begin, end in strips:
                strip, n = _blocks(source, planned, (slab, begin, end), encoding)
                blocks[begin - first : end - first] = strip
                n_inexact += n
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error.message} (for {planned.spec.name})", where=error.where, hint=error.hint
        ) from None
    if not blocks.flags.c_contiguous:
        raise QuantkitError(f"{planned.type.name}: encoder gave strided blocks")
    data = blocks.data.cast("B")
    return EncodedTile(*key, data, hashlib.sha256(data).digest(), n_inexact)


def tile_bytes(planned: PlannedTensor, how: How, strip_weights: int | None = None) -> int:
    """Most memory that making one of the tensor's tiles takes, what it ends in included.

    Rows as they are stored and as f32, what the encoder needs beside them, and the blocks. Measured
    (tests/quantize/test_tile_memory.py), and a bound: some types need less.
    """
    n_cols = planned.spec.grid[1]
    rows = min(planned.tile_rows, planned.slab_rows)
    made = rows * planned.row_bytes
    begin, end = next(_strips(planned, 0, rows, strip_weights))
    n = (end - begin) * n_cols
    strip = (end - begin) * planned.row_bytes if end < rows else 0  # a whole tile is not copied
    stored = _stored_bytes(planned, n)
    if planned.repack:
        working = stored + strip
    else:
        working = 4 * n + max(stored, int(n * _extra(planned.type, how)) + strip)
    return made + working + _MARGIN


_MARGIN = 1 << 20  # importances, scales, Python's own objects


def _stored_bytes(planned: PlannedTensor, n_weights: int) -> int:
    """Of `n_weights` weights as they are stored, and of what stands between them and f32."""
    slabs = planned.spec.slabs
    if not slabs:
        return 0
    weight, op = slabs[0].weight, slabs[0].op
    stored = -(-n_weights * weight.n_bytes // max(1, weight.n_rows * weight.n_cols))
    if op is not SlabOp.COPY:  # all of a slab, of which every other row or column may be chosen
        stored = 2 * stored + 8 * n_weights
    plain = (WeightFormat.F32, WeightFormat.F16, WeightFormat.BF16, WeightFormat.INT4_G32)
    return stored if weight.format in plain else stored + 8 * n_weights


def _extra(type_: GgmlType, how: How) -> float:
    """Bytes per weight that an encoder needs beside rows and blocks."""
    if type_.block_size == 1:
        return 0.0
    if how.gain and type_ in RAISED:
        return 13.2
    return 1.5 if how.weighting == "importance" else 8.5


def _strips(
    planned: PlannedTensor, first: int, last: int, n_weights: int | None
) -> Iterator[tuple[int, int]]:
    """Row ranges of a tile; rows that are rearranged are read as a whole slab, and stay one."""
    n_rows = last - first
    if n_weights is not None and all(slab.op is SlabOp.COPY for slab in planned.spec.slabs):
        n_rows = max(1, min(n_rows, n_weights // planned.spec.grid[1]))
    for begin in range(first, last, n_rows):
        yield begin, min(begin + n_rows, last)


def _blocks(
    source: Source, planned: PlannedTensor, tile: tuple[int, int, int], encoding: Encoding
) -> tuple[Blocks, int]:
    """Rows of a slab, encoded, and how many blocks could not be repacked."""
    slab, first, last = tile
    if not planned.repack:
        x = _read(source, planned, slab, first, last)
        weight = _importance_of(planned, slab, encoding.importances)
        return encode_rows(encoding.codec_of(planned.type), x, weight, encoding.how), 0
    if isinstance(source, GgufSource):
        return source.read_blocks(planned.spec, slab, first, last), 0
    return _repacked(source, planned, tile, encoding)


def _read(source: Source, planned: PlannedTensor, slab: int, first: int, last: int) -> Tile:
    if not isinstance(source, GgufSource):
        return read_slab(source, planned.spec, slab, first, last)
    stored = source.read_blocks(planned.spec, slab, first, last)
    ref = planned.spec.slabs[slab].weight.data
    x = codec_of(GgmlType[ref.dtype]).decode(stored)
    check_finite(x, where=f"{ref.file}: {ref.name}, tile from row {first}")
    return x


def _importance_of(
    planned: PlannedTensor, slab: int, importances: Importances | None
) -> npt.NDArray[np.float32] | None:
    rows = importances.get(planned.spec.name) if importances else None
    if rows is None:
        return None
    return np.asarray(rows[slab if len(rows) > 1 else 0])


def _repacked(
    checkpoint: Checkpoint, planned: PlannedTensor, tile: tuple[int, int, int], encoding: Encoding
) -> tuple[Blocks, int]:
    """Codes copied into blocks of the type that has the same levels, in the slab's order of rows.

    Blocks that it cannot hold exactly, such as one whose scale is no f16, are encoded instead.
    """
    number, first, last = tile
    slab = planned.spec.slabs[number]
    begin = slab.row_begin
    if slab.op is SlabOp.COPY:
        blocks, inexact = repack(checkpoint, slab.weight, begin + first, begin + last)
    else:
        blocks, inexact = repack(checkpoint, slab.weight, begin, slab.row_end)
        blocks = np.ascontiguousarray(rearranged(blocks, slab.op)[first:last])
        inexact = rearranged(inexact, slab.op)[first:last]
    n_inexact = int(inexact.sum())
    if n_inexact:
        values = read_slab(checkpoint, planned.spec, number, first, last)
        encoded = encoding.codec_of(planned.type).encode(values, None, encoding.how)
        n_bytes = planned.type.block_bytes
        blocks.reshape(-1, n_bytes)[inexact.ravel()] = encoded.reshape(-1, n_bytes)[inexact.ravel()]
    return blocks, n_inexact
