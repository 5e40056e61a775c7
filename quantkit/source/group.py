"""From stored tensors to logical weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import SourceError
from quantkit.source.formats import bitsandbytes, columns, fp4, fp8, integers, plain
from quantkit.source.formats.scheme import Scheme
from quantkit.source.formats.stored import Reader, Tensors, unsupported, where
from quantkit.types import TensorRef, Weight

__all__ = ["group_weights"]

# Companions of a quantised weight: in no weight that is known, they are no weights of their own.
_COMPANIONS = {
    "weight_scale": "weight",
    "weight_scale_inv": "weight",
    "weight_scale_2": "weight",
    "weight_shape": "weight",
    "weight_zero_point": "weight",
    "weight_g_idx": "weight",
    "weight_global_scale": "weight",
    "qzeros": "qweight",
    "g_idx": "qweight",
    "absmax": "",
    "nested_absmax": "",
    "quant_map": "",
    "nested_quant_map": "",
    "bitsandbytes__nf4": "",
    "bitsandbytes__fp4": "",
    "SCB": "weight",
    "pre_quant_scale": "weight",
}
# Scales of activations and of the KV cache, which a GGUF file has no use for.
_CODES = frozenset((*plain.FORMATS, "F8_E4M3", "I8", "U8"))
_ACTIVATIONS = frozenset(
    ("input_scale", "input_global_scale", "input_zero_point", "output_scale", "k_scale", "v_scale")
)


def group_weights(
    tensors: Tensors, config: Mapping[str, Any], read: Reader | None = None
) -> dict[str, Weight]:
    """The weights that `tensors` make up, keyed by the name their plain tensor has or would have.

    What is stored decides: F32, F16 and BF16 tensors are weights under their own names, and the
    tensors of each format of `quantkit.source.formats` are one weight together. What the bits
    mean is read from `quantization_config`, and with `read` from the state that bitsandbytes
    keeps beside each weight.

    Other tensors (integers, booleans, F64, empty ones) are no weights and are left out, unless
    they look quantised: those raise `UnsupportedError`. Contradicting shapes raise `SourceError`.
    """
    scheme = Scheme(config, tensors)
    weights: dict[str, Weight] = {}
    taken: set[str] = set()
    rest: list[TensorRef] = []
    for name, ref in tensors.items():
        weight = _weight(name, ref, tensors, scheme, read)
        if weight is None:
            rest.append(ref)
            continue
        if weight.scale is not None:
            taken.add(weight.scale.name)
            taken.add(f"{weight.name}_shape")
            taken.update(other.name for other in weight.others)
        if weights.setdefault(weight.name, weight) is not weight:
            raise SourceError("is stored both packed and plain", where=where(ref))
    for ref in rest:
        if ref.name not in taken:
            _check_rest(ref, tensors, scheme)
    return weights


def _weight(
    name: str, ref: TensorRef, tensors: Tensors, scheme: Scheme, read: Reader | None
) -> Weight | None:
    """The weight whose values a tensor holds; None for one that holds none, or only scales."""
    tail = name.rpartition(".")[2]
    if tail in ("weight_packed", "qweight"):
        return _packed(ref, tail, tensors, scheme)
    if ref.dtype not in _CODES or 0 in ref.shape:
        return None
    if ref.dtype in plain.FORMATS:
        is_plain = not _is_companion(name, tail, tensors, scheme)
        return Weight(name, plain.FORMATS[ref.dtype], ref.shape, ref) if is_plain else None
    return _coded(ref, tail, tensors, scheme, read)


def _packed(ref: TensorRef, tail: str, tensors: Tensors, scheme: Scheme) -> Weight:
    match tail, ref.dtype, scheme.method:
        case "weight_packed", "I32", _:
            return integers.group_packed(ref, tensors, scheme)
        case "weight_packed", "U8", _:
            return fp4.group_packed(ref, tensors, scheme)
        case "weight_packed", _, _:
            raise unsupported(ref, f"is packed in {ref.dtype}, expected I32 or U8")
        case _, _, "gptq":
            return columns.group_gptq(ref, tensors, scheme)
        case _, _, "awq":
            return columns.group_awq(ref, tensors, scheme)
    raise unsupported(ref, "is stored with GPTQ or AWQ, but quant_method is neither gptq nor awq")


def _coded(
    ref: TensorRef, tail: str, tensors: Tensors, scheme: Scheme, read: Reader | None
) -> Weight | None:
    """The weight of a tensor of codes of a byte, by what is stored beside it."""
    name, weight = ref.name, None
    if ref.dtype == "F8_E4M3":
        if not _is_companion(name, tail, tensors, scheme):
            weight = fp8.group(ref, tensors, scheme)
    elif ref.dtype == "I8":
        if tail == "weight" and f"{name.removesuffix(tail)}SCB" in tensors:
            weight = bitsandbytes.group_int8(ref, tensors)
        elif f"{name}_scale" in tensors:
            weight = integers.group_plain(ref, tensors, scheme)
    elif name.endswith("_blocks"):
        weight = fp4.group_blocks(ref, tensors)
    elif f"{name}.absmax" in tensors:
        weight = bitsandbytes.group_4bit(ref, tensors, read)
    elif f"{name}_scale_2" in tensors:
        weight = fp4.group_modelopt(ref, tensors)
    return weight


def _is_companion(name: str, tail: str, tensors: Tensors, scheme: Scheme) -> bool:
    if tail in _COMPANIONS:
        return True
    if tail == "scales":
        return f"{name.removesuffix('scales')}qweight" in tensors
    if tail in _ACTIVATIONS:
        return bool(scheme.declared)
    return name.endswith("_scale_inv") or _owner(name, "_scale", tensors) is not None


def _owner(name: str, suffix: str, tensors: Tensors) -> TensorRef | None:
    """The quantised tensor that one named after it goes with."""
    owner = tensors.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
    return owner if owner is not None and owner.dtype not in plain.FORMATS else None


def _check_rest(ref: TensorRef, tensors: Tensors, scheme: Scheme) -> None:
    """Refuse what would otherwise be missed only later, as a weight that is not there."""
    name = ref.name
    base, _, tail = name.rpartition(".")
    if tail in _COMPANIONS or name.endswith("_scale_inv"):
        owner = _owner_name(name, base, tail)
        stored = tensors.get(owner) or tensors.get(f"{owner}_packed")
        if stored is None:
            packed = "" if tail in ("weight_scale_inv", "SCB") or "q" in tail else "_packed"
            raise SourceError(f"{owner}{packed} is missing", where=where(ref))
        raise unsupported(ref, f"goes with {stored.name}, which is stored as {stored.dtype}")
    is_activation = tail in _ACTIVATIONS and bool(scheme.declared)
    is_weight = name.endswith((".weight", "_blocks", "_scales")) and ref.dtype not in plain.FORMATS
    if 0 in ref.shape or is_activation:
        return
    if is_weight or ref.dtype.startswith(("F4", "F6_", "F8_")):
        raise unsupported(ref, f"is stored as {ref.dtype}")


def _owner_name(name: str, base: str, tail: str) -> str:
    if tail not in _COMPANIONS:
        return name.removesuffix("_scale_inv")
    return f"{base}.{_COMPANIONS[tail]}" if _COMPANIONS[tail] else base.removesuffix(".quant_state")
