"""Rows of integer codes with what undoes them, whatever they were unpacked from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.source.formats.stored import (
    Bytes,
    Source,
    Tile,
    contradiction,
    kernels,
    n_elements,
    read_elements,
)
from quantkit.types import TensorRef

_BLOCK = 32  # weights in a block of Q4_0 and Q8_0


@dataclass(frozen=True, slots=True)
class Codes:
    """Rows of integers: u8[rows, cols], scales and zeros f32[rows, groups], columns' groups."""

    bits: int
    values: Bytes
    scales: Tile
    zeros: Tile
    group: int | npt.NDArray[np.int64]

    @property
    def largest(self) -> float:
        """No |u - z| is larger."""
        return float(1 << self.bits)


def expand(codes: Codes) -> Tile:
    """f32[rows, cols] of integer codes; one rounding, of the product."""
    tile = np.empty(codes.values.shape, np.float32)
    if isinstance(codes.group, int):
        kernels().expand_codes(codes.values, codes.zeros, codes.scales, codes.group, tile)
    else:
        kernels().expand_ordered(codes.values, codes.zeros, codes.scales, codes.group, tile)
    return tile


def blocks(codes: Codes) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Codes of 4 or 8 bits as Q4_0 or Q8_0, u8[rows, row bytes], and which blocks are not exact.

    A block is exact if its group is one, its zero point the middle, and its scale an f16. The
    bytes of the others are not valid.
    """
    n_rows, n_cols = codes.values.shape
    n_blocks = n_cols // _BLOCK
    block_bytes = 18 if codes.bits == 4 else 34
    out = np.empty((n_rows, n_blocks * block_bytes), np.uint8)
    inexact = np.ones((n_rows, n_blocks), np.bool_)
    if not isinstance(codes.group, int) or codes.group % _BLOCK:
        return out, inexact
    per_group = codes.group // _BLOCK
    scales = np.repeat(codes.scales, per_group, axis=1)
    pack = kernels().pack_q4_0 if codes.bits == 4 else kernels().pack_q8_0
    pack(
        codes.values.reshape(-1, _BLOCK),
        scales.view(np.uint32).ravel(),
        out.reshape(-1, block_bytes),
        inexact.ravel(),
    )
    middle = 1 << codes.bits - 1
    return out, inexact | np.repeat(codes.zeros != middle, per_group, axis=1)


def read_order(source: Source, order: TensorRef, n_groups: int) -> npt.NDArray[np.int64] | None:
    """The group of each column; None where it was never set (compressed-tensors writes -1)."""
    groups = read_elements(source, order, 0, n_elements(order))
    groups = groups.view(np.int32 if order.dtype == "I32" else np.int64).astype(np.int64)
    if (groups == -1).all():
        return None
    bad = (groups < 0) | (groups >= n_groups)
    if bad.any():
        column = int(bad.argmax())
        raise contradiction(
            order, f"puts column {column} into group {groups[column]} of {n_groups}"
        )
    return groups
