"""The synthetic Kimi K2.5 checkpoints have the published form, byte for byte readable."""

from __future__ import annotations

import base64
import json
import shutil
from itertools import pairwise
from pathlib import Path

import _kimi
import make_k25_index
import make_wide_layer
import numpy as np
import pytest
import tiktoken
from safetensors import safe_open

from tests.oracles import hf

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "vocab_size": 640,
}


@pytest.fixture(scope="module")
def k25(tmp_path_factory) -> Path:
    """K2.5 without its layers 2 to 60 and most of its vocabulary."""
    folder = tmp_path_factory.mktemp("k25")
    make_k25_index.make(folder, num_hidden_layers=2, vocab_size=4096)
    return folder


def _located(folder: Path) -> dict[str, str]:
    return {name: path.name for path in folder.glob("*.safetensors") for name in _header(path)}


def _header(path: Path) -> dict:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__")
    ends = [entry["data_offsets"][1] for entry in header.values()]
    assert path.stat().st_size == 8 + size + max(ends)
    return header


@pytest.mark.slow
def test_k25_has_the_published_number_of_tensors_shards_and_bytes(tmp_path):
    make_k25_index.make(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 208_550
    assert round(index["metadata"]["total_size"] / 1e9, 1) == 595.1
    assert len(list(tmp_path.glob("model-*-of-000064.safetensors"))) == 64
    assert _located(tmp_path) == index["weight_map"]
    assert len((tmp_path / "tiktoken.model").read_bytes().splitlines()) == 163_584
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 1e9
    shutil.rmtree(tmp_path)


def test_the_index_of_k25_says_where_each_tensor_is(k25):
    index = json.loads((k25 / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 3 + 2 * 9 + 3 + (384 * 9 + 5) + 27 * 12 + 5 + 6
    assert _located(k25) == index["weight_map"]
    assert sum(path.stat().st_blocks * 512 for path in k25.iterdir()) < 20e6


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("language_model.model.embed_tokens.weight", "BF16", [4096, 7168]),
        ("language_model.model.layers.0.mlp.down_proj.weight", "BF16", [7168, 18432]),
        ("language_model.model.layers.1.self_attn.q_b_proj.weight", "BF16", [12288, 1536]),
        ("language_model.model.layers.1.self_attn.kv_b_proj.weight", "BF16", [16384, 512]),
        ("language_model.model.layers.1.self_attn.kv_a_proj_with_mqa.weight", "BF16", [576, 7168]),
        ("language_model.model.layers.1.mlp.gate.e_score_correction_bias", "F32", [384]),
        ("language_model.model.layers.1.mlp.experts.383.up_proj.weight_packed", "I32", [2048, 896]),
        ("language_model.model.layers.1.mlp.experts.0.down_proj.weight_scale", "BF16", [7168, 64]),
        ("language_model.model.layers.1.mlp.experts.0.down_proj.weight_shape", "I32", [2]),
        ("mm_projector.proj.2.weight", "BF16", [7168, 4608]),
        ("vision_tower.encoder.blocks.26.wqkv.weight", "BF16", [3456, 1152]),
        ("vision_tower.patch_embed.pos_emb.weight", "BF16", [64, 64, 1152]),
    ],
)
def test_k25_tensors_have_their_published_types_and_shapes(k25, name, dtype, shape):
    index = json.loads((k25 / "model.safetensors.index.json").read_text())
    entry = _header(k25 / index["weight_map"][name])[name]
    assert (entry["dtype"], entry["shape"]) == (dtype, shape)


def test_k25_weight_shape_says_what_the_packed_words_expand_to(k25):
    with safe_open(k25 / "model-00002-of-000005.safetensors", framework="np") as file:
        stem = "language_model.model.layers.1.mlp.experts.7"
        assert file.get_tensor(f"{stem}.down_proj.weight_shape").tolist() == [7168, 2048]
        assert file.get_tensor(f"{stem}.gate_proj.weight_shape").tolist() == [2048, 7168]


def test_k25_has_a_tokenizer_that_fits_its_vocabulary_and_encodes(k25):
    ranks = {}
    for line in (k25 / "tiktoken.model").read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    assert sorted(ranks.values()) == list(range(4096 - 256))
    encoding = tiktoken.Encoding(
        "k25", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    text = "no one is on the line: 北京, é"
    ids = encoding.encode(text)
    assert encoding.decode(ids) == text
    assert len(ids) < len(text)


def test_every_mergeable_rank_is_reached_by_one_merge_of_earlier_ones():
    tokens = _kimi.mergeable_ranks(3000)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert len(ranks) == 3000
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while True:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            if not pairs or min(pairs) >= rank:
                break
            at = int(np.argmin(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        assert len(parts) == min(2, len(token))


def test_a_wide_layer_checkpoint_is_complete_and_computes(tmp_path):
    make_wide_layer.make(tmp_path, **_SMALL)
    logits = hf.reference_logits(tmp_path, np.arange(32) * 11)
    assert logits.shape == (32, 640)
    assert 0.3 < logits.std() < 3


def test_a_wide_layers_int4_words_hold_no_level_of_minus_eight(tmp_path):
    make_wide_layer.make(tmp_path, **_SMALL)
    with safe_open(tmp_path / "model-00002-of-000003.safetensors", framework="np") as file:
        words = file.get_tensor("language_model.model.layers.1.mlp.experts.5.up_proj.weight_packed")
    nibbles = np.concatenate([words.view(np.uint8) & 15, words.view(np.uint8) >> 4])
    assert set(np.unique(nibbles)) == set(range(1, 16))


def test_a_wide_layer_is_decided_by_its_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_wide_layer.make(tmp_path / name, seed=seed, **_SMALL)
    a, b, c = (
        (tmp_path / name / "model-00002-of-000003.safetensors").read_bytes() for name in "abc"
    )
    assert a == b
    assert a != c


@pytest.mark.slow
def test_a_wide_layer_has_the_real_width(tmp_path):
    make_wide_layer.make(tmp_path, n_routed_experts=8, vocab_size=2048)
    moe = _header(tmp_path / "model-00002-of-000003.safetensors")
    stem = "language_model.model.layers.1.mlp.experts"
    assert moe[f"{stem}.7.up_proj.weight_packed"]["shape"] == [2048, 896]
    assert f"{stem}.8.up_proj.weight_packed" not in moe
    shutil.rmtree(tmp_path)
