"""E2M1 codes, two a byte with the lower column in the low nibble, in groups with a scale.

* MXFP4: `w = e2m1 * 2^(s - 127)` in groups of 32. compressed-tensors' mxfp4-pack-quantized stores
  `X.weight_packed` U8 [rows, cols / 2] and `X.weight_scale` U8 [rows, cols / 32]; gpt-oss stores
  `X_blocks` U8 [experts, rows, cols / 32, 16] and `X_scales` U8 [experts, rows, cols / 32].
* NVFP4: `w = e2m1 * (s / g)` (compressed-tensors, `weight_global_scale` g) or `e2m1 * (s * g)`
  (ModelOpt, `weight_scale_2` g) in groups of 16, s in F8_E4M3, the scale rounded to f32 once.

E2M1 is 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from quantkit.source.formats.scheme import Scheme
from quantkit.source.formats.stored import (
    Bytes,
    Source,
    Tensors,
    Tile,
    as_floats,
    check_dtype,
    check_matrix,
    check_shape,
    contradiction,
    kernels,
    n_elements,
    nonfinite,
    part,
    read_elements,
    read_floats,
    unsupported,
)
from quantkit.types import TensorRef, Weight, WeightFormat

MX_GROUP = 32
_NV_GROUP = 16
_LARGEST = 6.0


@dataclass(frozen=True, slots=True)
class TensorScale:
    """The second scale of NVFP4: one for all rows, or one for every `matrix_rows` of them."""

    ref: TensorRef
    divides: bool
    matrix_rows: int


def group_packed(packed: TensorRef, tensors: Tensors, scheme: Scheme) -> Weight:
    """`X.weight_packed` in U8: compressed-tensors' MXFP4, or NVFP4 if it has a global scale."""
    base = packed.name.removesuffix("weight_packed")
    arguments = scheme.arguments(base.removesuffix("."))
    if arguments is None:
        raise unsupported(packed, "is packed in U8, but no config group says how")
    kind = (arguments.get("type"), arguments.get("num_bits"), arguments.get("symmetric", True))
    if kind != ("float", 4, True):
        raise unsupported(packed, f"is packed in U8 with (type, num_bits, symmetric) {kind!r:.80}")
    global_scale = tensors.get(f"{base}weight_global_scale")
    scale = part(packed, f"{base}weight_scale", tensors)
    size = MX_GROUP if global_scale is None else _NV_GROUP
    if arguments.get("group_size", size) != size:
        raise unsupported(packed, f"has groups of {str(arguments['group_size'])[:80]}, not {size}")
    shape = _expanded(packed, size)
    if global_scale is None:
        return _mxfp4(f"{base}weight", shape, packed, scale)
    return _nvfp4(f"{base}weight", shape, packed, scale, global_scale, divides=True)


def group_modelopt(ref: TensorRef, tensors: Tensors) -> Weight:
    """`X.weight` in U8 with `X.weight_scale` and `X.weight_scale_2`: ModelOpt's NVFP4."""
    scale = part(ref, f"{ref.name}_scale", tensors)
    tensor_scale = part(ref, f"{ref.name}_scale_2", tensors)
    shape = _expanded(ref, _NV_GROUP)
    return _nvfp4(ref.name, shape, ref, scale, tensor_scale, divides=False)


def group_blocks(blocks: TensorRef, tensors: Tensors) -> Weight:
    """`X_blocks` and `X_scales`: gpt-oss's experts, as the weight `X` [experts, rows, cols].

    Rows are outputs, as in every other format; the same experts stored plain have inputs there.
    """
    name = blocks.name.removesuffix("_blocks")
    scale = part(blocks, f"{name}_scales", tensors)
    if len(blocks.shape) < 3 or 0 in blocks.shape or blocks.shape[-1] != MX_GROUP // 2:
        raise contradiction(blocks, f"has the shape {list(blocks.shape)}, expected [..., 16]")
    *lead, n_groups, _ = blocks.shape
    check_shape(scale, blocks, (*lead, n_groups))
    check_dtype(scale, "U8", "F8_E8M0")
    shape = (*lead, MX_GROUP * n_groups)
    return Weight(name, WeightFormat.MXFP4, shape, blocks, scale)


def _expanded(packed: TensorRef, size: int) -> tuple[int, ...]:
    check_matrix(packed)
    *lead, n_bytes = packed.shape
    if 2 * n_bytes % size:
        raise unsupported(packed, f"has {2 * n_bytes} columns, not a multiple of {size}")
    return (*lead, 2 * n_bytes)


def _mxfp4(name: str, shape: tuple[int, ...], packed: TensorRef, scale: TensorRef) -> Weight:
    check_dtype(scale, "U8", "F8_E8M0")
    check_shape(scale, packed, (*shape[:-1], shape[-1] // MX_GROUP))
    return Weight(name, WeightFormat.MXFP4, shape, packed, scale)


def _nvfp4(
    name: str,
    shape: tuple[int, ...],
    packed: TensorRef,
    scale: TensorRef,
    tensor_scale: TensorRef,
    *,
    divides: bool,
) -> Weight:
    check_dtype(scale, "F8_E4M3")
    check_shape(scale, packed, (*shape[:-1], shape[-1] // _NV_GROUP))
    check_dtype(tensor_scale, "F32")
    lead = shape[:-2]
    check_shape(tensor_scale, packed, (), (1,), (1, 1), lead, (*lead, 1), (*lead, 1, 1))
    n_rows = prod(shape[:-1])
    second = TensorScale(tensor_scale, divides, n_rows // n_elements(tensor_scale))
    return Weight(name, WeightFormat.NVFP4, shape, packed, scale, second, (tensor_scale,))


def read(source: Source, weight: Weight, begin: int, end: int) -> Tile:
    """Rows as f32[rows, cols]; see `quantkit.source.packed.read_tile`."""
    size = MX_GROUP if weight.format is WeightFormat.MXFP4 else _NV_GROUP
    scales = _scales(source, weight, begin, end, weight.n_cols // size)
    tile = np.empty((end - begin, weight.n_cols), np.float32)
    kernels().expand_fp4(
        _codes(source, weight, begin, end).reshape(-1, size // 2),
        scales.ravel(),
        tile.reshape(-1, size),
    )
    return tile


def repack(source: Source, weight: Weight, begin: int, end: int) -> Bytes:
    """Rows of an MXFP4 weight as GGML's MXFP4 blocks, u8[rows, cols / 32 * 17]: same values."""
    n_groups = weight.n_cols // MX_GROUP
    exponents = _exponents(source, weight, begin, end)
    blocks = np.empty(((end - begin) * n_groups, 17), np.uint8)
    codes = _codes(source, weight, begin, end)
    kernels().repack_mxfp4(codes.view(np.uint32).reshape(-1, 4), exponents.ravel(), blocks)
    return blocks.reshape(end - begin, n_groups * 17)


def _codes(source: Source, weight: Weight, begin: int, end: int) -> Bytes:
    row_bytes = weight.n_cols // 2
    return read_elements(source, weight.data, begin * row_bytes, end * row_bytes)


def _exponents(source: Source, weight: Weight, begin: int, end: int) -> Bytes:
    """The exponents of MXFP4, none of which overflows f32."""
    n_groups = weight.n_cols // MX_GROUP
    scale = _scale(weight)
    exponents = read_elements(source, scale, begin * n_groups, end * n_groups)
    as_floats(scale, exponents, begin * n_groups, _LARGEST)
    return exponents


def _scales(source: Source, weight: Weight, begin: int, end: int, n_groups: int) -> Tile:
    scale, second = _scale(weight), weight.layout
    if not isinstance(second, TensorScale):
        return read_floats(source, scale, begin, end, n_groups, _LARGEST)
    scales = read_floats(source, scale, begin, end, n_groups)
    factors = read_floats(source, second.ref, 0, n_elements(second.ref), 1)
    factor_R = factors[np.arange(begin, end) // second.matrix_rows]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scales = scales / factor_R if second.divides else scales * factor_R
        sound = np.abs(scales) <= np.finfo(np.float32).max / np.float32(_LARGEST)
    if not sound.all():
        what = f"a scale that overflows f32 with {second.ref.name}"
        raise nonfinite(scale, ~sound.ravel(), begin * n_groups, what)
    return scales


def _scale(weight: Weight) -> TensorRef:
    if weight.scale is None:
        raise ValueError(f"{weight.name} has no scale")
    return weight.scale
