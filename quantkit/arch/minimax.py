"""MiniMax M2: norms over all heads at once, sigmoid routing. GGUF `minimax-m2`."""

from __future__ import annotations

from quantkit.arch.base import Config, refuse
from quantkit.arch.decoder import (
    ATTN_NORM,
    FFN_NORM,
    Decoder,
    Row,
    attention,
    gating,
    head_dim,
    qk_norms,
)
from quantkit.arch.llama import Mixtral
from quantkit.arch.rope import rotary_share
from quantkit.container.kv import u32
from quantkit.types import Kv

_BIAS = "block_sparse_moe.e_score_correction_bias"


class MiniMaxM2(Decoder):
    """Experts in every layer under Mixtral's names."""

    title = "MiniMax M2"
    arch = "minimax-m2"
    architectures = ("MiniMaxM2ForCausalLM",)
    layer = (ATTN_NORM, *attention(), *qk_norms("q", "kv"), FFN_NORM)
    routed = (*Mixtral.routed, Row("exp_probs_b.bias", _BIAS, "router_bias", "experts"))

    def check(self, config: Config) -> None:
        """The kind of norm is an option that llama.cpp does not have."""
        super().check(config)
        if config.string("qk_norm_type", "per_layer") != "per_layer":
            refuse("qk_norm_type is not per_layer")

    def kvs(self, config: Config) -> dict[str, Kv]:
        """Also the rotated part of a head, and how experts are chosen."""
        rotated = config.count("rotary_dim", int(head_dim(config) * rotary_share(config, 1.0)))
        return super().kvs(config) | {
            "rope.dimension_count": u32(rotated),
            "expert_gating_func": u32(gating(config, "sigmoid")),
            "expert_feed_forward_length": u32(config.count("intermediate_size")),
        }
