"""A decoder's numbers, read off GGUF metadata: the same for a checkpoint and for its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Any, Literal

from quantkit.errors import GgufError, UnsupportedError
from quantkit.types import Kv, KvType

# Whose constants to compute with where the two disagree. llama.cpp normalises MLA's latents with
# the model's epsilon and runs a deepseek2 file with beta_fast 32; transformers takes 1e-6 for the
# latents and the config's beta_fast.
Constants = Literal["llama.cpp", "config"]

_HF_LATENT_EPS = 1e-6
_LLAMACPP_BETAS = (32.0, 1.0)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding over the first `n_dims` dimensions of a head.

    It turns adjacent pairs or, with `halves`, pairs of one dimension from each half. `factor`,
    `n_original`, `beta_fast` and `beta_slow` are YaRN's (arXiv 2309.00071, 3.2); `magnitude`
    multiplies cos and sin.
    """

    n_dims: int
    theta: float
    halves: bool = False
    kind: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    n_original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0
    whole_steps: bool = True  # YaRN's ramp begins and ends at whole pairs


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention: `latent` values and `n_rope` rotated dimensions per token."""

    latent: int
    n_nope: int
    n_rope: int
    v_dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class Moe:
    """Routing. `scale` multiplies the weights of the chosen experts."""

    n_experts: int
    n_used: int
    gating: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float
    n_groups: int = 1
    n_groups_used: int = 1


@dataclass(frozen=True, slots=True)
class Hyper:
    """What the blocks need to know. `scale` multiplies attention scores.

    Layers of which `windowed` is true see the last `window` tokens and have `local_rope`.
    `score_cap` c makes a score s into c tanh(s / c); 0 is none.
    """

    arch: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    eps: float
    rope: Rope
    mla: Mla | None
    moe: Moe | None
    window: int = 0
    windowed: tuple[bool, ...] = ()
    local_rope: Rope | None = None
    score_cap: float = 0.0
    embedding_scale: float = 1.0

    def window_of(self, layer: int) -> int:
        """How many tokens a token of that layer sees, itself included; 0 is all."""
        return self.window if layer < len(self.windowed) and self.windowed[layer] else 0


Activation = Literal["silu", "gelu", "clamped"]


@dataclass(frozen=True, slots=True)
class Style:
    """What llama.cpp knows by the architecture alone.

    Of every `period` layers the last attends to everything, the others to a window. `feedback`
    says that rounding with feedback knows the layers: norms behind a product, or products of
    fused weights, it does not.
    """

    halves: bool = True
    activation: Activation = "silu"
    gating: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    period: int = 0
    scale_embedding: bool = False
    feedback: bool = True


STYLES = {
    "llama": Style(halves=False),
    "deepseek2": Style(halves=False, renormalise=False),
    "qwen2": Style(),
    "qwen3": Style(),
    "qwen3moe": Style(),
    "phi3": Style(feedback=False),
    "glm4moe": Style(gating="sigmoid", renormalise=False),
    "gemma2": Style(activation="gelu", period=2, scale_embedding=True, feedback=False),
    "gemma3": Style(activation="gelu", period=6, scale_embedding=True, feedback=False),
    # Its router takes the softmax of the chosen logits: the same as of all, renormalised.
    "gpt-oss": Style(activation="clamped", period=2),
    "minimax-m2": Style(gating="sigmoid"),
}
# Layers of the largest Gemmas, whose scores are scaled by 1 / sqrt(hidden size / heads).
_WIDE_SCALE = {("gemma2", 46), ("gemma3", 62)}


@dataclass(frozen=True, slots=True)
class Traits:
    """What products with matrices need to know: an activation, and a cap of logits (0: none)."""

    activation: Activation = "silu"
    logit_cap: float = 0.0


def read_traits(kvs: Mapping[str, Kv]) -> Traits:
    """From metadata; an unknown architecture has none."""
    arch = _arch(kvs)
    keys, style = _Keys(arch, kvs), STYLES.get(arch, Style())
    return Traits(style.activation, keys.number("final_logit_softcapping", 0.0))


def _arch(kvs: Mapping[str, Kv]) -> str:
    return str(kvs["general.architecture"].value) if "general.architecture" in kvs else "?"


def read_hyper(kvs: Mapping[str, Kv], constants: Constants = "llama.cpp") -> Hyper:
    """Everything from a model's metadata.

    Raises `UnsupportedError` for an architecture without forward blocks, `GgufError` for metadata
    that is missing or of the wrong type.
    """
    arch = _arch(kvs)
    if arch not in STYLES:
        raise UnsupportedError(
            f"no forward pass for architecture {arch!r}", hint=f"known: {', '.join(STYLES)}"
        )
    keys = _Keys(arch, kvs)
    return _deepseek2(keys, constants) if arch == "deepseek2" else _grouped(keys, constants)


def require_feedback(hyper: Hyper) -> None:
    """Raise `UnsupportedError` where rounding with feedback would not know the layers."""
    if not STYLES[hyper.arch].feedback:
        raise UnsupportedError(
            f"rounding with feedback does not know the layers of {hyper.arch}",
            hint="--rounding nearest works, with an imatrix from `quantkit calibrate`",
        )


class _Keys:
    """Metadata of one architecture, by key without the prefix."""

    def __init__(self, arch: str, kvs: Mapping[str, Kv]) -> None:
        self.arch = arch
        self._kvs = kvs

    def count(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise GgufError(f"{self.arch}.{key} is {value!r:.40}, expected a count")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GgufError(f"{self.arch}.{key} is {value!r:.40}, expected a number")
        return float(value)

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self._kvs

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, default))

    def flag(self, key: str) -> bool:
        return bool(self._get(key, False))

    def flags(self, key: str) -> tuple[bool, ...]:
        """A list by layer; empty where the key is missing or one value for all."""
        kv = self._kvs.get(f"{self.arch}.{key}")
        return tuple(map(bool, kv.value)) if kv and kv.type is KvType.ARRAY else ()

    def _get(self, key: str, default: Any) -> Any:
        kv = self._kvs.get(f"{self.arch}.{key}")
        if kv is None:
            if default is None:
                raise GgufError(f"{self.arch}.{key} is missing")
            return default
        if kv.type is KvType.ARRAY:
            raise UnsupportedError(f"{self.arch}.{key} differs from layer to layer")
        return kv.value


def _grouped(keys: _Keys, constants: Constants) -> Hyper:
    style = STYLES[keys.arch]
    n_layers = keys.count("block_count")
    n_heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    k_dim = keys.count("attention.key_length", hidden // max(1, n_heads))
    wide = (keys.arch, n_layers) in _WIDE_SCALE
    rope = _rope(keys, keys.count("rope.dimension_count", k_dim), constants)
    window = keys.count("attention.sliding_window", 0) if style.period else 0
    return Hyper(
        arch=keys.arch,
        n_layers=n_layers,
        hidden=hidden,
        n_heads=n_heads,
        n_kv_heads=keys.count("attention.head_count_kv", n_heads),
        k_dim=k_dim,
        v_dim=keys.count("attention.value_length", k_dim),
        scale=1 / sqrt(hidden // n_heads if wide else k_dim),
        eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        mla=None,
        moe=_moe(keys),
        window=window,
        windowed=_windowed(keys, style, n_layers) if window else (),
        local_rope=_local_rope(keys, rope),
        score_cap=keys.number("attn_logit_softcapping", 0.0),
        embedding_scale=sqrt(hidden) if style.scale_embedding else 1.0,
    )


def _windowed(keys: _Keys, style: Style, n_layers: int) -> tuple[bool, ...]:
    pattern = keys.flags("attention.sliding_window_pattern")
    if pattern:
        return pattern
    period = keys.count("attention.sliding_window_pattern", style.period)
    return tuple(not period or i % period < period - 1 for i in range(n_layers))


def _local_rope(keys: _Keys, rope: Rope) -> Rope | None:
    """Rope of layers with a window, where it differs: Gemma 3 scales the others alone."""
    if not keys.has("rope.freq_base_swa"):
        return None
    return Rope(rope.n_dims, keys.number("rope.freq_base_swa"), rope.halves)


def _moe(keys: _Keys) -> Moe | None:
    style = STYLES[keys.arch]
    if keys.count("expert_count", 0) == 0:
        return None
    gating = keys.count("expert_gating_func", 1 if style.gating == "softmax" else 2)
    if gating not in (1, 2):
        raise UnsupportedError(f"expert_gating_func {gating}")
    return Moe(
        n_experts=keys.count("expert_count"),
        n_used=keys.count("expert_used_count"),
        gating="softmax" if gating == 1 else "sigmoid",
        renormalise=style.renormalise or keys.flag("expert_weights_norm"),
        scale=keys.number("expert_weights_scale", 1.0),
        n_groups=keys.count("expert_group_count", 1),
        n_groups_used=keys.count("expert_group_used_count", 1),
    )


def _deepseek2(keys: _Keys, constants: Constants) -> Hyper:
    eps = keys.number("attention.layer_norm_rms_epsilon")
    rope_dim = keys.count("rope.dimension_count")
    latent = keys.count("attention.kv_lora_rank")
    head_dim = keys.count("attention.key_length_mla")
    v_dim = keys.count("attention.value_length_mla")
    rope = _rope(keys, rope_dim, constants)
    # YaRN's magnitude goes into the scores; cos and sin keep theirs (DeepSeek-V3, `mscale`).
    mscale_all_dim = keys.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    mscale = 1 + 0.1 * mscale_all_dim * log(rope.factor) if rope.kind == "yarn" else 1.0
    return Hyper(
        arch=keys.arch,
        n_layers=keys.count("block_count"),
        hidden=keys.count("embedding_length"),
        n_heads=keys.count("attention.head_count"),
        n_kv_heads=1,
        k_dim=latent + rope_dim,
        v_dim=latent,
        scale=mscale * mscale / sqrt(head_dim),
        eps=eps,
        rope=_unit(rope),
        mla=Mla(
            latent=latent,
            n_nope=head_dim - rope_dim,
            n_rope=rope_dim,
            v_dim=v_dim,
            eps=eps if constants == "llama.cpp" else _HF_LATENT_EPS,
        ),
        moe=_moe(keys),
    )


def _rope(keys: _Keys, n_dims: int, constants: Constants) -> Rope:
    plain = Rope(
        n_dims,
        keys.number("rope.freq_base", 10000.0),
        STYLES[keys.arch].halves,
        magnitude=keys.number("rope.scaling.attn_factor", 1.0),
    )
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none":  # LongRoPE's factors are tensors
        return replace(plain, n_original=keys.count("rope.scaling.original_context_length", 0))
    factor = keys.number("rope.scaling.factor")
    if kind == "linear":
        return replace(plain, kind="linear", factor=factor)
    if kind != "yarn":
        raise UnsupportedError(f"rope scaling {kind!r}")
    betas = _LLAMACPP_BETAS
    if constants == "config":
        betas = (
            keys.number("rope.scaling.yarn_beta_fast", betas[0]),
            keys.number("rope.scaling.yarn_beta_slow", betas[1]),
        )
    magnitude = keys.number("rope.scaling.yarn_attn_factor", 1.0) * (1 + 0.1 * log(factor))
    return replace(
        plain,
        kind="yarn",
        factor=factor,
        n_original=keys.count("rope.scaling.original_context_length"),
        beta_fast=betas[0],
        beta_slow=betas[1],
        magnitude=magnitude * plain.magnitude,
        # gpt-oss was trained with a ramp between fractions of a pair, which llama.cpp rounds.
        whole_steps=constants == "llama.cpp" or keys.arch != "gpt-oss",
    )


def _unit(rope: Rope) -> Rope:
    return replace(rope, magnitude=1.0)
