"""Qwen 2, 2.5 and 3, with and without experts. GGUF `qwen2`, `qwen3`, `qwen3moe`."""

from __future__ import annotations

from quantkit.arch.base import Config, refuse
from quantkit.arch.decoder import (
    ATTN_NORM,
    EXPERTS,
    FFN_NORM,
    ROUTER,
    Decoder,
    attention,
    qk_norms,
)
from quantkit.container.kv import u32
from quantkit.types import Kv


class Qwen2(Decoder):
    """Biases on queries, keys and values."""

    title = "Qwen 2, 2.5"
    arch = "qwen2"
    architectures: tuple[str, ...] = ("Qwen2ForCausalLM",)
    layer = (ATTN_NORM, *attention(biases="qkv"), FFN_NORM)


class Qwen3(Decoder):
    """Norms on the heads of queries and keys instead."""

    title = "Qwen 3"
    arch = "qwen3"
    architectures: tuple[str, ...] = ("Qwen3ForCausalLM",)
    layer = (ATTN_NORM, *attention(), *qk_norms(), FFN_NORM)


class Qwen3Moe(Qwen3):
    """Experts in every layer, none shared."""

    title = "Qwen 3 MoE"
    arch = "qwen3moe"
    architectures = ("Qwen3MoeForCausalLM",)
    routed = (ROUTER, *EXPERTS)

    def check(self, config: Config) -> None:
        """llama.cpp has experts in every layer and always makes their weights sum to one."""
        super().check(config)
        if config.text.get("mlp_only_layers") or config.count("decoder_sparse_step", 1) != 1:
            refuse("layers without experts: llama.cpp's qwen3moe has them in every layer")
        if not config.flag("norm_topk_prob", False):
            refuse("norm_topk_prob is false: llama.cpp's qwen3moe always renormalises")

    def kvs(self, config: Config) -> dict[str, Kv]:
        """Also the experts' width."""
        width = config.count("moe_intermediate_size")
        return super().kvs(config) | {"expert_feed_forward_length": u32(width)}
