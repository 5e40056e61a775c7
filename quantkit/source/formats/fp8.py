"""F8_E4M3 codes with multipliers: `w[r, c] = fp8[r, c] * scale[r // block_rows, c // block_cols]`.

`X_scale_inv` (DeepSeek) and `X_scale` (compressed-tensors float-quantized and mxfp8-quantized,
ModelOpt, FBGEMM) both multiply. One multiplier may hold for a block, a row, a group within a row,
or all of a matrix; blocks at the right and lower edges are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.source.formats.scheme import Scheme
from quantkit.source.formats.stored import (
    Source,
    Tensors,
    Tile,
    check_matrix,
    check_scale,
    check_shape,
    is_size,
    kernels,
    n_elements,
    nonfinite,
    read_floats,
    read_rows,
    unsupported,
)
from quantkit.types import TensorRef, Weight, WeightFormat

_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Grid:
    """How multipliers lie over rows and columns; every `matrix_rows` rows a new grid begins."""

    matrix_rows: int
    block_rows: int
    block_cols: int


def block_shape(scheme: Scheme) -> tuple[int, int]:
    """Rows and columns that share an FP8 multiplier; [128, 128] unless the config differs."""
    return _sizes(scheme.get("weight_block_size") or [128, 128], "weight_block_size", scheme)


def _sizes(block: Any, key: str, scheme: Scheme) -> tuple[int, int]:
    if not isinstance(block, list) or len(block) != 2 or not all(is_size(n) for n in block):
        raise scheme.fault(f"{key} is {str(block)[:80]}, expected two positive integers")
    return block[0], block[1]


def group(ref: TensorRef, tensors: Tensors, scheme: Scheme) -> Weight:
    """The FP8 or FP8_BLOCK weight that an F8_E4M3 tensor and its multipliers make up."""
    scale = tensors.get(f"{ref.name}_scale_inv") or tensors.get(f"{ref.name}_scale")
    if scale is None:
        raise unsupported(ref, "is F8_E4M3 without a weight_scale or weight_scale_inv")
    check_matrix(ref)
    _check_dtypes(ref, scale, scheme)
    block = _declared_block(ref, scale, scheme)
    if block is None:
        return Weight(
            ref.name, WeightFormat.FP8, ref.shape, ref, scale, _by_shape(ref, scale, scheme)
        )
    *lead, n_rows, n_cols = ref.shape
    check_shape(scale, ref, (*lead, -(-n_rows // block[0]), -(-n_cols // block[1])))
    return Weight(ref.name, WeightFormat.FP8_BLOCK, ref.shape, ref, scale, Grid(n_rows, *block))


def _arguments(ref: TensorRef, scale: TensorRef, scheme: Scheme) -> dict[str, Any]:
    """What compressed-tensors says, which never stores an inverse."""
    if scale.name.endswith("_scale_inv"):
        return {}
    return scheme.arguments(ref.name.removesuffix(".weight")) or {}


def _check_dtypes(ref: TensorRef, scale: TensorRef, scheme: Scheme) -> None:
    arguments = _arguments(ref, scale, scheme)
    if arguments and (arguments.get("type"), arguments.get("num_bits")) != ("float", 8):
        kind = f"{arguments.get('num_bits')}-bit {arguments.get('type')}"
        raise unsupported(ref, f"is F8_E4M3, its config group says {kind[:80]}")
    if arguments.get("strategy") == "group" and scale.dtype == "U8":
        return  # the exponents of mxfp8-quantized
    if scale.dtype != "F8_E8M0":
        check_scale(scale)


def _declared_block(ref: TensorRef, scale: TensorRef, scheme: Scheme) -> tuple[int, int] | None:
    """The block that the scheme declares, if it does, or that `weight_scale_inv` implies."""
    arguments = _arguments(ref, scale, scheme)
    match arguments.get("strategy"):
        case "block":
            return _sizes(arguments.get("block_structure"), "block_structure", scheme)
        case None if scale.name.endswith("_scale_inv"):
            by_tensor = scheme.get("weight_block_size", 0) is None and n_elements(scale) == 1
            return None if by_tensor else block_shape(scheme)
        case None if scheme.get("weight_block_size"):
            return block_shape(scheme)
    return None


def _by_shape(ref: TensorRef, scale: TensorRef, scheme: Scheme) -> Grid:
    """A multiplier per group, row, matrix or tensor; their shapes cannot be mistaken."""
    arguments = _arguments(ref, scale, scheme)
    *lead, n_rows, n_cols = ref.shape
    all_rows = n_elements(ref) // n_cols
    rows = [(*lead, n_rows, 1), (*lead, n_rows)]
    matrices = [(*lead,), (*lead, 1), (*lead, 1, 1)] if lead else []
    ones = [(), (1,), (1,) * len(ref.shape)]
    match arguments.get("strategy"):
        case "group":
            size = arguments.get("group_size")
            if not is_size(size) or n_cols % size:
                raise unsupported(ref, f"has {n_cols} columns in groups of {str(size)[:80]}")
            check_shape(scale, ref, (*lead, n_rows, n_cols // size))
            return Grid(n_rows, 1, size)
        case "channel":
            check_shape(scale, ref, *rows)
        case "tensor":
            check_shape(scale, ref, *ones, *matrices)
        case None:
            check_shape(scale, ref, *rows, *ones, *matrices)
        case strategy:
            raise unsupported(ref, f"has FP8 multipliers by {str(strategy)[:80]}")
    if scale.shape in ones:
        return Grid(all_rows, all_rows, n_cols)
    if scale.shape in matrices:
        return Grid(n_rows, n_rows, n_cols)
    return Grid(n_rows, 1, n_cols)


def read(source: Source, weight: Weight, begin: int, end: int) -> Tile:
    """Rows as f32[rows, cols]; see `quantkit.source.packed.read_tile`."""
    grid, scale = weight.layout, weight.scale
    if not isinstance(grid, Grid) or scale is None:
        raise ValueError(f"{weight.name} has no multipliers")
    tile = np.empty((end - begin, weight.n_cols), np.float32)
    if begin == end:
        return tile
    matrix, row = np.divmod(np.arange(begin, end), grid.matrix_rows)
    scale_rows = matrix * -(-grid.matrix_rows // grid.block_rows) + row // grid.block_rows
    first, last = int(scale_rows[0]), int(scale_rows[-1])
    n_across = -(-weight.n_cols // grid.block_cols)
    scales = read_floats(source, scale, first, last + 1, n_across, _LARGEST)
    codes = read_rows(source, weight.data, begin, end)
    sound = kernels().expand_fp8(codes, scales, scale_rows - first, grid.block_cols, tile)
    if not sound:
        raise nonfinite(weight.data, (codes & 0x7F).ravel() == 0x7F, begin * weight.n_cols, "NaN")
    return tile
