"""Tiny checkpoints of each family: published names, loadable, and computing something."""

from __future__ import annotations

import json
from itertools import chain

import _kimi
import make_hf_checkpoint
import numpy as np
import pytest
import torch
from make_hf_checkpoint import FAMILIES
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.oracles import hf


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_hf_checkpoint.make(family, made[family])
        return made[family]

    return get


def _stored(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def _k25_text_entries(config):
    layers = range(config["num_hidden_layers"])
    return [*chain(*(_kimi.layer_entries(config, i) for i in layers)), *_kimi.top_entries(config)]


def _config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_logits_of_ordinary_size(checkpoints, family):
    folder = checkpoints(family)
    logits = hf.reference_logits(folder, np.arange(40) * 7)
    assert logits.shape == (40, _config(folder)["vocab_size"])
    assert 0.5 < logits.std() < 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_fits_the_vocabulary(checkpoints, family):
    folder = checkpoints(family)
    config = _config(folder)
    if FAMILIES[family].tokenizer == "kimi":
        lines = (folder / "tiktoken.model").read_bytes().splitlines()
        assert len(lines) == config["vocab_size"] - 256 == config["bos_token_id"]
        return
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    text = "In 1987, it wasn't far: été 北京\n\n  return x"
    ids = tokenizer.encode(text).ids
    assert ids[0] == config["bos_token_id"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", ["deepseek-v3", "deepseek-v3-grouped"])
def test_a_deepseek_checkpoint_stores_experts_one_by_one_under_published_names(checkpoints, family):
    folder = checkpoints(family)
    expected = {}
    for entry in _k25_text_entries(_config(folder)):
        name = entry.name.removeprefix("language_model.")
        if name.endswith("weight_packed"):
            rows, words = entry.shape
            expected[name.removesuffix("_packed")] = ("BF16", (rows, words * 8))
        elif not name.endswith(("weight_scale", "weight_shape")):
            expected[name] = (entry.dtype, entry.shape)
    assert _stored(folder) == expected


def test_k2_thinking_is_the_text_part_of_k25(checkpoints):
    folder = checkpoints("kimi-k2-thinking")
    config = _config(folder)
    assert _stored(folder) == {
        entry.name.removeprefix("language_model."): (entry.dtype, entry.shape)
        for entry in _k25_text_entries(config)
    }
    assert config["model_type"] == "kimi_k2"
    assert config["rope_scaling"]["beta_fast"] == 1.0


def test_llama_without_a_head_ties_it_to_the_embedding(checkpoints):
    assert "lm_head.weight" in _stored(checkpoints("llama"))
    tied = checkpoints("llama-tied")
    assert "lm_head.weight" not in _stored(tied)
    assert _config(tied)["tie_word_embeddings"]
    assert len(list(tied.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_llama_rope_scaling_is_stored_in_the_old_and_the_new_form(checkpoints, family):
    config = _config(checkpoints(family))
    rope = config["rope_scaling"] if family == "llama-tied" else config["rope_parameters"]
    assert rope["rope_type"] == "llama3"
    assert ("rope_theta" in config) == (family == "llama-tied")


@pytest.mark.parametrize("family", ["deepseek-v3-fp8", "kimi-k2"])
def test_fp8_linears_have_a_multiplier_per_block_and_the_rest_stays_bf16(checkpoints, family):
    stored = _stored(checkpoints(family))
    stem = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[stem] == ("F8_E4M3", (160, 256))
    assert stored[f"{stem}_scale_inv"] == ("F32", (2, 2))
    for name, (dtype, shape) in stored.items():
        kept = len(shape) == 1 or name.endswith(
            ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "_scale_inv")
        )
        assert (dtype == "F8_E4M3") == (not kept), name


def test_unpadded_shard_names_do_not_sort_in_number_order(checkpoints):
    names = sorted(path.name for path in checkpoints("kimi-k2").glob("*.safetensors"))
    assert names[:2] == ["model-1-of-10.safetensors", "model-10-of-10.safetensors"]


def test_fp8_is_within_half_a_step_of_the_plain_weights(checkpoints):
    plain = hf.expanded_tensors(checkpoints("deepseek-v3"))
    coarse = hf.expanded_tensors(checkpoints("deepseek-v3-fp8"))
    assert plain.keys() == coarse.keys()
    for name, weight in plain.items():
        # Three mantissa bits: half a step is 1/16 of the value; below 2^-6 the step is fixed.
        bound = weight.abs() / 16 + weight.abs().max() / 448 * 2**-10
        assert bool(((weight - coarse[name]).abs() <= bound * 1.0001).all()), name


def test_int4_is_within_half_a_step_of_the_plain_weights():
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = make_hf_checkpoint._int4_experts({"m.experts.0.up_proj.weight": weight})
    stem = "m.experts.0.up_proj.weight"
    scale = stored[f"{stem}_scale"]
    levels = hf._expand_int4(stored[f"{stem}_packed"], scale, stored[f"{stem}_shape"])
    error = (levels - weight.float()).abs().unflatten(1, (-1, 32)).amax(2)
    # The scale's own rounding to BF16 moves the outermost level by at most 7 / 256 of a step.
    assert bool((error <= scale.float() * (0.5 + 7 / 256)).all())


def test_a_checkpoint_is_decided_by_its_seed(checkpoints, tmp_path):
    make_hf_checkpoint.make("mistral", tmp_path / "again")
    make_hf_checkpoint.make("mistral", tmp_path / "other", seed=1)
    first, again, other = (
        (folder / "model.safetensors").read_bytes()
        for folder in (checkpoints("mistral"), tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert first != other
