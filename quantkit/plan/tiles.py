"""How a tensor is cut into tiles, the unit of work, of memory and of resuming."""

from __future__ import annotations

from quantkit.types import SlabOp, TensorSpec

# Weights per tile: 8 MiB as f32. Enough that Python's share of a tile (about 0.2 ms) vanishes,
# small enough that 64 threads stay within 2 GiB.
TILE_WEIGHTS = 2 << 20


def slab_rows(spec: TensorSpec) -> int:
    """Output rows of each of the tensor's slabs; all slabs of a tensor have the same number."""
    if not spec.slabs:
        return spec.grid[0]
    slab = spec.slabs[0]
    n_rows = slab.row_end - slab.row_begin
    match slab.op:
        case SlabOp.TRANSPOSE:
            return slab.weight.n_cols
        case SlabOp.EVEN_COLUMNS_AS_ROWS | SlabOp.ODD_COLUMNS_AS_ROWS:
            return slab.weight.n_cols // 2
        case SlabOp.EVEN_ROWS | SlabOp.ODD_ROWS:
            return n_rows // 2
        case _:
            return n_rows


def tile_rows(spec: TensorSpec) -> int:
    """Rows per tile. A slab whose rows are rearranged is one tile."""
    n_rows = slab_rows(spec)
    if any(slab.op is not SlabOp.COPY for slab in spec.slabs):
        return n_rows
    return max(1, min(n_rows, TILE_WEIGHTS // spec.grid[1]))
