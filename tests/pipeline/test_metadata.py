"""Every key of a converted Kimi K2.5, with its exact type and value."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quantkit.container.reader import read_gguf
from quantkit.types import KvType

U32, F32, STR, BOOL, ARR = KvType.U32, KvType.F32, KvType.STRING, KvType.BOOL, KvType.ARRAY

TEXT_KVS = {
    "general.architecture": (STR, "deepseek2"),
    "general.type": (STR, "model"),
    "general.sampling.temp": (F32, 1.0),
    "general.sampling.top_p": (F32, 0.95),
    "general.sampling.min_p": (F32, 0.01),
    "general.name": (STR, "Tiny Kimi K2.5"),
    "general.size_label": (STR, "8x13M"),
    "general.license": (STR, "apache-2.0"),
    "general.tags": (ARR, ["compressed-tensors", "image-text-to-text"]),
    "general.quantization_version": (U32, 2),
    "general.file_type": (U32, 7),
    "deepseek2.vocab_size": (U32, 4288),
    "deepseek2.block_count": (U32, 4),
    "deepseek2.context_length": (U32, 2048),
    "deepseek2.embedding_length": (U32, 512),
    "deepseek2.feed_forward_length": (U32, 1536),
    "deepseek2.attention.head_count": (U32, 8),
    "deepseek2.attention.head_count_kv": (U32, 1),
    "deepseek2.attention.q_lora_rank": (U32, 256),
    "deepseek2.attention.kv_lora_rank": (U32, 256),
    "deepseek2.attention.key_length": (U32, 256 + 32),
    "deepseek2.attention.value_length": (U32, 256),
    "deepseek2.attention.key_length_mla": (U32, 64 + 32),
    "deepseek2.attention.value_length_mla": (U32, 64),
    "deepseek2.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "deepseek2.rope.dimension_count": (U32, 32),
    "deepseek2.rope.freq_base": (F32, 50000.0),
    "deepseek2.rope.scaling.type": (STR, "yarn"),
    "deepseek2.rope.scaling.factor": (F32, 4.0),
    "deepseek2.rope.scaling.original_context_length": (U32, 512),
    "deepseek2.rope.scaling.yarn_beta_fast": (F32, 32.0),
    "deepseek2.rope.scaling.yarn_beta_slow": (F32, 1.0),
    "deepseek2.rope.scaling.yarn_log_multiplier": (F32, 0.1),
    "deepseek2.leading_dense_block_count": (U32, 1),
    "deepseek2.expert_count": (U32, 8),
    "deepseek2.expert_used_count": (U32, 2),
    "deepseek2.expert_shared_count": (U32, 1),
    "deepseek2.expert_feed_forward_length": (U32, 256),
    "deepseek2.expert_group_count": (U32, 1),
    "deepseek2.expert_group_used_count": (U32, 1),
    "deepseek2.expert_weights_scale": (F32, 2.5),
    "deepseek2.expert_weights_norm": (BOOL, True),
    "deepseek2.expert_gating_func": (U32, 2),
    "tokenizer.ggml.model": (STR, "gpt2"),
    "tokenizer.ggml.pre": (STR, "kimi-k2"),
    "tokenizer.ggml.bos_token_id": (U32, 4032),
    "tokenizer.ggml.eos_token_id": (U32, 4033),
    "tokenizer.ggml.padding_token_id": (U32, 4287),
}
VISION_KVS = {
    "general.architecture": (STR, "clip"),
    "general.type": (STR, "mmproj"),
    "general.file_type": (U32, 1),
    "clip.has_vision_encoder": (BOOL, True),
    "clip.projector_type": (STR, "kimik25"),
    "clip.use_gelu": (BOOL, True),
    "clip.vision.projection_dim": (U32, 512),
    "clip.vision.image_size": (U32, 8 * 14),
    "clip.vision.patch_size": (U32, 14),
    "clip.vision.embedding_length": (U32, 64),
    "clip.vision.feed_forward_length": (U32, 96),
    "clip.vision.block_count": (U32, 2),
    "clip.vision.attention.head_count": (U32, 4),
    "clip.vision.attention.layer_norm_epsilon": (F32, 1e-5),
    "clip.vision.projector.scale_factor": (U32, 2),
    "clip.vision.image_min_pixels": (U32, 8 * 196),
    "clip.vision.image_max_pixels": (U32, 16384 * 196),
    "clip.vision.image_mean": (ARR, [0.5, 0.5, 0.5]),
    "clip.vision.image_std": (ARR, [0.5, 0.5, 0.5]),
    "vision.pos_emb_height": (U32, 8),
    "vision.pos_emb_width": (U32, 8),
    "vision.pos_emb_time": (U32, 4),
}


def expect(kvs, key, type_, value):
    assert kvs[key].type is type_, key
    if type_ is F32:
        assert np.float32(kvs[key].value) == np.float32(value), key
    else:
        assert kvs[key].value == value, key


def test_the_text_files_keys_have_the_right_types_and_values(converted):
    kvs = read_gguf(converted("q4_x") / "m-Q4_X.gguf").kvs
    for key, (type_, value) in TEXT_KVS.items():
        expect(kvs, key, type_, value)


def test_there_are_no_other_keys(converted):
    kvs = read_gguf(converted("q4_x") / "m-Q4_X.gguf").kvs
    arrays = {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")}
    assert kvs.keys() == TEXT_KVS.keys() | arrays | {"tokenizer.chat_template"}


def test_the_vision_files_keys_have_the_right_types_and_values(converted):
    kvs = read_gguf(converted("q4_x") / "mmproj-m-F16.gguf").kvs
    for key, (type_, value) in VISION_KVS.items():
        expect(kvs, key, type_, value)


def test_the_vocabulary_has_the_configs_size_and_the_template_its_bytes(converted, fixture_model):
    kvs = read_gguf(converted("q4_x") / "m-Q4_X.gguf").kvs
    vocab_size = json.loads((fixture_model / "config.json").read_text())["text_config"][
        "vocab_size"
    ]
    assert len(kvs["tokenizer.ggml.tokens"].value) == vocab_size
    assert len(kvs["tokenizer.ggml.token_type"].value) == vocab_size
    template = (fixture_model / "chat_template.jinja").read_text("utf-8")
    assert kvs["tokenizer.chat_template"].value == template


def test_only_the_first_shard_carries_the_models_keys(converted):
    first, *rest = sorted(converted("q4_x", 6_000_000).glob("m-*.gguf"))
    count = 1 + len(rest)
    kvs = read_gguf(first).kvs
    assert kvs.keys() > TEXT_KVS.keys()
    for number, path in enumerate([first, *rest]):
        split = {k: v for k, v in read_gguf(path).kvs.items() if k.startswith("split.")}
        assert (split["split.no"].type, split["split.no"].value) == (KvType.U16, number)
        assert (split["split.count"].type, split["split.count"].value) == (KvType.U16, count)
        assert split["split.tensors.count"].type is KvType.I32
        if number:
            assert read_gguf(path).kvs.keys() == split.keys()


@pytest.mark.parametrize(
    ("recipe", "file_type"), [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7)]
)
def test_the_file_type_is_that_of_most_weights(converted, recipe, file_type):
    kvs = read_gguf(converted(recipe) / f"m-{recipe.upper()}.gguf").kvs
    assert kvs["general.file_type"].value == file_type
