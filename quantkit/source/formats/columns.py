"""GPTQ and AWQ, whose codes are packed with inputs down and outputs across.

* GPTQ: `X.qweight` I32 [in * bits / 32, out], codes of 2, 3, 4 or 8 bits one after the other down a
  column; `w[o, i] = (u[i, o] - z[g, o]) * scale[g, o]` with g = g_idx[i]. `X.qzeros` I32
  [groups, out * bits / 32] holds z - 1, except in gptq_v2: GPTQModel subtracts one from every
  field of a word in one subtraction of words, and so it is added again here.
* AWQ (gemm): `X.qweight` I32 [in, out / 8] and `X.qzeros` [groups, out / 8], nibble k of a word
  being column 0, 2, 4, 6, 1, 3, 5, 7 of its eight; `w[o, i] = (u[i, o] - z[g, o]) * scale[g, o]`.

Rows of the weight are columns of what is stored. A tile of rows reads its columns of words, in
strips of at most 1 MiB of whole stored rows (or row by row where those are longer than 128 KiB),
so that memory stays bounded; its scales, zeros and g_idx are all that it reads besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.source.formats.codes import Codes, expand, read_order
from quantkit.source.formats.scheme import Scheme
from quantkit.source.formats.stored import (
    Bytes,
    Source,
    Tensors,
    Tile,
    as_floats,
    check_dtype,
    check_scale,
    check_shape,
    contradiction,
    is_size,
    kernels,
    part,
    read_columns,
    unsupported,
)
from quantkit.types import TensorRef, Weight, WeightFormat

_GPTQ_BITS = (2, 3, 4, 8)
# A one in every field of a word.
_ONES = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
# Fields of three bits lie across words, so that other programs subtract from each by itself.
# GPTQModel subtracts these from three words in turn, though not all their ones are lowest bits.
_GPTQMODEL_3 = (0x24924924, 0x92492492, 0x49249249)


@dataclass(frozen=True, slots=True)
class Columns:
    """How codes lie. To undo the subtraction from zero points, `add_words` are added to words in
    turn, and `add` to every field.
    """

    bits: int
    group_size: int
    zeros: TensorRef
    order: TensorRef | None = None
    add_words: tuple[int, ...] = (0,)
    add: int = 0
    symmetric: bool = False


def group_gptq(qweight: TensorRef, tensors: Tensors, scheme: Scheme) -> Weight:
    """`X.qweight`, `X.qzeros`, `X.scales` and perhaps `X.g_idx` as the weight `X.weight`."""
    base = qweight.name.removesuffix("qweight")
    zeros, scales = _parts(qweight, base, tensors)
    n_words, n_out = qweight.shape
    n_groups = scales.shape[0] if scales.shape else 0
    bits = _gptq_bits(qweight, zeros, scheme)
    n_in = n_words * 32 // bits
    if n_words * 32 % bits or n_out * bits % 32:
        raise unsupported(qweight, f"has rows or columns that do not fill words of {bits} bits")
    size = _group_size(qweight, scheme, n_in, n_groups)
    check_shape(zeros, qweight, (n_groups, n_out * bits // 32))
    check_shape(scales, qweight, (n_groups, n_out))
    order = tensors.get(f"{base}g_idx")
    if order is not None:
        check_dtype(order, "I32", "I64")
        check_shape(order, qweight, (n_in,))
    elif scheme.get("desc_act"):
        raise unsupported(qweight, "has desc_act, but no g_idx")
    in_order = order is None or not (scheme.get("desc_act") or scheme.get("dynamic"))
    layout = Columns(
        bits,
        size,
        zeros,
        order,
        *_offsets(qweight, bits, scheme),
        scheme.get("sym") is True and in_order and n_in % size == 0,
    )
    others = (zeros,) if order is None else (zeros, order)
    shape = (n_out, n_in)
    return Weight(f"{base}weight", WeightFormat.GPTQ, shape, qweight, scales, layout, others)


def group_awq(qweight: TensorRef, tensors: Tensors, scheme: Scheme) -> Weight:
    """`X.qweight`, `X.qzeros` and `X.scales` as the weight `X.weight`."""
    base = qweight.name.removesuffix("qweight")
    version = str(scheme.get("version") or scheme.get("format") or "gemm").lower()
    bits = scheme.get("bits", scheme.get("w_bit", 4))
    if scheme.declared.get("quant_method") == "awq" and version != "gemm":
        raise unsupported(qweight, f"is AWQ version {version[:80]!r}, expected gemm")
    if bits != 4:
        raise unsupported(qweight, f"is AWQ of {str(bits)[:80]} bits, expected 4")
    zeros, scales = _parts(qweight, base, tensors)
    n_in, n_words = qweight.shape
    n_groups = scales.shape[0] if scales.shape else 0
    size = _group_size(qweight, scheme, n_in, n_groups)
    check_shape(zeros, qweight, (n_groups, n_words))
    check_shape(scales, qweight, (n_groups, 8 * n_words))
    layout = Columns(4, size, zeros)
    shape = (8 * n_words, n_in)
    return Weight(f"{base}weight", WeightFormat.AWQ, shape, qweight, scales, layout, (zeros,))


def _parts(qweight: TensorRef, base: str, tensors: Tensors) -> tuple[TensorRef, TensorRef]:
    check_dtype(qweight, "I32")
    if len(qweight.shape) != 2 or 0 in qweight.shape:
        raise contradiction(qweight, f"has the shape {list(qweight.shape)}, expected a matrix")
    zeros = part(qweight, f"{base}qzeros", tensors)
    scales = part(qweight, f"{base}scales", tensors)
    check_dtype(zeros, "I32")
    check_scale(scales)
    return zeros, scales


def _gptq_bits(qweight: TensorRef, zeros: TensorRef, scheme: Scheme) -> int:
    """The width of codes: as declared, or as stored where modules differ (`dynamic`)."""
    declared = scheme.get("bits")
    stored = zeros.shape[-1] * 32 // qweight.shape[1] if zeros.shape else 0
    bits = stored if scheme.get("dynamic") or declared is None else declared
    if type(bits) is not int or bits not in _GPTQ_BITS:
        raise unsupported(qweight, f"is GPTQ of {str(bits)[:80]} bits, expected 2, 3, 4 or 8")
    return bits


def _group_size(qweight: TensorRef, scheme: Scheme, n_in: int, n_groups: int) -> int:
    """Inputs that share a scale; all of them where the config says -1."""
    declared = scheme.get("group_size", scheme.get("q_group_size", -1))
    size = n_in if declared in (-1, None) else declared
    if is_size(size) and n_groups == -(-n_in // size):
        return size
    if scheme.get("dynamic") and n_groups and n_in % n_groups == 0:
        return n_in // n_groups
    raise contradiction(
        qweight, f"has {n_groups} groups of {n_in} inputs, group_size is {str(declared)[:80]}"
    )


def _offsets(qweight: TensorRef, bits: int, scheme: Scheme) -> tuple[tuple[int, ...], int]:
    """What is to be added to words of zero points, and to each of them."""
    format_ = scheme.get("checkpoint_format", scheme.get("format", "gptq")) or "gptq"
    if scheme.get("is_marlin_format"):
        format_ = "marlin"
    match format_:
        case "gptq_v2":
            return (0,), 0
        case "gptq" if bits != 3:
            return _ONES[bits], 0
        case "gptq":
            return (_GPTQMODEL_3, 0) if _by_gptqmodel(scheme) else ((0,), 1)
    raise unsupported(
        qweight, f"has GPTQ checkpoint_format {str(format_)[:80]!r}, expected gptq or gptq_v2"
    )


def _by_gptqmodel(scheme: Scheme) -> bool:
    meta = scheme.get("meta")
    return isinstance(meta, dict) and "gptqmodel" in str(meta.get("quantizer")).lower()


def read(source: Source, weight: Weight, begin: int, end: int) -> Tile:
    """Rows as f32[rows, cols]; see `quantkit.source.packed.read_tile`."""
    return expand(codes(source, weight, begin, end))


def codes(source: Source, weight: Weight, begin: int, end: int) -> Codes:
    """Rows of a GPTQ or AWQ weight as codes."""
    layout, scales = weight.layout, weight.scale
    if not isinstance(layout, Columns) or scales is None:
        raise ValueError(f"{weight.name} is neither GPTQ nor AWQ")
    scale_GR = read_columns(source, scales, begin, end)
    largest = float(1 << layout.bits)
    scale_RG = np.ascontiguousarray(
        as_floats(scales, scale_GR, begin, largest, width=end - begin).T
    )
    unpack = _awq if weight.format is WeightFormat.AWQ else _gptq
    codes_RC, zero_RG = unpack(source, weight, layout, begin, end)
    order = layout.order and read_order(source, layout.order, scale_RG.shape[1])
    group = layout.group_size if order is None else _plain_order(order, layout.group_size)
    return Codes(layout.bits, codes_RC, scale_RG, zero_RG, group)


def _plain_order(order: Any, group_size: int) -> Any:
    """The group size where g_idx merely counts groups, as it does without desc_act."""
    in_order = (order == np.arange(order.size) // group_size).all()
    return group_size if in_order else order


def _gptq(
    source: Source, weight: Weight, layout: Columns, begin: int, end: int
) -> tuple[Bytes, Tile]:
    bits = layout.bits
    words = np.ascontiguousarray(read_columns(source, weight.data, begin, end).T)
    codes_RC = np.empty((end - begin, weight.n_cols), np.uint8)
    kernels().unpack_rows(words.view(np.uint8), bits, codes_RC)
    first = begin // 32 * bits
    last = min(-(-end // 32) * bits, layout.zeros.shape[1])
    zero_words = read_columns(source, layout.zeros, first, last)
    add = np.array(layout.add_words, np.uint32)
    zero_words += add[np.arange(first, last) % add.size]  # modulo 2^32
    fields = np.empty((len(zero_words), 32 * (last - first) // bits), np.uint8)
    kernels().unpack_rows(zero_words.view(np.uint8), bits, fields)
    skip = begin - begin // 32 * 32
    zeros = (fields[:, skip : skip + end - begin] + np.uint8(layout.add)) & ((1 << bits) - 1)
    return codes_RC, np.ascontiguousarray(zeros.T.astype(np.float32))


def _awq(
    source: Source, weight: Weight, layout: Columns, begin: int, end: int
) -> tuple[Bytes, Tile]:
    first, last = begin // 8, -(-end // 8)
    skip = begin - 8 * first
    cut = slice(skip, skip + end - begin)
    unpacked = []
    for ref in (weight.data, layout.zeros):
        words = np.ascontiguousarray(read_columns(source, ref, first, last).T)
        fields = np.empty((8 * (last - first), words.shape[1]), np.uint8)
        kernels().unpack_awq(words, fields)
        unpacked.append(fields[cut])
    codes_RC, zero_RG = unpacked
    return np.ascontiguousarray(codes_RC), zero_RG.astype(np.float32)
