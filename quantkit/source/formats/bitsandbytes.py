"""bitsandbytes: NF4 and FP4 with blocks that run on over rows, and LLM.int8.

* 4 bits: `X.weight` U8 [n / 2, 1], two codes a byte with the *first in the high nibble*;
  `w[i] = map[u[i]] * absmax[i // blocksize]` over the flattened weight. With nested quantisation
  absmax is U8: `absmax[b] = nested_map[a[b]] * nested_absmax[b // nested_blocksize] + offset`.
  Shape and block sizes are JSON in the bytes of `X.weight.quant_state.bitsandbytes__nf4`.
* 8 bits: `X.weight` I8 and `X.SCB` F32 [rows]; `w[r, c] = (q[r, c] * SCB[r]) * (1 / 127)`,
  rounded after each product as bitsandbytes does.

The levels are the library's own tables; a checkpoint that stores others is refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.source.formats.codes import Codes, expand
from quantkit.source.formats.stored import (
    Reader,
    Source,
    Tensors,
    Tile,
    check_dtype,
    check_matrix,
    check_shape,
    contradiction,
    is_size,
    kernels,
    n_elements,
    nonfinite,
    part,
    read_elements,
    read_floats,
    read_rows,
    unsupported,
)
from quantkit.types import TensorRef, Weight, WeightFormat

_MAX_STATE_BYTES = 4096
_MAX_BLOCK = 1 << 16
_MAX_OFFSET = 3e38  # nearly all of f32, and neither NaN nor infinity
_STATE = ".quant_state.bitsandbytes__"
# Quantiles of the normal distribution (QLoRA, appendix E) and E2M1 over 12 with the library's own
# second level, both as f32.
_LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
        -0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
    ),
}  # fmt: skip
_LARGEST_INT8 = 128.0
_PER_127 = np.float32(1 / 127)


@dataclass(frozen=True, slots=True)
class Nested:
    """Block scales that are codes themselves."""

    block: int
    offset: float
    levels: TensorRef
    scale: TensorRef


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of codes in a flattened weight; `levels` is the map that the checkpoint stores."""

    kind: str
    block: int
    levels: TensorRef
    nested: Nested | None = None


def group_4bit(ref: TensorRef, tensors: Tensors, read: Reader | None) -> Weight:
    """`X.weight` in U8 and the state beside it as the weight `X.weight`."""
    kind = next((k for k in _LEVELS if f"{ref.name}{_STATE}{k}" in tensors), None)
    if kind is None or read is None:
        raise unsupported(ref, f"is stored with bitsandbytes, but has no {_STATE[1:]}nf4 or fp4")
    state_ref = tensors[f"{ref.name}{_STATE}{kind}"]
    state = _state(state_ref, kind, read)
    shape = _shape(state_ref, state)
    n_weights = math.prod(shape)
    if n_elements(ref) != -(-n_weights // 2):
        raise contradiction(ref, f"has {n_elements(ref)} bytes for {list(shape)} weights")
    absmax = part(ref, f"{ref.name}.absmax", tensors)
    levels = part(ref, f"{ref.name}.quant_map", tensors)
    block = _block(state_ref, state, "blocksize")
    n_blocks = -(-n_weights // block)
    check_shape(absmax, ref, (n_blocks,), (n_blocks, 1))
    check_shape(levels, ref, (16,))
    check_dtype(levels, "F32")
    nested = None
    if absmax.dtype == "U8":
        nested = _nested(ref, state_ref, state, n_blocks, tensors)
    else:
        check_dtype(absmax, "F32")
    layout = Blocks(kind, block, levels, nested)
    others = [levels, state_ref, *((nested.levels, nested.scale) if nested else ())]
    return Weight(ref.name, WeightFormat.BNB_4BIT, shape, ref, absmax, layout, tuple(others))


def _state(ref: TensorRef, kind: str, read: Reader) -> dict[str, Any]:
    check_dtype(ref, "U8")
    if ref.n_bytes > _MAX_STATE_BYTES:
        raise contradiction(ref, f"holds {ref.n_bytes:,} bytes, at most {_MAX_STATE_BYTES:,} do")
    try:
        state = json.loads(read(ref, 0, ref.n_bytes).tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise contradiction(ref, f"is no JSON: {str(error)[:80]}") from None
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        raise contradiction(ref, f"does not say quant_type {kind}")
    return state


def _shape(ref: TensorRef, state: dict[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or not 2 <= len(shape) <= 4 or not all(map(is_size, shape)):
        raise contradiction(ref, f"gives the shape {str(shape)[:80]}")
    return tuple(shape)


def _block(ref: TensorRef, state: dict[str, Any], key: str) -> int:
    block = state.get(key)
    if not is_size(block) or block > _MAX_BLOCK:
        raise contradiction(ref, f"gives {key} {str(block)[:80]}, expected 1 to {_MAX_BLOCK}")
    return block


def _nested(
    ref: TensorRef, state_ref: TensorRef, state: dict[str, Any], n_blocks: int, tensors: Tensors
) -> Nested:
    block = _block(state_ref, state, "nested_blocksize")
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or not abs(offset) < _MAX_OFFSET:
        raise contradiction(state_ref, f"gives nested_offset {str(offset)[:80]}")
    levels = part(ref, f"{ref.name}.nested_quant_map", tensors)
    scale = part(ref, f"{ref.name}.nested_absmax", tensors)
    check_dtype(levels, "F32")
    check_shape(levels, ref, (256,))
    check_dtype(scale, "F32")
    check_shape(scale, ref, (-(-n_blocks // block),))
    return Nested(block, float(offset), levels, scale)


def group_int8(ref: TensorRef, tensors: Tensors) -> Weight:
    """`X.weight` in I8 and `X.SCB` as the weight `X.weight`."""
    base = ref.name.removesuffix("weight")
    scale = part(ref, f"{base}SCB", tensors)
    check_matrix(ref)
    check_dtype(scale, "F32")
    check_shape(scale, ref, ref.shape[:-1], (*ref.shape[:-1], 1))
    order = tensors.get(f"{base}weight_format")
    if order is not None:
        check_dtype(order, "U8", "I8")
        check_shape(order, ref, (), (1,))
    others = () if order is None else (order,)
    return Weight(ref.name, WeightFormat.INT8, ref.shape, ref, scale, None, others)


def read_4bit(source: Source, weight: Weight, begin: int, end: int) -> Tile:
    """Rows as f32[rows, cols]; see `quantkit.source.packed.read_tile`."""
    layout, absmax = weight.layout, weight.scale
    if not isinstance(layout, Blocks) or absmax is None:
        raise ValueError(f"{weight.name} is not of bitsandbytes")
    levels = np.array(_LEVELS[layout.kind], np.float32)
    stored = read_floats(source, layout.levels, 0, 1, 16)[0]
    if np.abs(stored - levels).max() > 1e-6:
        raise unsupported(layout.levels, f"holds other levels than {layout.kind}")
    first, last = begin * weight.n_cols, end * weight.n_cols
    tile = np.empty((end - begin, weight.n_cols), np.float32)
    if first == last:
        return tile
    first_block, end_block = first // layout.block, -(-last // layout.block)
    scales = _absmax(source, layout, absmax, first_block, end_block)
    packed = read_elements(source, weight.data, first // 2, -(-last // 2))
    kernels().expand_levels(
        packed, first % 2, levels, scales, first - first_block * layout.block, layout.block,
        tile.ravel(),
    )  # fmt: skip
    return tile


def _absmax(source: Source, layout: Blocks, absmax: TensorRef, begin: int, end: int) -> Tile:
    """Scales of blocks `begin .. end`, f32."""
    nested = layout.nested
    if nested is None:
        return read_floats(source, absmax, begin, end, 1).ravel()
    codes = read_elements(source, absmax, begin, end)
    levels = read_floats(source, nested.levels, 0, 256, 1).ravel()
    first, last = begin // nested.block, -(-end // nested.block)
    scale = read_floats(source, nested.scale, first, last, 1, 4.0).ravel()
    with np.errstate(over="ignore"):
        scales = levels[codes] * scale[np.arange(begin, end) // nested.block - first]
        scales = np.asarray(scales + np.float32(nested.offset), np.float32)
    if not np.isfinite(scales).all():
        raise nonfinite(absmax, ~np.isfinite(scales), begin, "a scale that overflows f32")
    return scales


def read_int8(source: Source, weight: Weight, begin: int, end: int) -> Tile:
    """Rows as f32[rows, cols]; see `quantkit.source.packed.read_tile`."""
    if weight.scale is None:
        raise ValueError(f"{weight.name} has no scale")
    for order in weight.others:
        if read_elements(source, order, 0, n_elements(order)).any():
            raise unsupported(order, "says that the weight is not stored row by row")
    codes = np.bitwise_xor(read_rows(source, weight.data, begin, end), np.uint8(0x80))
    scale = read_floats(source, weight.scale, begin, end, 1, _LARGEST_INT8)
    zero = np.full(scale.shape, 128, np.float32)
    tile = expand(Codes(8, codes, scale, zero, weight.n_cols))
    tile *= _PER_127
    return tile
