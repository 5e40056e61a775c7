"""Tiny random checkpoints of every family, made and saved by transformers' own classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from _bpe import write_tokenizer

N_VOCAB = 320
_BASE: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 316,
    "eos_token_id": 317,
    "pad_token_id": None,
}
_THETA = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Tiny:
    """A model's class without `ForCausalLM`, and what its config changes."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    text_class: str = ""  # of the config, where it is not `{name}Config`


TINY = {
    "mistral": Tiny("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": Tiny("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Tiny("Qwen2"),
    "qwen2-tied-yarn": Tiny("Qwen2", {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen3": Tiny("Qwen3", {"head_dim": 32}),
    "qwen3-moe": Tiny(
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "phi3": Tiny("Phi3", {"original_max_position_embeddings": 1024}),
    "phi3-longrope": Tiny(
        "Phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 256,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "glm4-moe": Tiny(
        "Glm4Moe",
        {
            "head_dim": 32,
            "num_nextn_predict_layers": 0,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
        },
    ),
    "gemma2": Tiny(
        "Gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "num_hidden_layers": 4,
        },
    ),
    "gemma3": Tiny(
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1_000_000.0,
                },
                "sliding_attention": _THETA,
            },
        },
        text_class="Gemma3TextConfig",
    ),
    "gpt-oss": Tiny(
        "GptOss",
        {
            "head_dim": 32,
            "sliding_window": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 4,
        },
    ),
    "minimax-m2": Tiny(
        "MiniMaxM2",
        {
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "rope_parameters": _THETA | {"partial_rotary_factor": 0.5},
        },
    ),
}


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the checkpoint with a tokenizer into the folder."""
    tiny = TINY[name]
    config_class = getattr(transformers, tiny.text_class or f"{tiny.name}Config")
    config = config_class(**_BASE | tiny.config)
    model = getattr(transformers, f"{tiny.name}ForCausalLM")(config)
    fill(model, seed=len(name))
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder, "llama3", N_VOCAB)
    return folder


def fill(model: torch.nn.Module, seed: int) -> None:
    """Every parameter and buffer of state random, of a size that keeps activations ordinary.

    Norms, biases, sinks and routers too: at what they are initialised with, they would hide a
    mistake.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("norm.weight", "layernorm.weight")):
            values = tensor + 0.2 * values  # around the 0 or 1 of this family's norms
        elif name.endswith(("bias", "sinks")):
            values *= 0.3
        elif name.endswith("lm_head.weight"):
            values *= 3 * tensor.shape[-1] ** -0.5
        elif name.endswith("embed_tokens.weight"):
            values *= 0.3
        elif values.ndim == 3 and "gpt_oss" in type(model).__module__:  # inputs first
            values *= tensor.shape[1] ** -0.5
        else:
            values *= tensor.shape[-1] ** -0.5
        tensor.copy_(values)
