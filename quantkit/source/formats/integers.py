"""Integers with a scale and a zero point: `w[r, c] = (u[r, c] - z[r, g]) * scale[r, g]`, in f32.

g is the group of column c: `c // group_size`, or `g_idx[c]` where columns were quantised in the
order of their activations. compressed-tensors stores

* pack-quantized: `X.weight_packed` I32, codes u of b bits one after the other from the lowest bit
  of the first word on (all widths, so that words may share a code), 2^(b-1) standing for 0;
  `weight_scale`, `weight_shape`, and, if asymmetric, `weight_zero_point`, packed down the rows;
* int-quantized: `X.weight` I8, `weight_scale`, and `weight_zero_point` I8.

Symmetric INT4 in groups of 32, Kimi's format, has kernels of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.source.formats.codes import Codes, expand, read_order
from quantkit.source.formats.scheme import Scheme
from quantkit.source.formats.stored import (
    Source,
    Tensors,
    Tile,
    check_dtype,
    check_matrix,
    check_scale,
    check_shape,
    contradiction,
    is_size,
    kernels,
    part,
    read_elements,
    read_floats,
    read_rows,
    unsupported,
)
from quantkit.types import TensorRef, Weight, WeightFormat


@dataclass(frozen=True, slots=True)
class Integers:
    """How the integers of a weight lie, and what undoes them.

    `scale_rows` is false where one scale holds for the whole tensor. `zero` is packed down the
    rows of each matrix of `matrix_rows` where the codes are packed.
    """

    bits: int
    group_size: int
    matrix_rows: int
    scale_rows: bool = True
    zero: TensorRef | None = None
    order: TensorRef | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scales are all that there is to undo: no zero points, no order of columns."""
        return self.zero is None and self.order is None


def group_packed(packed: TensorRef, tensors: Tensors, scheme: Scheme) -> Weight:
    """`X.weight_packed` in I32 and its companions as the weight `X.weight`."""
    base = packed.name.removesuffix("weight_packed")
    arguments = scheme.arguments(base.removesuffix("."))
    if arguments is None:
        raise unsupported(packed, "is packed, but no config group of compressed-tensors says how")
    bits = _bits(packed, arguments)
    scale = part(packed, f"{base}weight_scale", tensors)
    stored_shape = part(packed, f"{base}weight_shape", tensors)
    check_scale(scale)
    check_matrix(packed)
    *lead, n_words = packed.shape
    size = _group_size(packed, arguments)
    n_cols = scale.shape[-1] * size if size and scale.shape else n_words * 32 // bits
    if -(-n_cols * bits // 32) != n_words or n_cols == 0:
        raise contradiction(
            scale,
            f"has the shape {list(scale.shape)}: groups of {size} columns of {bits} bits do not "
            f"fill {packed.name} {list(packed.shape)}",
        )
    shape = (*lead, n_cols)
    check_shape(stored_shape, packed, (len(shape),))
    check_dtype(stored_shape, "I32", "I64")
    layout = _layout(packed, shape, arguments, tensors, bits, size or n_cols)
    _check_scale_shape(scale, packed, shape, layout)
    if bits == 4 and layout == Integers(4, 32, shape[-2]):
        return Weight(f"{base}weight", WeightFormat.INT4_G32, shape, packed, scale)
    return _weight(f"{base}weight", shape, packed, scale, layout)


def group_plain(ref: TensorRef, tensors: Tensors, scheme: Scheme) -> Weight:
    """`X.weight` in I8 with `X.weight_scale`: int-quantized."""
    scale = part(ref, f"{ref.name}_scale", tensors)
    arguments = scheme.arguments(ref.name.removesuffix(".weight"))
    if arguments is None:
        raise unsupported(ref, "is I8, but no config group of compressed-tensors says how")
    if _bits(ref, arguments) != 8:
        raise unsupported(ref, f"is I8 with num_bits {str(arguments['num_bits'])[:80]}")
    check_matrix(ref)
    check_scale(scale)
    size = _group_size(ref, arguments)
    zero = _zero_point(ref, ref.name, arguments, tensors)
    if zero is not None:
        check_dtype(zero, "I8")
        check_shape(zero, ref, scale.shape)
    n_cols = ref.shape[-1]
    by_tensor = arguments.get("strategy") == "tensor"
    layout = Integers(8, size or n_cols, ref.shape[-2], not by_tensor, zero)
    _check_scale_shape(scale, ref, ref.shape, layout)
    return _weight(ref.name, ref.shape, ref, scale, layout)


def _weight(
    name: str, shape: tuple[int, ...], data: TensorRef, scale: TensorRef, layout: Integers
) -> Weight:
    format_ = {4: WeightFormat.INT4, 8: WeightFormat.INT8}.get(layout.bits, WeightFormat.INT)
    others = tuple(ref for ref in (layout.zero, layout.order) if ref is not None)
    return Weight(name, format_, shape, data, scale, layout, others)


def _bits(ref: TensorRef, arguments: dict[str, Any]) -> int:
    bits = arguments.get("num_bits")
    if arguments.get("type") != "int" or not is_size(bits) or bits > 8:
        kind = f"{arguments.get('num_bits')} bits of type {arguments.get('type')}"
        raise unsupported(ref, f"is quantised to {kind[:80]}, expected an int of 1 to 8 bits")
    if arguments.get("dynamic"):
        raise unsupported(ref, "is said to be quantised while running (dynamic)")
    return bits


def _group_size(ref: TensorRef, arguments: dict[str, Any]) -> int:
    """Columns that share a scale; 0 for all of a row."""
    strategy, size = arguments.get("strategy"), arguments.get("group_size")
    if strategy in ("channel", "tensor"):
        return 0
    if strategy != "group":
        raise unsupported(ref, f"has scales by strategy {str(strategy)[:80]}")
    if not is_size(size):
        raise unsupported(ref, f"has group_size {str(size)[:80]}, expected a positive integer")
    return size


def _zero_point(
    ref: TensorRef, owner: str, arguments: dict[str, Any], tensors: Tensors
) -> TensorRef | None:
    """The zero points, which there are exactly where the scheme says `symmetric: false`."""
    symmetric = arguments.get("symmetric", True)
    if type(symmetric) is not bool:
        raise unsupported(ref, f"has symmetric {str(symmetric)[:80]}, expected true or false")
    return None if symmetric else part(ref, f"{owner}_zero_point", tensors)


def _layout(
    packed: TensorRef,
    shape: tuple[int, ...],
    arguments: dict[str, Any],
    tensors: Tensors,
    bits: int,
    size: int,
) -> Integers:
    *lead, n_rows, n_cols = shape
    owner = packed.name.removesuffix("_packed")
    zero = _zero_point(packed, owner, arguments, tensors)
    order = tensors.get(f"{owner}_g_idx")
    if arguments.get("actorder") == "group" and order is None:
        raise unsupported(packed, "has actorder group, but no weight_g_idx")
    if order is not None:
        check_dtype(order, "I32", "I64")
        check_shape(order, packed, (n_cols,))
    by_tensor = arguments.get("strategy") == "tensor"
    if zero is not None:
        if by_tensor:
            raise unsupported(packed, "has a zero point for the whole tensor")
        check_dtype(zero, "I32")
        check_shape(zero, packed, (*lead, -(-n_rows * bits // 32), n_cols // size))
    return Integers(bits, size, n_rows, not by_tensor, zero, order)


def _check_scale_shape(
    scale: TensorRef, owner: TensorRef, shape: tuple[int, ...], layout: Integers
) -> None:
    *lead, n_rows, n_cols = shape
    if not layout.scale_rows:
        check_shape(scale, owner, (), (1,), (1,) * len(shape))
        return
    if n_cols % layout.group_size:
        raise unsupported(owner, f"has {n_cols} columns in groups of {layout.group_size}")
    expected = [(*lead, n_rows, n_cols // layout.group_size)]
    if layout.group_size == n_cols:
        expected.append((*lead, n_rows))
    check_shape(scale, owner, *expected)


def read(source: Source, weight: Weight, begin: int, end: int) -> Tile:
    """Rows as f32[rows, cols]; see `quantkit.source.packed.read_tile`."""
    return expand(codes(source, weight, begin, end))


def codes(source: Source, weight: Weight, begin: int, end: int) -> Codes:
    """Rows of a packed or plain integer weight, and what undoes them."""
    layout, scale = weight.layout, weight.scale
    if not isinstance(layout, Integers) or scale is None:
        raise ValueError(f"{weight.name} holds no integers")
    n_rows, n_cols, bits = end - begin, weight.n_cols, layout.bits
    n_groups = n_cols // layout.group_size
    codes_RC = np.empty((n_rows, n_cols), np.uint8)
    stored = read_rows(source, weight.data, begin, end)
    if weight.data.dtype == "I32":
        check_stored_shape(source, weight)
        kernels().unpack_rows(stored.view(np.uint8), bits, codes_RC)
    else:
        np.bitwise_xor(stored, 0x80, out=codes_RC)
    largest = float(1 << bits)
    if layout.scale_rows:
        scale_RG = read_floats(source, scale, begin, end, n_groups, largest)
    else:
        scale_RG = np.repeat(read_floats(source, scale, 0, 1, 1, largest), n_rows, axis=0)
    zero_RG = _zeros(source, layout, begin, end, n_groups)
    return Codes(bits, codes_RC, scale_RG, zero_RG, _groups(source, layout, n_groups))


def _zeros(source: Source, layout: Integers, begin: int, end: int, n_groups: int) -> Tile:
    """Zero points as codes, f32[rows, groups]."""
    zero, bits = layout.zero, layout.bits
    if zero is None:
        return np.full((end - begin, n_groups), 1 << bits - 1, np.float32)
    if zero.dtype == "I8":
        n_across = n_groups if layout.scale_rows else 1
        first, last = (begin, end) if layout.scale_rows else (0, 1)
        raw = read_elements(source, zero, first * n_across, last * n_across) ^ 0x80
        values = raw.reshape(last - first, n_across).astype(np.float32)
        return np.ascontiguousarray(np.broadcast_to(values, (end - begin, n_groups)))
    values = np.empty((end - begin, n_groups), np.float32)
    per_matrix = zero.shape[-2]
    done = begin
    while done < end:  # each matrix of a stack is packed by itself
        matrix, row = divmod(done, layout.matrix_rows)
        last = min(layout.matrix_rows, row + end - done)
        first_word = row // 32 * bits
        end_word = min(-(-last // 32) * bits, per_matrix)
        words = read_rows(
            source, zero, matrix * per_matrix + first_word, matrix * per_matrix + end_word
        )
        down = np.ascontiguousarray(words.T)
        unpacked = np.empty((n_groups, down.shape[1] * 32 // bits), np.uint8)
        kernels().unpack_rows(down.view(np.uint8), bits, unpacked)
        skip = row - row // 32 * 32
        values[done - begin : done - begin + last - row] = unpacked[:, skip : skip + last - row].T
        done += last - row
    return values


def _groups(source: Source, layout: Integers, n_groups: int) -> int | npt.NDArray[np.int64]:
    if layout.order is None:
        return layout.group_size
    order = read_order(source, layout.order, n_groups)
    return layout.group_size if order is None else order


def check_stored_shape(source: Source, weight: Weight) -> None:
    """Compare `weight_shape` with the shapes of the tensors, once for a weight."""
    if weight.name in source.shapes_checked:
        return
    ref = source.tensors[weight.name + "_shape"]
    raw = read_elements(source, ref, 0, len(weight.shape))
    stored = raw.view(np.int32 if ref.dtype == "I32" else np.int64).tolist()
    if stored != list(weight.shape):
        raise contradiction(ref, f"says {stored}, the packed tensor has {list(weight.shape)}")
    source.shapes_checked.add(weight.name)
