"""What tensors of a GGUF file are, by llama.cpp's names for them: roles, layers, what is kept.

The names are those of gguf-py's `TENSOR_NAMES`. What keeps its type is what llama-quantize leaves
alone: vectors, everything that is not a `.weight`, norms, routers, convolutions, positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantkit.arch.base import Model
from quantkit.errors import GgufError
from quantkit.types import GgmlType, Kv, Slab, TensorSpec, Weight

UNKNOWN = "other"  # the role of a tensor that the tables below do not know

_ENDS = {
    "token_embd": "token_embd",
    "per_layer_token_embd": "token_embd",  # looked up as well, and llama-quantize agrees
    "output": "output",
    "cls": "classifier",
    "cls.output": "classifier",
    "position_embd": "position_embd",
    "token_types": "token_types",
    "per_layer_model_proj": "per_layer.model_proj",
    "altup_proj": "altup.proj",
    "altup_unembd_proj": "altup.unembd_proj",
    "rope_freqs": "rope",
    "rope_factors_long": "rope",
    "rope_factors_short": "rope",
    "dense_2": "projector",
    "dense_3": "projector",
}

_IN_BLOCKS = {
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_qkv": "attention.qkv",
    "attn_output": "attention.output",
    "attn_o": "attention.output",  # T5
    "attn_gate": "attention.out_gate",
    "attn_q_a": "attention.q_a",
    "attn_q_b": "attention.q_b",
    "attn_kv_a_mqa": "attention.kv_a",
    "attn_kv_b": "attention.kv_b",
    "attn_k_b": "attention.k_b",
    "attn_v_b": "attention.v_b",
    "attn_sinks": "sinks",
    "attn_rel_b": "attention.position",
    "attn_rot_embd": "attention.position",
    "cross_attn_q": "cross_attention.q",
    "cross_attn_k": "cross_attention.k",
    "cross_attn_v": "cross_attention.v",
    "cross_attn_o": "cross_attention.output",
    "cross_attn_rel_b": "cross_attention.position",
    "ffn": "dense_ffn.up",
    "ffn_gate": "dense_ffn.gate",
    "ffn_up": "dense_ffn.up",
    "ffn_down": "dense_ffn.down",
    "ffn_gate_inp": "router",
    "ffn_gate_inp_shexp": "router",
    "ffn_gate_tid2eid": "router",
    "exp_probs_b": "router_bias",
    "ffn_gate_up_exps": "routed_expert.gate",
    "ffn_latent_down": "shared_expert.latent_down",  # every token goes through it
    "ffn_latent_up": "shared_expert.latent_up",
    "inp_gate": "per_layer.in_gate",
    "proj": "per_layer.proj",
    "time_mix_gate": "time_mix.out_gate",
    "layer_output_scale": "norm",
}
for _part in ("gate", "up", "down"):
    _IN_BLOCKS[f"ffn_{_part}_exps"] = f"routed_expert.{_part}"
    _IN_BLOCKS[f"ffn_{_part}_chexps"] = f"routed_expert.{_part}"
    _IN_BLOCKS[f"ffn_{_part}_shexp"] = f"shared_expert.{_part}"
    _IN_BLOCKS[f"vis_{_part}"] = f"vision_expert.ffn_{_part}"
_IN_BLOCKS |= {
    "vis_attn_qkv": "vision_expert.attn_qkv",
    "vis_attn_output": "vision_expert.attn_output",
}

# Parts that come in many kinds, all of which a recipe may treat alike: `ssm.*`.
_KINDS = ("ssm", "time_mix", "channel_mix", "shortconv", "indexer", "nextn", "altup", "laurel")
_KIND = re.compile(rf"({'|'.join(_KINDS)})[._](.+)")

# Beside a text model's own tensors: what sees, hears or speaks, and what leads from there to text.
_SIDES = {"v": "vision", "a": "audio"}
_OTHER_SIDES = {
    "mm": "projector",
    "resampler": "projector",
    "posnet": "vocoder",
    "convnext": "vocoder",
    "conv1d": "vocoder",
}

_NAME = re.compile(r"(?:[a-z0-9_.]*[._])?blk\.(?P<layer>\d{1,5})\.(?P<part>.+)")
_SUFFIX = re.compile(r"\.(weight|bias|scale|input_scale)$")
_NORM = re.compile(r"norm(_\w+)?$|(^|[._])(ln\d?|ln_\w+|ls[12]|bn)$")

# Left alone by llama-quantize, besides vectors and what is not a `.weight`: too small to matter,
# or read by operators that know no blocks.
_LEFT_ALONE = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight$|^token_types\.weight$|ssm_conv1d|shortconv\.conv\.weight"
    r"|indexer\.[kq]_proj\.weight|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos"
    r"|\.patch_embd|\.patch_merger"
)

_NO_WEIGHTS = frozenset({GgmlType.I8, GgmlType.I16, GgmlType.I32, GgmlType.I64, GgmlType.F64})
_SMALLEST_BLOCK = 32
_MAX_STACKED = 4096  # experts or heads; llama.cpp takes 1024 experts


def role_of(name: str) -> tuple[str, int | None]:
    """Role and layer of a tensor by its llama.cpp name; `UNKNOWN` for one that is in no table."""
    base = _SUFFIX.sub("", name)
    found = _NAME.fullmatch(base)
    layer = int(found["layer"]) if found else None
    part = found["part"] if found else base
    side = base.partition(".")[0]
    if _NORM.search(part):
        return "norm", layer
    if side in _OTHER_SIDES:
        return _OTHER_SIDES[side], layer
    if side in _SIDES:
        return f"{_SIDES[side]}.{part.removeprefix(f'{side}.')}", layer
    table = _IN_BLOCKS if found else _ENDS
    if part in table:
        return table[part], layer
    kind = _KIND.fullmatch(part)
    return (f"{kind[1]}.{kind[2]}" if kind else UNKNOWN), layer


def describe_gguf(arch: str, kvs: Mapping[str, Kv], weights: Mapping[str, Weight]) -> Model:
    """The model in a GGUF file, any architecture: its tensors in their order, with roles.

    `weights` are the file's tensors, whose `data.dtype` is the name of a `GgmlType`. A matrix of
    unknown role takes any type that its rows allow, and keeps its own where they allow none with
    blocks. Raises `GgufError` for stacks and vectors that no model has.
    """
    return Model(arch, tuple(_spec(weight) for weight in weights.values()), dict(kvs))


def unknown(model: Model) -> list[str]:
    """Names of tensors of unknown role that a recipe may change."""
    return [t.name for t in model.tensors if t.role == UNKNOWN and t.keep is None]


def _spec(weight: Weight) -> TensorSpec:
    role, layer = role_of(weight.name)
    stored = GgmlType[weight.data.dtype]
    shape = weight.shape
    if len(shape) == 1 and stored.block_size > 1:
        raise GgufError(f"a vector stored as {stored.name}", where=weight.name)
    keep = stored if _is_kept(weight, role, stored) else None
    n_stacked = shape[0] if len(shape) == 3 and keep is None else 1
    if n_stacked > _MAX_STACKED:
        raise GgufError(
            f"{n_stacked} matrices in one tensor, at most {_MAX_STACKED} are expected",
            where=weight.name,
        )
    n_rows = (shape[0] if len(shape) == 1 else weight.n_rows) // n_stacked
    slabs = tuple(Slab(weight, i * n_rows, (i + 1) * n_rows) for i in range(n_stacked))
    return TensorSpec(weight.name, role, layer, shape, slabs, keep=keep)


def _is_kept(weight: Weight, role: str, stored: GgmlType) -> bool:
    name, shape = weight.name, weight.shape
    n_dims = len(shape) - next((i for i, n in enumerate(shape) if n > 1), len(shape))
    if n_dims < 2 or len(shape) > 3 or not name.endswith("weight") or stored in _NO_WEIGHTS:
        return True
    if role == UNKNOWN and shape[-1] % _SMALLEST_BLOCK:
        return True
    # Convolutions of encoders run in floats only.
    is_filter = len(shape) > 2 and name.partition(".")[0] in _SIDES | _OTHER_SIDES
    return is_filter or bool(_LEFT_ALONE.search(name))
