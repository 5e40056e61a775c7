"""llama.cpp through ctypes: held against transformers and against other bindings."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from tests.oracles import gguf_reference, hf, llamacpp
from tests.oracles.compare import mean_kl, same_top1


def test_llama_cpp_and_transformers_agree_on_the_fixture(kimi_gguf, token_ids, exact_logits):
    seen = llamacpp.logits(kimi_gguf, token_ids, kv_f32=True)
    assert seen.shape == exact_logits.shape == (2, 96, 4288)
    assert seen.dtype == np.float32
    assert mean_kl(exact_logits, seen) < 1e-9
    np.testing.assert_allclose(seen, exact_logits, atol=1e-3)


def test_one_sequence_gives_what_it_gives_among_several_and_the_f16_cache_costs_a_little(
    kimi_gguf, token_ids, exact_logits
):
    several = llamacpp.logits(kimi_gguf, token_ids)
    np.testing.assert_array_equal(llamacpp.logits(kimi_gguf, token_ids[1]), several[1])
    assert 1e-8 < mean_kl(exact_logits, several) < 1e-4


def test_yarn_beta_fast_replaces_what_llama_cpp_assumes(
    kimi_dir, kimi_gguf, token_ids, exact_logits, tmp_path
):
    """deepseek2 always runs with 32 unless told otherwise; K2 and K2-Thinking have 1."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(kimi_dir, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["rope_scaling"]["beta_fast"] = 1.0
    (checkpoint / "config.json").write_text(json.dumps(config))
    expected = hf.reference_logits(checkpoint, token_ids[0], latent_eps=1e-5)
    told = llamacpp.logits(kimi_gguf, token_ids[0], kv_f32=True, yarn_beta_fast=1.0)
    assert mean_kl(expected, told) < 1e-9
    assert mean_kl(exact_logits[0], told) > 1e-6


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_quantised_3d_attention_tensors_work_with_and_without_repacking(
    kimi_dir, token_ids, exact_logits, tmp_path, kind
):
    path = tmp_path / "quantised.gguf"
    gguf_reference.write_text(
        kimi_dir,
        path,
        lambda name: kind if name.split(".")[-2].endswith("_b") else Kind.F32,
    )
    for extra_bufts in (True, False):
        seen = llamacpp.logits(path, token_ids, extra_bufts=extra_bufts)
        assert 0 < mean_kl(exact_logits, seen) < 0.02
        assert same_top1(exact_logits, seen) > 0.85


def test_the_wheels_two_bindings_compute_the_same_logits(kimi_gguf, token_ids):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    model = llama_cpp.Llama(str(kimi_gguf), n_ctx=256, n_threads=1, logits_all=True)
    model.eval(token_ids[0].tolist())
    theirs = np.array(model.scores[: token_ids.shape[1]])
    model.close()
    assert mean_kl(theirs, llamacpp.logits(kimi_gguf, token_ids[0])) < 1e-4


def test_a_trained_model_continues_a_sentence(smollm2_gguf):
    assert llamacpp.generate(smollm2_gguf, "The capital of France is", 4).startswith(" Paris")


def test_tokenize_parses_special_tokens_only_when_asked(smollm2_gguf):
    text = "hi<|im_end|>"
    parsed, literal = (
        llamacpp.tokenize(smollm2_gguf, [text, ""], special=special) for special in (True, False)
    )
    assert parsed[0][-1] == 2
    assert len(literal[0]) > len(parsed[0])
    assert parsed[1] == literal[1] == []


def test_metadata_is_read_as_text(kimi_gguf):
    pairs = llamacpp.metadata(kimi_gguf)
    assert pairs["general.architecture"] == "deepseek2"
    assert pairs["deepseek2.attention.key_length"] == "288"
    assert pairs["deepseek2.expert_weights_norm"] == "true"


def test_a_file_that_llama_cpp_loads_is_said_to_load(kimi_gguf):
    loaded, log = llamacpp.loads(kimi_gguf)
    assert loaded
    assert "deepseek2" in log


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: b"GGUX" + data[4:], "magic"),
        (lambda data: data[: len(data) // 2], "not within the file bounds"),
        (lambda data: data.replace(b"attn_k_b", b"attn_k_c", 1), "attn_k_b"),
        (lambda data: data[:-4096] + b"\xff" * 4096, "invalid"),
    ],
    ids=["wrong magic", "cut short", "misnamed tensor", "NaN weights"],
)
def test_a_damaged_file_is_refused_with_a_reason(kimi_gguf, tmp_path, damage, complaint):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(kimi_gguf.read_bytes()))
    loaded, log = llamacpp.loads(path)
    assert not loaded
    assert complaint in log


def test_a_dead_child_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(llamacpp.LlamaCppError, match="did not load"):
        llamacpp.logits(tmp_path / "missing.gguf", [1, 2])


def test_a_projector_without_its_text_model_is_refused(kimi_gguf, kimi_mmproj):
    assert llamacpp.load_mmproj(kimi_mmproj, kimi_gguf)[0]
    assert not llamacpp.load_mmproj(kimi_gguf, kimi_gguf)[0]


@pytest.mark.parametrize("size", [(112, 112), (56, 84), (168, 140)], ids=str)
def test_llama_cpp_and_transformers_see_the_same_image(kimi_dir, kimi_gguf, kimi_mmproj, size):
    """At the position table's own grid of 8 x 8 patches, below and above it."""
    image = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    seen = llamacpp.encode_image(kimi_mmproj, kimi_gguf, image)
    expected = hf.vision_reference(kimi_dir, image)
    assert seen.shape == (size[0] * size[1] // 28**2, 512)
    np.testing.assert_allclose(seen, expected, atol=2e-3 * expected.std())
    other = hf.vision_reference(kimi_dir, image[:, ::-1].copy())
    assert np.abs(other - expected).max() > 0.1 * expected.std()
