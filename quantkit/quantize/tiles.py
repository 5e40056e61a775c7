"""One tile from the checkpoint to the bytes that go into the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from quantkit.errors import NonFiniteError, QuantkitError
from quantkit.quantize.codec import Blocks, Codec, How, codec_of
from quantkit.quantize.gain import encode_rows
from quantkit.source.checkpoint import Checkpoint
from quantkit.source.packed import read_tile, repack_q4_0
from quantkit.source.slabs import read_slab
from quantkit.types import GgmlType, PlannedTensor, Slab


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
    """How tiles are encoded: columns that `importances` knows nothing of all count alike."""

    how: How
    importances: Importances | None = None
    codec_of: Callable[[GgmlType], Codec] = codec_of


def encode_tile(
    checkpoint: Checkpoint,
    tensors: tuple[PlannedTensor, ...],
    key: tuple[int, int],
    encoding: Encoding,
) -> EncodedTile:
    """Read, rearrange and encode tile `key` = (tensor, tile) of a plan's tensors."""
    planned = tensors[key[0]]
    slab, first, last = planned.tile(key[1])
    try:
        if planned.repack:
            blocks, n_inexact = _repacked(
                checkpoint, planned.spec.slabs[slab], first, last, encoding
            )
        else:
            x = read_slab(checkpoint, planned.spec, slab, first, last)
            weight = _importance_of(planned, slab, encoding.importances)
            codec = encoding.codec_of(planned.type)
            blocks, n_inexact = encode_rows(codec, x, weight, encoding.how), 0
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error.message} (for {planned.spec.name})", where=error.where, hint=error.hint
        ) from None
    if not blocks.flags.c_contiguous:
        raise QuantkitError(f"{planned.type.name}: encoder gave strided blocks")
    data = blocks.data.cast("B")
    return EncodedTile(*key, data, hashlib.sha256(data).digest(), n_inexact)


def _importance_of(
    planned: PlannedTensor, slab: int, importances: Importances | None
) -> npt.NDArray[np.float32] | None:
    rows = importances.get(planned.spec.name) if importances else None
    if rows is None:
        return None
    return np.asarray(rows[slab if len(rows) > 1 else 0])


def _repacked(
    checkpoint: Checkpoint, slab: Slab, first: int, last: int, encoding: Encoding
) -> tuple[Blocks, int]:
    """INT4 copied into Q4_0 blocks; blocks whose scale f16 cannot hold are encoded instead."""
    begin, end = slab.row_begin + first, slab.row_begin + last
    blocks, n_inexact, inexact = repack_q4_0(checkpoint, slab.weight, begin, end)
    if n_inexact:
        values = read_tile(checkpoint, slab.weight, begin, end)
        encoded = encoding.codec_of(GgmlType.Q4_0).encode(values, None, encoding.how)
        n_bytes = GgmlType.Q4_0.block_bytes
        blocks.reshape(-1, n_bytes)[inexact.ravel()] = encoded.reshape(-1, n_bytes)[inexact.ravel()]
    return blocks, n_inexact
