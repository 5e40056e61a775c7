"""Rope settings that all families share: base frequency, scaling, Llama 3's factors."""

from __future__ import annotations

from math import pi

from quantkit.arch.base import Config
from quantkit.container.kv import f32, string, u32
from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import GgmlType, Kv, TensorSpec

# Kinds that change nothing, kinds that a KV describes, and the one that is a tensor.
_PLAIN = ("default", "none")
_TENSOR = "llama3"
LONG = ("longrope", "su")  # Phi: two tensors


def scaling(config: Config) -> tuple[str, Config] | None:
    """Kind and settings of the rope scaling, or None where positions are used as they are.

    Reads `rope_scaling` (published checkpoints) and `rope_parameters` (transformers 5).
    """
    section = _section(config) or config.section("rope_scaling")
    if section is None:
        return None
    kind = section.string("rope_type", section.string("type", "default"))
    return None if kind in _PLAIN else (kind, section)


def base_frequency(config: Config) -> float:
    """Theta of the rotary embedding, where layers differ that of the ones without a window."""
    section = _section(config)
    theta = config.number("rope_theta", 10000.0)
    return section.number("rope_theta", theta) if section else theta


def rotary_share(config: Config, default: float) -> float:
    """The part of a head that is rotated, 0 to 1."""
    section = _section(config)
    given = section.number("partial_rotary_factor", default) if section else default
    share = config.number("partial_rotary_factor", given)
    if not 0 < share <= 1:
        raise SourceError(f"partial_rotary_factor {share:g}", where="config.json")
    return share


def _section(config: Config) -> Config | None:
    """`rope_parameters`; where it differs by kind of layer, that of full attention."""
    section = config.section("rope_parameters")
    return section and (section.section("full_attention") or section)


def _local_base(config: Config) -> float | None:
    """Theta of layers with a window, where they have their own (Gemma 3)."""
    section = config.section("rope_parameters")
    local = section.section("sliding_attention") if section else None
    if local is not None:
        if local.string("rope_type", "default") not in _PLAIN:
            raise UnsupportedError("scaled rope on layers with a window", where="config.json")
        return local.number("rope_theta")
    return config.number("rope_local_base_freq") if config.has("rope_local_base_freq") else None


def factors(name: str, values: object, n_rotated: int) -> TensorSpec:
    """Frequency divisors from config.json as a tensor, one for each rotated pair."""
    if not isinstance(values, list) or len(values) != n_rotated // 2:
        raise SourceError(
            f"{name} should be {n_rotated // 2} numbers, got {str(values)[:60]}",
            where="config.json",
        )
    numbers = tuple(float(v) for v in values if isinstance(v, int | float) and v > 0)
    if len(numbers) != len(values):
        raise SourceError(f"{name} holds something that is no factor", where="config.json")
    return TensorSpec(name, "rope_freqs", None, (len(numbers),), (), numbers, GgmlType.F32)


def rope_kvs(config: Config, *, long_rope: bool = False) -> dict[str, Kv]:
    """`rope.freq_base` and `rope.scaling.*`, without the architecture's prefix.

    LongRoPE has no key: who says `long_rope` brings its factors as tensors.
    """
    kvs = {"rope.freq_base": f32(base_frequency(config))}
    if local := _local_base(config):
        kvs["rope.freq_base_swa"] = f32(local)
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
    elif kind not in ("", _TENSOR) and not (long_rope and kind in LONG):
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
    if not (factor > 0 and 0 < low < high and original > 0 and theta > 0):
        raise SourceError(
            f"no frequencies come of rope_theta {theta}, factor {factor}, low_freq_factor {low}, "
            f"high_freq_factor {high} and original_max_position_embeddings {original}",
            where="config.json",
        )
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
