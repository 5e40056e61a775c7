"""A sparse checkpoint with every tensor of Kimi K2.5: 595 GB of zeros in some 30 MB of disk."""

from __future__ import annotations

from pathlib import Path

from tests.builders.safetensors import Tensor, Tensors, int4_config, write_checkpoint

N_TENSORS = 208_550
N_LAYERS, N_EXPERTS, HIDDEN, EXPERT, DENSE, VOCAB = 61, 384, 7168, 2048, 18432, 163840


def write_kimi_sized(folder: Path) -> Path:
    """The folder, with 64 shards of holes, an index and as much config as grouping needs."""
    text = {"model_type": "kimi_k2", "quantization_config": int4_config()}
    shards = {_file(k + 1): _layer(k) for k in range(N_LAYERS)}
    root = "language_model."
    shards[_file(62)] = {
        f"{root}model.embed_tokens.weight": _bf16(VOCAB, HIDDEN),
        f"{root}lm_head.weight": _bf16(VOCAB, HIDDEN),
        f"{root}model.norm.weight": _bf16(HIDDEN),
    }
    shards[_file(63)] = _with_bias(
        "mm_projector.", {"pre_norm": (1152,), "proj.0": (4608, 4608), "proj.2": (7168, 4608)}
    )
    shards[_file(64)] = _vision()
    return write_checkpoint(folder, shards, {"model_type": "kimi_k25", "text_config": text})


def _file(number: int) -> str:
    return f"model-{number:05d}-of-000064.safetensors"


def _bf16(*shape: int) -> Tensor:
    return "BF16", shape, None


def _with_bias(prefix: str, weights: dict[str, tuple[int, ...]]) -> Tensors:
    tensors: dict[str, Tensor] = {}
    for name, shape in weights.items():
        tensors[f"{prefix}{name}.weight"] = _bf16(*shape)
        tensors[f"{prefix}{name}.bias"] = _bf16(shape[0])
    return tensors


def _layer(number: int) -> Tensors:
    prefix = f"language_model.model.layers.{number}."
    attention = {
        "q_a_proj": (1536, HIDDEN),
        "q_a_layernorm": (1536,),
        "q_b_proj": (12288, 1536),
        "kv_a_proj_with_mqa": (576, HIDDEN),
        "kv_a_layernorm": (512,),
        "kv_b_proj": (16384, 512),
        "o_proj": (HIDDEN, 8192),
    }
    tensors = {f"{prefix}self_attn.{name}.weight": _bf16(*n) for name, n in attention.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{norm}.weight"] = _bf16(HIDDEN)
    width = DENSE if number == 0 else EXPERT
    mlp = {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}
    inside = "" if number == 0 else "shared_experts."
    for name, shape in mlp.items():
        tensors[f"{prefix}mlp.{inside}{name}.weight"] = _bf16(*shape)
    if number:
        tensors[f"{prefix}mlp.gate.weight"] = _bf16(N_EXPERTS, HIDDEN)
        tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = ("F32", (N_EXPERTS,), None)
        for expert in range(N_EXPERTS):
            for name, (rows, cols) in mlp.items():
                weight = f"{prefix}mlp.experts.{expert}.{name}.weight"
                tensors[f"{weight}_packed"] = ("I32", (rows, cols // 8), None)
                tensors[f"{weight}_scale"] = _bf16(rows, cols // 32)
                tensors[f"{weight}_shape"] = ("I32", (2,), None)
    return tensors


def _vision() -> Tensors:
    tensors = dict(_with_bias("vision_tower.", {"patch_embed.proj": (1152, 3, 14, 14)}))
    tensors["vision_tower.patch_embed.pos_emb.weight"] = _bf16(64, 64, 1152)
    tensors.update(_with_bias("vision_tower.encoder.", {"final_layernorm": (1152,)}))
    block = {
        "norm0": (1152,),
        "norm1": (1152,),
        "wqkv": (3456, 1152),
        "wo": (1152, 1152),
        "mlp.fc0": (4304, 1152),
        "mlp.fc1": (1152, 4304),
    }
    for number in range(27):
        tensors.update(_with_bias(f"vision_tower.encoder.blocks.{number}.", block))
    return tensors
