"""Make a tiny random checkpoint of a model family through transformers' own classes.

    python scripts/make_hf_checkpoint.py FAMILY OUT [--seed 0]

A few MB each. Weights are scaled so that activations and logits keep ordinary sizes through the
layers, which transformers' initialisation does not do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _kimi
import torch
from _bpe import write_tokenizer
from _common import Entry, split_by_size, write_checkpoint, write_json
from safetensors.torch import load_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

Tensors = dict[str, torch.Tensor]

_LLAMA: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_DEEPSEEK: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# K2 and K2-Thinking have a YaRN ramp of one step, and a larger base.
_K2 = _DEEPSEEK | {
    "vocab_size": 768,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.827,
    "rope_parameters": _YARN | {"rope_theta": 50000.0, "beta_fast": 1.0},
}
_NOAUX_TC = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
_FP8 = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}


@dataclass(frozen=True)
class _Family:
    """How a family's tiny checkpoint is made and stored.

    `extra` is added to config.json. `published` writes config.json in the form of the published
    checkpoints (rope_theta and rope_scaling, torch_dtype); otherwise it stays as transformers 5
    saves it. `store` turns the plain tensors into the stored ones.
    """

    model: Callable[[dict[str, Any]], PreTrainedModel]
    config: dict[str, Any]
    tokenizer: str = "deepseek3"
    published: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    store: Callable[[Tensors], Tensors] = lambda tensors: tensors
    shard_name: str = "model-{:05d}-of-{:05d}.safetensors"
    max_shard_bytes: int = 1 << 40


def make(family: str, out: Path, seed: int = 0) -> None:
    """Write the checkpoint of `family` (a key of FAMILIES) into the folder `out`."""
    spec = FAMILIES[family]
    out.mkdir(parents=True, exist_ok=True)
    kimi = spec.tokenizer == "kimi"
    if kimi:
        first = spec.config["vocab_size"] - _kimi.N_SPECIAL
        ids = {"bos": first + _kimi.SPECIALS["[BOS]"], "eos": first + _kimi.SPECIALS["[EOS]"]}
    else:
        ids = write_tokenizer(out, spec.tokenizer, spec.config["vocab_size"])
    token_ids = {f"{role}_token_id": token for role, token in ids.items()}
    model = spec.model(spec.config | token_ids)
    fill(model, seed)
    plain, config = _as_saved(model)
    if spec.published:
        config = _published(config)
    config |= spec.extra
    tensors = spec.store(plain)
    entries = [Entry(name, _DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]

    def data(entry: Entry) -> memoryview:
        raw = tensors[entry.name].contiguous().flatten().view(torch.uint8)
        return raw.numpy().data

    write_checkpoint(out, split_by_size(entries, spec.max_shard_bytes), data, spec.shard_name)
    if kimi:
        _kimi.write_tokenizer_files(out, config["vocab_size"])
    write_json(out / "config.json", config)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    write_json(out / "generation_config.json", token_ids | sampling)


def fill(model: PreTrainedModel, seed: int) -> None:
    """Give every weight a seeded normal value of a size that suits its place."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            values *= 0.05
        elif tensor.ndim == 1:
            values = 1 + 0.1 * values
        elif "embed_tokens" not in name or model.config.tie_word_embeddings:
            values *= (2.0 if "lm_head" in name else 1.0) * tensor.shape[-1] ** -0.5
        tensor.copy_(values)


def _as_saved(model: PreTrainedModel) -> tuple[Tensors, dict[str, Any]]:
    """Tensors in BF16 (the router's bias in F32) and config.json as save_pretrained writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.bfloat16().save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].float()
    return tensors, config


def _published(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    key = "rope_type" if kind == "llama3" else "type"
    config["rope_scaling"] = {key: kind, **rope} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    for name in ("transformers_version", "rope_interleave", "qk_head_dim", "output_router_logits"):
        config.pop(name, None)
    if "kv_lora_rank" in config:
        config.pop("head_dim", None)
    return config


_DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
}
_KEPT = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight")


def _fp8_blocks(tensors: Tensors) -> Tensors:
    """Linear weights as F8_E4M3 with an F32 multiplier per 128 x 128 block."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or name.endswith(_KEPT):
            stored[name] = tensor
            continue
        rows, cols = tensor.shape
        n_down, n_across = -(-rows // 128), -(-cols // 128)
        padded = torch.zeros(n_down * 128, n_across * 128)
        padded[:rows, :cols] = tensor.float()
        blocks = padded.reshape(n_down, 128, n_across, 128)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        scaled = (blocks / scale[:, None, :, None]).reshape_as(padded)
        stored[name] = scaled[:rows, :cols].to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    return stored


def _int4_experts(tensors: Tensors) -> Tensors:
    """Routed experts as pack-quantized INT4, groups of 32, levels -7..7, BF16 scales."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            stored[name] = tensor
            continue
        groups = tensor.float().reshape(tensor.shape[0], -1, 32)
        scale = (groups.abs().amax(dim=2) / 7).bfloat16()
        levels = (groups / scale.float()[:, :, None]).round().clamp(-7, 7).long().flatten(1) + 8
        words = (levels.reshape(tensor.shape[0], -1, 8) << torch.arange(0, 32, 4)).sum(dim=2)
        stored[f"{name}_packed"] = words.to(torch.uint32).view(torch.int32)
        stored[f"{name}_scale"] = scale
        stored[f"{name}_shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
    return stored


def _v3(config: dict[str, Any]) -> PreTrainedModel:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config, num_mtp_layers=0))


def _v2(config: dict[str, Any]) -> PreTrainedModel:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**config))


def _llama(config: dict[str, Any]) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**config))


def _mistral(config: dict[str, Any]) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**config))


FAMILIES = {
    "llama": _Family(
        _llama,
        _LLAMA | {"rope_parameters": _LLAMA3_ROPE},
        tokenizer="llama3",
        published=False,
    ),
    "llama-tied": _Family(
        _llama,
        _LLAMA | {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
        tokenizer="llama3",
        max_shard_bytes=1_000_000,
    ),
    "mistral": _Family(
        _mistral, _LLAMA | {"head_dim": 64, "sliding_window": None}, tokenizer="llama3"
    ),
    "deepseek-v2-lite": _Family(
        _v2,
        _DEEPSEEK
        | {
            "q_lora_rank": None,
            "num_hidden_layers": 27,  # by which llama.cpp knows a V2-Lite
            "hidden_size": 64,
            "intermediate_size": 128,
            "n_shared_experts": 2,
            "moe_intermediate_size": 64,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
        extra={"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek-v3": _Family(_v3, _DEEPSEEK | {"rope_parameters": _YARN}, extra=_NOAUX_TC),
    "deepseek-v3-grouped": _Family(
        _v3,
        _DEEPSEEK
        | {
            "n_routed_experts": 16,
            "moe_intermediate_size": 64,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "rope_parameters": _YARN,
        },
        extra=_NOAUX_TC,
    ),
    "deepseek-v3-fp8": _Family(
        _v3,
        _DEEPSEEK | {"rope_parameters": _YARN},
        extra=_NOAUX_TC | _FP8,
        store=_fp8_blocks,
    ),
    "kimi-k2": _Family(
        _v3,
        _K2,
        tokenizer="kimi",
        extra=_NOAUX_TC | _FP8 | {"model_type": "kimi_k2"},
        store=_fp8_blocks,
        shard_name="model-{}-of-{}.safetensors",
        max_shard_bytes=200_000,
    ),
    "kimi-k2-thinking": _Family(
        _v3,
        _K2,
        tokenizer="kimi",
        extra=_NOAUX_TC
        | {"model_type": "kimi_k2", "quantization_config": _kimi.QUANTIZATION_CONFIG},
        store=_int4_experts,
        shard_name=_kimi.SHARD_NAME,
        max_shard_bytes=500_000,
    ),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A tiny random checkpoint of a model family.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    make(arguments.family, arguments.out, arguments.seed)
