"""A decoder's numbers, read off GGUF metadata: the same for a checkpoint and for its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """Rotary embedding of adjacent pairs over the first `n_dims` dimensions of a head.

    `factor`, `n_original`, `beta_fast` and `beta_slow` are YaRN's (arXiv 2309.00071, 3.2);
    `magnitude` multiplies cos and sin.
    """

    n_dims: int
    theta: float
    kind: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    n_original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0


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
    """What the blocks need to know. `scale` multiplies attention scores."""

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


def read_hyper(kvs: Mapping[str, Kv], constants: Constants = "llama.cpp") -> Hyper:
    """Everything from a model's metadata.

    Raises `UnsupportedError` for an architecture without forward blocks, `GgufError` for metadata
    that is missing or of the wrong type.
    """
    arch = str(kvs["general.architecture"].value) if "general.architecture" in kvs else "?"
    if arch not in _READERS:
        raise UnsupportedError(
            f"no forward pass for architecture {arch!r}", hint=f"known: {', '.join(_READERS)}"
        )
    return _READERS[arch](_Keys(arch, kvs), constants)


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

    def _get(self, key: str, default: Any) -> Any:
        kv = self._kvs.get(f"{self.arch}.{key}")
        if kv is None:
            if default is None:
                raise GgufError(f"{self.arch}.{key} is missing")
            return default
        if kv.type is KvType.ARRAY:
            raise UnsupportedError(f"{self.arch}.{key} differs from layer to layer")
        return kv.value


def _llama(keys: _Keys, constants: Constants) -> Hyper:
    n_heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    k_dim = keys.count("attention.key_length", hidden // max(1, n_heads))
    v_dim = keys.count("attention.value_length", k_dim)
    return Hyper(
        arch=keys.arch,
        n_layers=keys.count("block_count"),
        hidden=hidden,
        n_heads=n_heads,
        n_kv_heads=keys.count("attention.head_count_kv", n_heads),
        k_dim=k_dim,
        v_dim=v_dim,
        scale=1 / sqrt(k_dim),
        eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, keys.count("rope.dimension_count", k_dim), constants),
        mla=None,
        moe=None,
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
    moe = None
    if keys.has("expert_count"):
        gating = keys.count("expert_gating_func", 1)
        if gating not in (1, 2):
            raise UnsupportedError(f"expert_gating_func {gating}")
        moe = Moe(
            n_experts=keys.count("expert_count"),
            n_used=keys.count("expert_used_count"),
            gating="softmax" if gating == 1 else "sigmoid",
            renormalise=keys.flag("expert_weights_norm"),
            scale=keys.number("expert_weights_scale", 1.0),
            n_groups=keys.count("expert_group_count", 1),
            n_groups_used=keys.count("expert_group_used_count", 1),
        )
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
        moe=moe,
    )


_READERS = {"llama": _llama, "deepseek2": _deepseek2}


def _rope(keys: _Keys, n_dims: int, constants: Constants) -> Rope:
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none":
        return Rope(n_dims, theta)
    factor = keys.number("rope.scaling.factor")
    if kind == "linear":
        return Rope(n_dims, theta, "linear", factor)
    if kind != "yarn":
        raise UnsupportedError(f"rope scaling {kind!r}")
    betas = _LLAMACPP_BETAS
    if constants == "config":
        betas = (
            keys.number("rope.scaling.yarn_beta_fast", betas[0]),
            keys.number("rope.scaling.yarn_beta_slow", betas[1]),
        )
    magnitude = keys.number("rope.scaling.yarn_attn_factor", 1.0) * (1 + 0.1 * log(factor))
    n_original = keys.count("rope.scaling.original_context_length")
    return Rope(n_dims, theta, "yarn", factor, n_original, *betas, magnitude)


def _unit(rope: Rope) -> Rope:
    return Rope(
        rope.n_dims,
        rope.theta,
        rope.kind,
        rope.factor,
        rope.n_original,
        rope.beta_fast,
        rope.beta_slow,
    )
