"""From stored tensors to logical weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import TensorRef, Weight, WeightFormat

_PLAIN = {"F32": WeightFormat.F32, "F16": WeightFormat.F16, "BF16": WeightFormat.BF16}
_KNOWN_METHODS = (None, "compressed-tensors", "fp8")
_FOREIGN = {
    "weight_zero_point": "zero points",
    "weight_g_idx": "activation ordering (g_idx)",
    "weight_global_scale": "NVFP4",
    "weight_scale_2": "NVFP4",
    "g_idx": "GPTQ",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
}
# What compressed-tensors must say of the weights; None stands for absent, null or false.
_INT4_ARGUMENTS = {
    "type": "int",
    "num_bits": 4,
    "strategy": "group",
    "group_size": 32,
    "symmetric": True,
    "actorder": None,
    "dynamic": None,
}
_HINT = (
    "quantkit reads BF16, F16 and F32, compressed-tensors INT4 (pack-quantized, symmetric, group "
    "32) and FP8 with a weight_scale_inv per block; convert from the unquantised checkpoint"
)


def group_weights(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights that `tensors` make up, keyed by the name their plain tensor has or would have.

    * F32, F16 and BF16 tensors are weights under their own names.
    * `X.weight_packed`, `X.weight_scale` and `X.weight_shape` are the INT4_G32 weight `X.weight`,
      if `quantization_config` says symmetric 4-bit groups of 32.
    * `X` in F8_E4M3 with `X_scale_inv` is the FP8_BLOCK weight `X`.

    Other tensors (integers, booleans, F64, empty ones) are no weights and are left out, unless
    they look quantised: those raise `UnsupportedError`. Contradicting shapes raise `SourceError`.
    """
    scheme = _quantization_config(config)
    _check_method(scheme, tensors)
    int4_fault = _int4_fault(scheme)
    weights: dict[str, Weight] = {}
    for name, ref in tensors.items():
        tail = name.rpartition(".")[2]
        if tail in _FOREIGN:
            raise _unsupported(ref, f"is stored with {_FOREIGN[tail]}")
        if tail == "weight_packed":
            if int4_fault:
                raise _unsupported(ref, int4_fault)
            weight = _int4(ref, tensors)
        elif tail in ("weight_scale", "weight_shape"):
            _check_int4_part(ref, name.removesuffix(tail), tensors)
            continue
        elif name.endswith("_scale_inv"):
            _check_fp8_part(ref, name.removesuffix("_scale_inv"), tensors)
            continue
        elif ref.dtype == "F8_E4M3":
            weight = _fp8(ref, tensors, fp8_block_shape(config))
        elif ref.dtype in _PLAIN and 0 not in ref.shape:
            weight = Weight(name, _PLAIN[ref.dtype], ref.shape, ref)
        else:
            _check_not_quantised(ref)
            continue
        if weights.setdefault(weight.name, weight) is not weight:
            raise SourceError("is stored both packed and plain", where=f"{ref.file}: {weight.name}")
    return weights


def fp8_block_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share an FP8 multiplier; [128, 128] unless the config differs."""
    block = (_quantization_config(config) or {}).get("weight_block_size") or [128, 128]
    match block:
        case [int(rows), int(cols)] if rows > 0 and cols > 0:
            return rows, cols
    raise UnsupportedError(
        f"weight_block_size is {str(block)[:80]}, expected two positive integers",
        where="config.json: quantization_config",
    )


def _quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The declared scheme, from the top level or from inside text_config."""
    text_config = config.get("text_config")
    levels = (config, text_config if isinstance(text_config, dict) else {})
    for level in levels:
        scheme = level.get("quantization_config")
        if isinstance(scheme, dict):
            return scheme
        if scheme is not None:
            raise SourceError(
                f"must be an object, got {type(scheme).__name__}",
                where="config.json: quantization_config",
            )
    return None


def _check_method(scheme: dict[str, Any] | None, tensors: Mapping[str, TensorRef]) -> None:
    method = scheme.get("quant_method") if scheme else None
    if method in _KNOWN_METHODS or not tensors:
        return
    refs = tensors.values()
    example = next((ref for ref in refs if ref.dtype not in _PLAIN), next(iter(refs)))
    raise _unsupported(example, f"is stored with quant_method {str(method)[:80]!r}")


def _int4_fault(scheme: dict[str, Any] | None) -> str:
    """Why `weight_packed` tensors cannot be INT4_G32 under this scheme; empty if they are."""
    if scheme is None:
        return "is packed, but config.json holds no quantization_config"
    groups = scheme.get("config_groups")
    if scheme.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
        return "is packed, but quantization_config is not of compressed-tensors"
    if (scheme.get("transform_config") or {}) not in ({}, {"config_groups": {}}):
        return "was transformed (transform_config) before it was quantised"
    faults = [_group_fault(group) for group in groups.values()]
    if scheme.get("format") != "pack-quantized" or not faults:
        faults.append(f"has format {str(scheme.get('format'))[:80]}, expected pack-quantized")
    return next(filter(None, faults), "")


def _group_fault(group: Any) -> str:
    arguments = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(arguments, dict):
        return "is packed, but a config group says nothing about weights"
    format_ = group.get("format") or "pack-quantized"
    if format_ != "pack-quantized":
        return f"is in a config group of format {str(format_)[:80]}, expected pack-quantized"
    for key, expected in _INT4_ARGUMENTS.items():
        if (arguments.get(key) or None) != expected:
            return f"has {key} {str(arguments.get(key))[:80]}, expected {expected}"
    return ""


def _int4(packed: TensorRef, tensors: Mapping[str, TensorRef]) -> Weight:
    base = packed.name.removesuffix("weight_packed")
    scale = _part(packed, base + "weight_scale", tensors)
    stored_shape = _part(packed, base + "weight_shape", tensors)
    if packed.dtype != "I32":
        raise _unsupported(packed, f"is packed in {packed.dtype}, expected I32")
    if scale.dtype not in _PLAIN:
        raise _unsupported(scale, f"is a scale in {scale.dtype}, expected BF16, F16 or F32")
    if len(packed.shape) < 2 or 0 in packed.shape:
        raise SourceError(f"has the shape {list(packed.shape)}", where=_where(packed))
    *leading, n_words = packed.shape
    if n_words % 4:
        raise _unsupported(packed, f"has {8 * n_words} columns, not a multiple of 32")
    shape = (*leading, 8 * n_words)
    _check_shape(scale, (*leading, n_words // 4), packed)
    _check_shape(stored_shape, (len(shape),), packed)
    if stored_shape.dtype not in ("I32", "I64"):
        raise SourceError(f"is {stored_shape.dtype}, expected I32", where=_where(stored_shape))
    return Weight(base + "weight", WeightFormat.INT4_G32, shape, packed, scale)


def _fp8(ref: TensorRef, tensors: Mapping[str, TensorRef], block: tuple[int, int]) -> Weight:
    scale = tensors.get(ref.name + "_scale_inv")
    if scale is None:
        raise _unsupported(ref, "is F8_E4M3 without a weight_scale_inv")
    if scale.dtype not in _PLAIN:
        raise _unsupported(scale, f"is a scale in {scale.dtype}, expected F32 or BF16")
    if len(ref.shape) < 2 or 0 in ref.shape:
        raise SourceError(f"has the shape {list(ref.shape)}", where=_where(ref))
    *leading, n_rows, n_cols = ref.shape
    expected = (*leading, -(-n_rows // block[0]), -(-n_cols // block[1]))
    _check_shape(scale, expected, ref)
    return Weight(ref.name, WeightFormat.FP8_BLOCK, ref.shape, ref, scale)


def _part(owner: TensorRef, name: str, tensors: Mapping[str, TensorRef]) -> TensorRef:
    part = tensors.get(name)
    if part is None:
        raise SourceError(f"{name} is missing", where=_where(owner))
    return part


def _check_shape(part: TensorRef, expected: tuple[int, ...], owner: TensorRef) -> None:
    if part.shape != expected:
        raise SourceError(
            f"has the shape {list(part.shape)}, expected {list(expected)} "
            f"beside {owner.name} {list(owner.shape)}",
            where=_where(part),
        )


def _check_int4_part(ref: TensorRef, base: str, tensors: Mapping[str, TensorRef]) -> None:
    if base + "weight" in tensors:
        raise _unsupported(ref, f"scales {base}weight, which is not packed")
    _part(ref, base + "weight_packed", tensors)


def _check_fp8_part(ref: TensorRef, owner: str, tensors: Mapping[str, TensorRef]) -> None:
    dtype = _part(ref, owner, tensors).dtype
    if dtype != "F8_E4M3":
        raise _unsupported(ref, f"scales {owner} in {dtype}, expected F8_E4M3")


def _check_not_quantised(ref: TensorRef) -> None:
    """Refuse what would otherwise be missed only later, as a weight that is not there."""
    is_weight = ref.name.endswith((".weight", "_blocks")) and ref.dtype not in _PLAIN
    if 0 not in ref.shape and (is_weight or ref.dtype.startswith(("F4", "F6_", "F8_"))):
        raise _unsupported(ref, f"is stored as {ref.dtype}")


def _unsupported(ref: TensorRef, reason: str) -> UnsupportedError:
    return UnsupportedError(reason, where=_where(ref), hint=_HINT)


def _where(ref: TensorRef) -> str:
    return f"{ref.file}: {ref.name}"
