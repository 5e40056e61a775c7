"""GLM 4.5 and 4.6: DeepSeek's routing over grouped-query attention. GGUF `glm4moe`."""

from __future__ import annotations

from quantkit.arch.base import Config
from quantkit.arch.decoder import (
    ATTN_NORM,
    EXPERTS,
    ROUTER,
    Decoder,
    Row,
    attention,
    head_dim,
    qk_norms,
    swiglu_rows,
)
from quantkit.arch.rope import rotary_share
from quantkit.container.kv import boolean, f32, u32
from quantkit.types import Kv

_SHARED = "mlp.shared_experts.{part}_proj.weight"


class Glm4Moe(Decoder):
    """Leading dense layers, then routed and shared experts; half of a head is rotated."""

    title = "GLM 4.5, 4.6 MoE"
    arch = "glm4moe"
    architectures = ("Glm4MoeForCausalLM",)
    layer = (
        ATTN_NORM,
        *attention(biases="qkv"),
        *qk_norms(optional=True),
        # This architecture calls the norm before the feed-forward so.
        Row("post_attention_norm.weight", "post_attention_layernorm.weight", "norm", "hidden"),
    )
    routed = (
        ROUTER,
        Row("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", "router_bias", "experts"),
        *EXPERTS,
        *swiglu_rows(_SHARED, "shared_expert", "_shexp", "shared_ffn"),
    )

    def n_dense(self, config: Config) -> int:
        """See `Decoder`."""
        return config.count("first_k_dense_replace")

    def kvs(self, config: Config) -> dict[str, Kv]:
        """Also DeepSeek's keys of routing."""
        return super().kvs(config) | {
            "rope.dimension_count": u32(int(head_dim(config) * rotary_share(config, 0.5))),
            "expert_feed_forward_length": u32(config.count("moe_intermediate_size")),
            "expert_shared_count": u32(config.count("n_shared_experts")),
            "leading_dense_block_count": u32(config.count("first_k_dense_replace")),
            "expert_gating_func": u32(2),  # sigmoid, in all of them
            "expert_weights_scale": f32(config.number("routed_scaling_factor", 1.0)),
            "expert_weights_norm": boolean(config.flag("norm_topk_prob", True)),
        }
