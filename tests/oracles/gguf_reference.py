"""A second way from a Kimi K2.5 checkpoint to GGUF, on gguf-py and the expansions of `hf`.

It exists to hold the oracles against each other and to have GGUF files that quantkit did not
write. It keeps the whole model in memory, so it is for fixtures only.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from tests.oracles.hf import Tensors, expanded_tensors

_TEXT_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_VISION_NAMES = {
    "norm0": "ln1",
    "norm1": "ln2",
    "wqkv": "attn_qkv",
    "wo": "attn_out",
    "mlp.fc0": "ffn_up",
    "mlp.fc1": "ffn_down",
}


def write_text(
    checkpoint_dir: Path | str,
    out: Path | str,
    type_of: Callable[[str], Kind] = lambda _: Kind.F32,
) -> None:
    """Write the text model as arch deepseek2; `type_of` names the type of each matrix.

    Vectors and the router stay F32. Types are those that gguf-py can encode.
    """
    folder = Path(checkpoint_dir)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    writer = gguf.GGUFWriter(out, "deepseek2")
    _text_kvs(writer, text)
    _tokenizer_kvs(writer, folder, text["vocab_size"])
    for name, tensor in _text_tensors(expanded_tensors(folder), text).items():
        kept = tensor.ndim == 1 or "ffn_gate_inp" in name
        _add(writer, name, tensor, Kind.F32 if kept else type_of(name))
    _close(writer)


def write_mmproj(checkpoint_dir: Path | str, out: Path | str) -> None:
    """Write tower and projector as arch clip, all F32."""
    folder = Path(checkpoint_dir)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    media = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    vision, media = config["vision_config"], media["media_proc_cfg"]
    writer = gguf.GGUFWriter(out, "clip")
    _vision_kvs(writer, vision, media)
    for name, tensor in expanded_tensors(folder).items():
        if name.startswith(("vision_tower.", "mm_projector.")):
            _add(
                writer,
                *_vision_tensor(name, tensor, vision["vt_num_attention_heads"]),
                Kind.F32,
            )
    _close(writer)


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: Kind) -> None:
    data: NDArray[Any] = tensor.contiguous().numpy()
    if kind != Kind.F32:
        data = gguf.quants.quantize(data, kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _text_kvs(writer: gguf.GGUFWriter, text: dict[str, Any]) -> None:
    writer.add_vocab_size(text["vocab_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(text["q_lora_rank"])
    writer.add_kv_lora_rank(text["kv_lora_rank"])
    writer.add_key_length(text["kv_lora_rank"] + text["qk_rope_head_dim"])
    writer.add_value_length(text["kv_lora_rank"])
    writer.add_key_length_mla(text["qk_nope_head_dim"] + text["qk_rope_head_dim"])
    writer.add_value_length_mla(text["v_head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_dimension_count(text["qk_rope_head_dim"])
    writer.add_rope_freq_base(text["rope_theta"])
    rope = text["rope_scaling"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    writer.add_leading_dense_block_count(text["first_k_dense_replace"])
    writer.add_expert_count(text["n_routed_experts"])
    writer.add_expert_used_count(text["num_experts_per_tok"])
    writer.add_expert_shared_count(text["n_shared_experts"])
    writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    writer.add_expert_group_count(text["n_group"])
    writer.add_expert_group_used_count(text["topk_group"])
    writer.add_expert_weights_scale(text["routed_scaling_factor"])
    writer.add_expert_weights_norm(text["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _tokenizer_kvs(writer: gguf.GGUFWriter, folder: Path, n_vocab: int) -> None:
    """Tokens by id and their types; no merges, which llama.cpp allows for this pre-tokenizer."""
    spelled = _byte_letters()
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    specials = {int(i): entry["content"] for i, entry in named["added_tokens_decoder"].items()}
    tokens = [specials.get(i, f"<|reserved_token_{i}|>") for i in range(n_vocab)]
    kinds = [gguf.TokenType.CONTROL] * n_vocab
    for line in (folder / "tiktoken.model").read_bytes().split(b"\n"):
        if line:
            token, rank = line.split()
            tokens[int(rank)] = "".join(spelled[byte] for byte in base64.b64decode(token))
            kinds[int(rank)] = gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("kimi-k2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in plain else next(others) for byte in range(256)]


def _text_tensors(weights: Tensors, text: dict[str, Any]) -> Tensors:
    result: Tensors = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if name in _TOP_NAMES:
            result[_TOP_NAMES[name]] = tensor
            continue
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if block is None:
            continue
        stem, rest = f"blk.{block[1]}", block[2]
        if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)_proj\.weight", rest):
            stack = f"{stem}.ffn_{expert[2]}_exps.weight"
            stacks.setdefault(stack, {})[int(expert[1])] = tensor
        elif rest == "mlp.gate.e_score_correction_bias":
            result[f"{stem}.exp_probs_b.bias"] = tensor
        elif rest == "self_attn.kv_b_proj.weight":
            heads = tensor.reshape(text["num_attention_heads"], -1, tensor.shape[1])
            n_key = text["qk_nope_head_dim"]
            result[f"{stem}.attn_k_b.weight"] = heads[:, :n_key].transpose(1, 2)
            result[f"{stem}.attn_v_b.weight"] = heads[:, n_key:]
        else:
            result[f"{stem}.{_TEXT_NAMES[rest.removesuffix('.weight')]}.weight"] = tensor
    for stack, by_id in stacks.items():
        result[stack] = torch.stack([by_id[i] for i in range(len(by_id))])
    return result


def _vision_kvs(writer: gguf.GGUFWriter, vision: dict[str, Any], media: dict[str, Any]) -> None:
    area = vision["patch_size"] ** 2
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("kimik25")
    writer.add_vision_projection_dim(vision["text_hidden_size"])
    writer.add_vision_image_size(vision["init_pos_emb_height"] * vision["patch_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["vt_hidden_size"])
    writer.add_vision_feed_forward_length(vision["vt_intermediate_size"])
    writer.add_vision_block_count(vision["vt_num_hidden_layers"])
    writer.add_vision_head_count(vision["vt_num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision["projector_ln_eps"])
    writer.add_vision_projector_scale_factor(media["merge_kernel_size"])
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_mean(media["image_mean"])
    writer.add_vision_image_std(media["image_std"])
    writer.add_uint32("clip.vision.image_min_pixels", 8 * area)
    writer.add_uint32("clip.vision.image_max_pixels", media["in_patch_limit"] * area)


def _vision_tensor(name: str, tensor: torch.Tensor, n_heads: int) -> tuple[str, torch.Tensor]:
    stem, _, leaf = name.rpartition(".")
    if block := re.fullmatch(r"vision_tower\.encoder\.blocks\.(\d+)\.(.+)", stem):
        if block[2] == "wqkv":
            q, k, v = tensor.chunk(3)
            tensor = torch.cat([_split_axes(q, n_heads), _split_axes(k, n_heads), v])
        return f"v.blk.{block[1]}.{_VISION_NAMES[block[2]]}.{leaf}", tensor
    plain = {
        "vision_tower.encoder.final_layernorm": "v.post_ln",
        "vision_tower.patch_embed.proj": "v.patch_embd",
        "vision_tower.patch_embed.pos_emb": "v.position_embd",
        "mm_projector.pre_norm": "mm.input_norm",
        "mm_projector.proj.0": "mm.1",
        "mm_projector.proj.2": "mm.2",
    }
    return f"{plain[stem]}.{leaf}", tensor


def _split_axes(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rope pairs that alternate between the image's axes, first all of one, then of the other."""
    pairs = rows.reshape(n_heads, -1, 2, 2, *rows.shape[1:])  # [head, pair, axis, element, ...]
    return pairs.transpose(1, 2).reshape_as(rows)
