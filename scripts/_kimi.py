"""The published form of Kimi K2.5: configuration, tensor names and shapes, tokenizer files."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

from _common import Entry, write_json

SHARD_NAME = "model-{:05d}-of-{:06d}.safetensors"
N_SPECIAL = 256

# Offsets of the named special tokens from the first id after the mergeable ranks.
SPECIALS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "<|media_begin|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
    "<think>": 22,
    "</think>": 23,
    "[UNK]": 254,
    "[PAD]": 255,
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set role = message.role -%}
{%- if role == 'system' -%}<|im_system|>
{%- elif role == 'assistant' -%}<|im_assistant|>
{%- else -%}<|im_user|>
{%- endif -%}
{{ role }}<|im_middle|>{{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|><think>{%- endif -%}
"""

# INT4, groups of 32, symmetric, for the routed experts alone.
QUANTIZATION_CONFIG: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}

_TEXT_CONFIG: dict[str, Any] = {
    "_name_or_path": "",
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "dtype": "bfloat16",
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 262144,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": QUANTIZATION_CONFIG,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 64.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

_VISION_CONFIG: dict[str, Any] = {
    "init_pos_emb_height": 64,
    "init_pos_emb_time": 4,
    "init_pos_emb_width": 64,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_hidden_size": 1152,
    "mm_projector_type": "patchmerger",
    "patch_size": 14,
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-05,
    "video_attn_type": "spatial_temporal",
    "vt_hidden_size": 1152,
    "vt_intermediate_size": 4304,
    "vt_num_attention_heads": 16,
    "vt_num_hidden_layers": 27,
}


def config(**text_overrides: Any) -> dict[str, Any]:
    """config.json of K2.5; `text_overrides` replace fields of `text_config`.

    The special token ids follow vocab_size: the last 256 ids are special.
    """
    text = _TEXT_CONFIG | text_overrides
    first = text["vocab_size"] - N_SPECIAL
    ids = {
        "bos_token_id": first + SPECIALS["[BOS]"],
        "eos_token_id": first + SPECIALS["[EOS]"],
        "pad_token_id": first + SPECIALS["[PAD]"],
    }
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "dtype": "bfloat16",
        "ignore_index": -100,
        "media_placeholder_token_id": first + SPECIALS["<|media_pad|>"],
        "model_type": "kimi_k25",
        **ids,
        "text_config": text | ids,
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "vision_config": _VISION_CONFIG | {"text_hidden_size": text["hidden_size"]},
    }


def layer_entries(text: dict[str, Any], layer: int) -> list[Entry]:
    """Tensors of one decoder layer, the dense or the mixture-of-experts form."""
    stem = f"language_model.model.layers.{layer}"
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    q_rank, kv_rank = text["q_lora_rank"], text["kv_lora_rank"]
    nope, rope, v_dim = (text[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_a_proj": (q_rank, hidden),
        "self_attn.q_a_layernorm": (q_rank,),
        "self_attn.q_b_proj": (heads * (nope + rope), q_rank),
        "self_attn.kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "self_attn.kv_a_layernorm": (kv_rank,),
        "self_attn.kv_b_proj": (heads * (nope + v_dim), kv_rank),
        "self_attn.o_proj": (hidden, heads * v_dim),
    }
    routed: list[Entry] = []
    if layer < text["first_k_dense_replace"]:
        shapes |= _mlp("mlp", hidden, text["intermediate_size"])
    else:
        n_experts, width = text["n_routed_experts"], text["moe_intermediate_size"]
        shapes["mlp.gate"] = (n_experts, hidden)
        shapes |= _mlp("mlp.shared_experts", hidden, width * text["n_shared_experts"])
        bias = Entry(f"{stem}.mlp.gate.e_score_correction_bias", "F32", (n_experts,))
        routed = [bias] + [
            entry
            for expert in range(n_experts)
            for name, shape in _mlp(f"{stem}.mlp.experts.{expert}", hidden, width).items()
            for entry in _int4(name, *shape)
        ]
    plain = [Entry(f"{stem}.{name}.weight", "BF16", shape) for name, shape in shapes.items()]
    return plain + routed


def _mlp(stem: str, hidden: int, width: int) -> dict[str, tuple[int, int]]:
    return {
        f"{stem}.gate_proj": (width, hidden),
        f"{stem}.up_proj": (width, hidden),
        f"{stem}.down_proj": (hidden, width),
    }


def _int4(stem: str, rows: int, cols: int) -> list[Entry]:
    return [
        Entry(f"{stem}.weight_packed", "I32", (rows, cols // 8)),
        Entry(f"{stem}.weight_scale", "BF16", (rows, cols // 32)),
        Entry(f"{stem}.weight_shape", "I32", (2,)),
    ]


def top_entries(text: dict[str, Any]) -> list[Entry]:
    """Embedding, output head and final norm."""
    matrix = (text["vocab_size"], text["hidden_size"])
    return [
        Entry("language_model.model.embed_tokens.weight", "BF16", matrix),
        Entry("language_model.lm_head.weight", "BF16", matrix),
        Entry("language_model.model.norm.weight", "BF16", (text["hidden_size"],)),
    ]


def projector_entries(vision: dict[str, Any]) -> list[Entry]:
    """The multimodal projector."""
    width = vision["mm_hidden_size"]
    merged = width * vision["merge_kernel_size"][0] * vision["merge_kernel_size"][1]
    linear = {"proj.0": (merged, merged), "proj.2": (vision["text_hidden_size"], merged)}
    return [
        *_norm("mm_projector.pre_norm", width),
        *(
            entry
            for name, shape in linear.items()
            for entry in _linear(f"mm_projector.{name}", shape)
        ),
    ]


def vision_entries(vision: dict[str, Any]) -> list[Entry]:
    """The MoonViT tower."""
    width, wide = vision["vt_hidden_size"], vision["vt_intermediate_size"]
    patch = vision["patch_size"]
    grid = (vision["init_pos_emb_height"], vision["init_pos_emb_width"], width)
    entries = [
        *_linear("vision_tower.patch_embed.proj", (width, 3, patch, patch)),
        Entry("vision_tower.patch_embed.pos_emb.weight", "BF16", grid),
        *_norm("vision_tower.encoder.final_layernorm", width),
    ]
    for block in range(vision["vt_num_hidden_layers"]):
        stem = f"vision_tower.encoder.blocks.{block}"
        entries += _norm(f"{stem}.norm0", width) + _norm(f"{stem}.norm1", width)
        entries += _linear(f"{stem}.wqkv", (3 * width, width))
        entries += _linear(f"{stem}.wo", (width, width))
        entries += _linear(f"{stem}.mlp.fc0", (wide, width))
        entries += _linear(f"{stem}.mlp.fc1", (width, wide))
    return entries


def _norm(stem: str, width: int) -> list[Entry]:
    return [Entry(f"{stem}.{leaf}", "BF16", (width,)) for leaf in ("weight", "bias")]


def _linear(stem: str, shape: tuple[int, ...]) -> list[Entry]:
    return [Entry(f"{stem}.weight", "BF16", shape), Entry(f"{stem}.bias", "BF16", shape[:1])]


def weight_shape(text: dict[str, Any], name: str) -> tuple[int, int]:
    """What `...weight_shape` of a routed expert holds: rows and columns of the plain weight."""
    shape = (text["moe_intermediate_size"], text["hidden_size"])
    return shape[::-1] if ".down_proj." in name else shape


def mergeable_ranks(count: int, seed: int = 0) -> list[bytes]:
    """`count` distinct tokens by rank: the 256 bytes, then joins of two earlier tokens.

    Each join is one that byte-pair encoding arrives at: with the earlier ranks alone, its bytes
    reduce to exactly the two tokens that were joined.
    """
    rng = random.Random(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    letters = " etaoinshrdlcumwfgypbvkETAOINS0123456789.,()_éüñжλ的是"
    pool = [bytes([byte]) for byte in dict.fromkeys(letters.encode())]
    while len(tokens) < count:
        # Early tokens are drawn far more often, so that lengths spread as a trained vocabulary's.
        left, right = (pool[int(len(pool) * rng.random() ** 6)] for _ in range(2))
        joined = left + right
        if len(joined) > 16 or joined in ranks or _parts(joined, ranks) != [left, right]:
            continue
        ranks[joined] = len(tokens)
        tokens.append(joined)
        pool.append(joined)
    return tokens[:count]


def _parts(text: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What byte-pair encoding reduces `text` to, lowest rank first, leftmost on a tie."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
        best = min(pairs)
        if best == 1 << 30:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def write_aux_files(folder: Path, model_config: dict[str, Any]) -> None:
    """Write configuration, tokenizer, chat template and processor files."""
    text = model_config["text_config"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model_config)
    generation = {
        "max_length": text["max_position_embeddings"],
        "eos_token_id": text["vocab_size"] - N_SPECIAL + SPECIALS["<|im_end|>"],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    write_tokenizer_files(folder, text["vocab_size"])
    media = {
        "in_patch_limit": 16384,
        "patch_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": 2,
        "fixed_output_tokens": None,
        "patch_limit_on_one_side": 512,
        "in_patch_limit_each_frame": 4096,
    }
    write_json(folder / "preprocessor_config.json", {"media_proc_cfg": media})


def write_tokenizer_files(folder: Path, vocab_size: int) -> None:
    """Write tiktoken.model, tokenizer_config.json and chat_template.jinja."""
    first = vocab_size - N_SPECIAL
    lines = [
        base64.b64encode(token) + f" {rank}\n".encode()
        for rank, token in enumerate(mergeable_ranks(first))
    ]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(first))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _tokenizer_config(first: int) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(first + offset): {"content": name, **flags, "special": True}
            for name, offset in SPECIALS.items()
        },
        "additional_special_tokens": [name for name in SPECIALS if name.startswith("<|im_")],
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "TikTokenTokenizer",
    }
