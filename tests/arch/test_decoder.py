"""What llama.cpp would run as something else is refused, with what works instead."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.arch.base import Config, WeightMap
from quantkit.arch.registry import family_of, vocab_size
from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import TensorRef, Weight, WeightFormat

BASE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": 32}
QWEN3_MOE = MOE | {"norm_topk_prob": True}
GLM = MOE | {"first_k_dense_replace": 1, "n_shared_experts": 1}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 16}
OSS = MOE | {"sliding_window": 16}
LINEAR_LOCAL = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}


class Anything(WeightMap):
    """Has every weight that is asked for, and `others`."""

    def __init__(self, *others: str) -> None:
        ref = TensorRef("", "BF16", (1,), "model.safetensors", 0, 0)
        super().__init__({name: Weight(name, WeightFormat.BF16, (1,), ref) for name in others})

    def format(self, name: str) -> WeightFormat:
        return WeightFormat.BF16

    def take(self, name: str, *shape: int) -> Weight:
        ref = TensorRef(name, "BF16", shape, "model.safetensors", 0, 0)
        return Weight(name, WeightFormat.BF16, shape, ref)


def described(name: str, **config: Any):
    settings = Config(BASE | {"architectures": [f"{name}ForCausalLM"]} | config)
    return family_of(settings).describe(settings, Anything())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Qwen2", {"hidden_act": "gelu"}, "hidden_act"),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("Qwen2", {"rope_scaling": {"type": "longrope"}}, "longrope"),
        ("Qwen2", {"rope_scaling": {"type": "dynamic"}}, "dynamic"),
        ("Qwen3Moe", MOE, "norm_topk_prob"),
        ("Qwen3Moe", QWEN3_MOE | {"mlp_only_layers": [0]}, "layers without experts"),
        ("Qwen3Moe", QWEN3_MOE | {"decoder_sparse_step": 2}, "layers without experts"),
        ("Phi3", {"head_dim": 32}, "as wide as the hidden size"),
        ("Gemma2", GEMMA | {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar"),
        ("Gemma2", GEMMA | {"layer_types": ["full_attention"] * 4}, "pattern"),
        ("Gemma2", GEMMA | {"tie_word_embeddings": False}, "head of its own"),
        ("Gemma3", GEMMA | {"head_dim": 16, "sliding_window_pattern": 3}, "pattern"),
        ("Gemma3", GEMMA | {"head_dim": 16, "attn_logit_softcapping": 5.0}, "softcapping"),
        ("Gemma3", GEMMA | {"head_dim": 16, "rope_parameters": LINEAR_LOCAL}, "scaled rope"),
        ("GptOss", OSS | {"swiglu_limit": 5.0}, "swiglu_limit"),
        ("GptOss", OSS | {"layer_types": ["full_attention", "sliding_attention"] * 2}, "pattern"),
        ("MiniMaxM2", MOE | {"qk_norm_type": "per_head"}, "qk_norm_type"),
        ("MiniMaxM2", MOE | {"scoring_func": "tanh"}, "scoring_func"),
        ("Llama4", {}, "not known"),
        ("Qwen3Next", {}, "not known"),
    ],
)
def test_what_llamacpp_would_run_differently_is_refused(name, config, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        described(name, **config)
    if "rope" not in message and not config.get("rope_scaling"):
        assert "GGUF" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Qwen2", {"num_attention_heads": 0}, "num_attention_heads"),
        ("Qwen2", {"head_dim": 15}, "odd"),
        ("Qwen2", {"intermediate_size": -1}, "out of range"),
        ("Qwen3Moe", {"norm_topk_prob": True}, "num_experts"),
        ("Glm4Moe", GLM | {"partial_rotary_factor": 0}, "partial_rotary_factor"),
        ("Phi3", {"original_max_position_embeddings": 0}, "original_max"),
        ("Phi3", {"rope_scaling": {"type": "su", "long_factor": [1.0]}}, "8 numbers"),
        ("Phi3", {"rope_scaling": {"type": "su", "long_factor": [0] * 8}}, "no factor"),
    ],
)
def test_configs_that_cannot_be_meant_are_one_clear_error(name, config, message):
    with pytest.raises(SourceError, match=message):
        described(name, **config)


def test_a_window_that_llamacpp_does_not_know_of_becomes_advice():
    for name in ("Mistral", "Phi3"):
        (advice,) = described(name, sliding_window=64).advice
        assert advice.flag == "--ctx-size 64"
        assert not described(name, sliding_window=None).advice


def test_gemma_3_may_leave_out_what_transformers_takes_for_granted():
    said = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    config = Config(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": said | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        }
    )
    model = family_of(config).describe(config, Anything())
    kvs = {key.removeprefix("gemma3."): kv.value for key, kv in model.kvs.items()}
    assert vocab_size(config) == model.tensors[0].shape[0] == 262208
    assert (kvs["attention.head_count"], kvs["attention.key_length"]) == (8, 256)
    assert (kvs["rope.freq_base"], kvs["rope.freq_base_swa"]) == (1e6, 1e4)
    assert kvs["rope.scaling.factor"] == 8.0
    assert not any(tensor.name == "output.weight" for tensor in model.tensors)


def test_layers_for_multi_token_prediction_and_vision_are_left_out_with_a_reason():
    weights = Anything("model.layers.4.eh_proj.weight", "vision_tower.patch.weight")
    settings = Config(BASE | {"architectures": ["Glm4MoeForCausalLM"]} | GLM)
    model = family_of(settings).describe(settings, weights)
    assert set(model.ignored) == {"layers.4.eh_proj.weight", "vision_tower.patch.weight"}
