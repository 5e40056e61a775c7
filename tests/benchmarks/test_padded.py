"""A padded checkpoint computes what the original computes, in rows of whole super-blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.padded import ROW, Sizes, pad
from tests.oracles import hf


def write_llama(
    folder: Path, *, dtype: torch.dtype = torch.float32, shards: str = "5GB", **sizes: int
) -> Path:
    torch.manual_seed(7)
    small = {
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 320,
    }
    config = LlamaConfig(
        vocab_size=101,
        num_hidden_layers=2,
        rms_norm_eps=0.01,  # large beside the activations, so that a wrong one shows
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
        **small | sizes,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(tensor, 0.2, 2.0)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def logits(folder: Path) -> np.ndarray:
    ids = np.random.default_rng(3).integers(0, 101, (2, 48))
    return hf.reference_logits(folder, ids).astype(np.float64)


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 48},
        {"num_key_value_heads": 6},
        {"hidden_size": 576, "num_attention_heads": 9},
        {"dtype": torch.bfloat16},
        {"shards": "500KB"},
    ],
    ids=str,
)
def test_the_padded_model_computes_the_same_logits(tmp_path, made):
    source = write_llama(tmp_path / "source", **made)
    pad(source, tmp_path / "padded")
    expected = logits(source)
    error = np.linalg.norm(logits(tmp_path / "padded") - expected)
    assert error < 1e-5 * np.linalg.norm(expected)


def test_every_matrix_has_rows_of_whole_super_blocks_and_heads_keep_their_ratio(tmp_path):
    source = write_llama(tmp_path / "source")
    sizes = pad(source, tmp_path / "padded")
    assert sizes == Sizes(vocab=101, hidden=256, heads=8, kv_heads=4, head_dim=32, ffn=512)
    tensors = load_file(tmp_path / "padded" / "model.safetensors")
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    assert len(matrices) == 16
    assert {name for name, tensor in matrices.items() if tensor.shape[1] % ROW} == set()


def test_sizes_that_fit_stay_as_they_are():
    fitting = Sizes(vocab=101, hidden=768, heads=12, kv_heads=4, head_dim=64, ffn=1536)
    assert fitting.padded() == fitting


def test_smollm2s_sizes_grow_to_the_next_that_fit():
    smollm2 = Sizes(vocab=49152, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536)
    padded = Sizes(vocab=49152, hidden=768, heads=12, kv_heads=4, head_dim=64, ffn=1536)
    assert smollm2.padded() == padded


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM is none of"),
        ({"architectures": None}, "no architecture is none of"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights are quantised"),
        ({"num_key_value_heads": 4}, "6 heads do not share 4"),
        (
            {"intermediate_size": 256},
            r"down_proj.*shape \(192, 320\), config.json says \(192, 256\)",
        ),
    ],
)
def test_a_config_that_it_does_not_know_is_refused(tmp_path, changed, message):
    source = write_llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | changed
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=message):
        pad(source, tmp_path / "padded")


def test_a_tensor_that_it_does_not_know_is_refused(tmp_path):
    source = write_llama(tmp_path / "source")
    path = source / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}, path)
    with pytest.raises(SystemExit, match=r"q_norm\.weight: how to pad this is not known"):
        pad(source, tmp_path / "padded")
