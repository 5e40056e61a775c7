"""Rope settings that all families share: base frequency, scaling, Llama 3's factors."""

from __future__ import annotations

from math import pi

from quantkit.arch.base import Config
from quantkit.container.kv import f32, string, u32
from quantkit.errors import UnsupportedError
from quantkit.types import GgmlType, Kv, TensorSpec

# Kinds that change nothing, kinds that a KV describes, and the one that is a tensor.
_PLAIN = ("default", "none")
_TENSOR = "llama3"


def scaling(config: Config) -> tuple[str, Config] | None:
    """Kind and settings of the rope scaling, or None where positions are used as they are.

    Reads `rope_scaling` (published checkpoints) and `rope_parameters` (transformers 5).
    """
    section = config.section("rope_parameters") or config.section("rope_scaling")
    if section is None:
        return None
    kind = section.string("rope_type", section.string("type", "default"))
    return None if kind in _PLAIN else (kind, section)


def base_frequency(config: Config) -> float:
    """Theta of the rotary embedding."""
    section = config.section("rope_parameters")
    fallback = section.number("rope_theta", 10000.0) if section else 10000.0
    return config.number("rope_theta", fallback)


def rope_kvs(config: Config) -> dict[str, Kv]:
    """`rope.freq_base` and `rope.scaling.*`, without the architecture's prefix."""
    kvs = {"rope.freq_base": f32(base_frequency(config))}
    kind, section = scaling(config) or ("", config)
    if kind == "linear":
        kvs["rope.scaling.type"] = string("linear")
        kvs["rope.scaling.factor"] = f32(section.number("factor"))
    elif kind == "yarn":
        kvs["rope.scaling.type"] = string("yarn")
        kvs["rope.scaling.factor"] = f32(section.number("factor"))
        original = section.count("original_max_position_embeddings")
        kvs["rope.scaling.original_context_length"] = u32(original)
        for key, name in (
            ("extrapolation_factor", "yarn_ext_factor"),
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if section.has(key):
                kvs[f"rope.scaling.{name}"] = f32(section.number(key))
    elif kind not in ("", _TENSOR):
        raise UnsupportedError(f"rope scaling {kind!r} is not known", where="config.json")
    return kvs


def rope_freqs(config: Config, head_dim: int) -> TensorSpec | None:
    """Llama 3's frequency divisors as the `rope_freqs.weight` tensor, where the model has them.

    Wavelengths below original/high are kept, above original/low divided by `factor`, and blended
    between (Llama 3.1 reference, `apply_scaling`).
    """
    kind, section = scaling(config) or ("", config)
    if kind != _TENSOR:
        return None
    factor = section.number("factor", 8.0)
    low, high = section.number("low_freq_factor", 1.0), section.number("high_freq_factor", 4.0)
    original = section.count("original_max_position_embeddings", 8192)
    theta = base_frequency(config)
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * pi * theta ** (2 * i / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    shape = (len(divisors),)
    return TensorSpec(
        "rope_freqs.weight", "rope_freqs", None, shape, (), tuple(divisors), GgmlType.F32
    )
