"""Weights that are stored as they are: F32, F16, BF16."""

from __future__ import annotations

from quantkit.source.formats.stored import Source, Tile, as_floats, read_rows
from quantkit.types import Weight, WeightFormat

FORMATS = {"F32": WeightFormat.F32, "F16": WeightFormat.F16, "BF16": WeightFormat.BF16}


def read(source: Source, weight: Weight, begin: int, end: int) -> Tile:
    """Rows as f32[rows, cols]; see `quantkit.source.packed.read_tile`."""
    ref = weight.data
    stored = read_rows(source, ref, begin, end)
    return as_floats(ref, stored, begin * stored.shape[1])
