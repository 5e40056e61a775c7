"""DeepSeek V2/V3/R1 and Kimi K2 ... K2.6: MLA attention, routed and shared experts.

GGUF architecture `deepseek2`. MLA is served as MQA: `kv_b_proj` is split per head into `attn_k_b`
(the no-rope keys, transposed) and `attn_v_b`, so the KV cache holds the latent only.
"""

from __future__ import annotations

from quantkit.arch.base import (
    Advice,
    Config,
    Model,
    WeightMap,
    ends,
    matrix,
    norm,
    protected,
    stack,
    swiglu,
    swiglu_shapes,
)
from quantkit.arch.decoder import ignore_unused
from quantkit.arch.rope import rope_kvs
from quantkit.container.kv import boolean, f32, u32
from quantkit.errors import UnsupportedError
from quantkit.types import Kv, Slab, SlabOp, TensorSpec

ARCH = "deepseek2"
_GATING = {"softmax": 1, "sigmoid": 2}


class DeepSeek:
    """The `deepseek2` family."""

    title = "DeepSeek V2, V3, R1; Kimi K2 to K2.6"
    arch = ARCH
    architectures = (
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "KimiK2ForCausalLM",
        "KimiK25ForConditionalGeneration",
    )

    def describe(self, config: Config, weights: WeightMap) -> Model:
        """See `Family.describe`."""
        n_layers = config.count("num_hidden_layers")
        _check_lite(config, n_layers)
        ignore_unused(weights, n_layers)
        embedding, head = ends(config, weights)
        tensors = [embedding]
        for i in range(n_layers):
            tensors += self._attention(config, weights, i)
            tensors += self._ffn(config, weights, i)
        tensors += head
        weights.refuse_leftovers("DeepSeek/Kimi")
        return Model(ARCH, tuple(tensors), self._kvs(config), self._advice(config), weights.ignored)

    def _attention(self, config: Config, weights: WeightMap, i: int) -> list[TensorSpec]:
        hidden, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
        nope, rope = config.count("qk_nope_head_dim"), config.count("qk_rope_head_dim")
        latent, v_dim = config.count("kv_lora_rank"), config.count("v_head_dim")
        hf, blk = f"layers.{i}.", f"blk.{i}."
        tensors = [
            norm(f"{blk}attn_norm.weight", i, weights.take(f"{hf}input_layernorm.weight", hidden))
        ]
        hf += "self_attn."
        q_rows = n_heads * (nope + rope)
        if config.has("q_lora_rank"):
            rank = config.count("q_lora_rank")
            q_a = weights.take(f"{hf}q_a_proj.weight", rank, hidden)
            q_norm = weights.take(f"{hf}q_a_layernorm.weight", rank)
            q_b = weights.take(f"{hf}q_b_proj.weight", q_rows, rank)
            tensors += [
                matrix(f"{blk}attn_q_a.weight", "attention.q_a", i, q_a),
                norm(f"{blk}attn_q_a_norm.weight", i, q_norm),
                matrix(f"{blk}attn_q_b.weight", "attention.q_b", i, q_b),
            ]
        else:
            q = weights.take(f"{hf}q_proj.weight", q_rows, hidden)
            tensors.append(matrix(f"{blk}attn_q.weight", "attention.q", i, q))
        kv_a = weights.take(f"{hf}kv_a_proj_with_mqa.weight", latent + rope, hidden)
        kv_norm = weights.take(f"{hf}kv_a_layernorm.weight", latent)
        kv_b = weights.take(f"{hf}kv_b_proj.weight", n_heads * (nope + v_dim), latent)
        out = weights.take(f"{hf}o_proj.weight", hidden, n_heads * v_dim)
        heads = [h * (nope + v_dim) for h in range(n_heads)]
        k_slabs = tuple(Slab(kv_b, row, row + nope, SlabOp.TRANSPOSE) for row in heads)
        v_slabs = tuple(Slab(kv_b, row + nope, row + nope + v_dim) for row in heads)
        k_shape, v_shape = (n_heads, latent, nope), (n_heads, v_dim, latent)
        tensors += [
            matrix(f"{blk}attn_kv_a_mqa.weight", "attention.kv_a", i, kv_a),
            norm(f"{blk}attn_kv_a_norm.weight", i, kv_norm),
            TensorSpec(f"{blk}attn_k_b.weight", "attention.k_b", i, k_shape, k_slabs),
            TensorSpec(f"{blk}attn_v_b.weight", "attention.v_b", i, v_shape, v_slabs),
            matrix(f"{blk}attn_output.weight", "attention.output", i, out),
        ]
        return tensors

    def _ffn(self, config: Config, weights: WeightMap, i: int) -> list[TensorSpec]:
        hidden = config.count("hidden_size")
        hf, blk = f"layers.{i}.", f"blk.{i}."
        after = weights.take(f"{hf}post_attention_layernorm.weight", hidden)
        tensors = [norm(f"{blk}ffn_norm.weight", i, after)]
        hf += "mlp."
        if not _is_moe(config, i):
            width = config.count("intermediate_size")
            return tensors + swiglu(weights, hf, blk, "dense_ffn", i, (width, hidden))
        n_experts, width = config.count("n_routed_experts"), config.count("moe_intermediate_size")
        router = weights.take(f"{hf}gate.weight", n_experts, hidden)
        tensors.append(protected(f"{blk}ffn_gate_inp.weight", "router", i, router))
        correction = f"{hf}gate.e_score_correction_bias"
        if correction in weights:
            weight = weights.take(correction, n_experts)
            tensors.append(protected(f"{blk}exp_probs_b.bias", "router_bias", i, weight))
        for part, shape in swiglu_shapes(width, hidden):
            experts = [
                weights.take(f"{hf}experts.{e}.{part}_proj.weight", *shape)
                for e in range(n_experts)
            ]
            tensors.append(
                stack(f"{blk}ffn_{part}_exps.weight", f"routed_expert.{part}", i, experts)
            )
        if n_shared := config.count("n_shared_experts", 0):
            size = (width * n_shared, hidden)
            shared = f"{hf}shared_experts."
            tensors += swiglu(weights, shared, blk, "shared_expert", i, size, "_shexp")
        return tensors

    def _kvs(self, config: Config) -> dict[str, Kv]:
        latent, rope = config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
        n_layers = config.count("num_hidden_layers")
        n_dense = config.count("first_k_dense_replace", 0) if _has_moe(config) else n_layers
        kvs = {
            "vocab_size": u32(config.count("vocab_size")),
            "block_count": u32(n_layers),
            "context_length": u32(config.count("max_position_embeddings")),
            "embedding_length": u32(config.count("hidden_size")),
            "feed_forward_length": u32(config.count("intermediate_size")),
            "attention.head_count": u32(config.count("num_attention_heads")),
            "attention.head_count_kv": u32(1),
            "attention.kv_lora_rank": u32(latent),
            "attention.key_length": u32(latent + rope),
            "attention.value_length": u32(latent),
            "attention.key_length_mla": u32(config.count("qk_nope_head_dim") + rope),
            "attention.value_length_mla": u32(config.count("v_head_dim")),
            "attention.layer_norm_rms_epsilon": f32(config.number("rms_norm_eps", 1e-6)),
            "rope.dimension_count": u32(rope),
            "leading_dense_block_count": u32(n_dense),
            "expert_shared_count": u32(config.count("n_shared_experts", 0)),
            "expert_feed_forward_length": u32(
                config.count("moe_intermediate_size", config.count("intermediate_size"))
            ),
        }
        if config.has("q_lora_rank"):
            kvs["attention.q_lora_rank"] = u32(config.count("q_lora_rank"))
        if _has_moe(config):
            kvs["expert_count"] = u32(config.count("n_routed_experts"))
            kvs["expert_used_count"] = u32(config.count("num_experts_per_tok"))
            kvs["expert_gating_func"] = u32(_gating(config))
            kvs["expert_weights_scale"] = f32(config.number("routed_scaling_factor", 1.0))
            if config.flag("norm_topk_prob", False):
                kvs["expert_weights_norm"] = boolean(True)
            if config.has("n_group"):
                kvs["expert_group_count"] = u32(config.count("n_group"))
            if config.has("topk_group"):
                kvs["expert_group_used_count"] = u32(config.count("topk_group"))
        kvs |= rope_kvs(config)
        yarn = config.section("rope_scaling") or config.section("rope_parameters")
        if yarn and yarn.has("mscale_all_dim"):
            # Legacy convention of this architecture: the loader divides by 0.1 again.
            kvs["rope.scaling.yarn_log_multiplier"] = f32(0.1 * yarn.number("mscale_all_dim"))
        return {f"{ARCH}.{key}": kv for key, kv in kvs.items()}

    def _advice(self, config: Config) -> tuple[Advice, ...]:
        yarn = config.section("rope_scaling") or config.section("rope_parameters")
        if yarn is None or not yarn.has("beta_fast"):
            return ()
        beta = yarn.number("beta_fast")
        if beta == 32.0:  # what llama.cpp assumes
            return ()
        return (
            Advice(
                f"--yarn-beta-fast {beta:g}",
                f"the checkpoint was trained with beta_fast {beta:g}; llama.cpp does not read it "
                "from a deepseek2 file and would use 32, which hurts long contexts",
            ),
        )


def _check_lite(config: Config, n_layers: int) -> None:
    """llama.cpp expects `q_lora_rank` unless the number of layers is that of a lite model."""
    looks_lite = n_layers in (26, 27) or (n_layers == 48 and config.count("vocab_size") == 128256)
    if looks_lite == config.has("q_lora_rank"):
        what = "with" if looks_lite else "without"
        raise UnsupportedError(
            f"{n_layers} layers {what} q_lora_rank",
            where="config.json",
            hint="llama.cpp knows a V2-Lite by its 26 or 27 layers and would misread this model",
        )


def _has_moe(config: Config) -> bool:
    return config.has("n_routed_experts")


def _is_moe(config: Config, i: int) -> bool:
    if not _has_moe(config) or i < config.count("first_k_dense_replace", 0):
        return False
    every = config.count("moe_layer_freq", 1)
    if every != 1:
        raise UnsupportedError(
            f"moe_layer_freq {every}: llama.cpp's deepseek2 has experts in every layer after the "
            "leading dense ones",
            where="config.json",
        )
    return True


def _gating(config: Config) -> int:
    is_v2 = config.string("model_type", "") == "deepseek_v2"
    name = config.string("scoring_func", "softmax" if is_v2 else "sigmoid")
    if name not in _GATING:
        raise UnsupportedError(f"scoring_func {name!r} is not known", where="config.json")
    return _GATING[name]
