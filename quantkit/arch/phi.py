"""Phi 3, 3.5 and 4: projections stored fused, and kept so. GGUF `phi3`."""

from __future__ import annotations

from math import log, sqrt

from quantkit.arch.base import Advice, Config, refuse
from quantkit.arch.decoder import ATTN_NORM, FFN_NORM, Decoder, Row, head_dim
from quantkit.arch.rope import LONG, factors, rotary_share, scaling
from quantkit.container.kv import f32, u32
from quantkit.errors import SourceError
from quantkit.types import Kv, TensorSpec


class Phi3(Decoder):
    """Long-context ones have two sets of rope factors, chosen by the length of the context."""

    title = "Phi 3, 3.5, 4"
    arch = "phi3"
    architectures = ("Phi3ForCausalLM",)
    long_rope = True
    layer = (
        ATTN_NORM,
        Row("attn_qkv.weight", "self_attn.qkv_proj.weight", "attention.qkv", "qkv hidden"),
        Row("attn_output.weight", "self_attn.o_proj.weight", "attention.output", "hidden q"),
        FFN_NORM,
    )
    dense = (
        # Gate rows before up rows.
        Row("ffn_up.weight", "mlp.gate_up_proj.weight", "dense_ffn.up", "gate_up hidden"),
        Row("ffn_down.weight", "mlp.down_proj.weight", "dense_ffn.down", "hidden ffn"),
    )

    def check(self, config: Config) -> None:
        """llama.cpp wants heads that make up the hidden size."""
        super().check(config)
        if config.count("num_attention_heads") * head_dim(config) != config.count("hidden_size"):
            refuse("the heads are not as wide as the hidden size")

    def sizes(self, config: Config) -> dict[str, int]:
        """Also the fused ones."""
        sizes = super().sizes(config)
        return sizes | {"qkv": sizes["q"] + 2 * sizes["kv"], "gate_up": 2 * sizes["ffn"]}

    def rope_tensors(self, config: Config) -> list[TensorSpec]:
        """The factors of LongRoPE (arXiv 2402.13753)."""
        found = scaling(config)
        if found is None or found[0] not in LONG:
            return []
        n_rotated = _n_rotated(config)
        return [
            factors(f"rope_factors_{name}.weight", found[1].text.get(f"{name}_factor"), n_rotated)
            for name in ("long", "short")
        ]

    def kvs(self, config: Config) -> dict[str, Kv]:
        """Also the factor by which LongRoPE raises cos and sin."""
        kvs = super().kvs(config) | {
            "rope.dimension_count": u32(_n_rotated(config)),
            "attention.sliding_window": u32(config.count("sliding_window", 0)),
        }
        n_ctx = config.count("max_position_embeddings")
        found = scaling(config)
        n_original = config.count(
            "original_max_position_embeddings",
            found[1].count("original_max_position_embeddings", n_ctx) if found else n_ctx,
        )
        if n_original < 2:
            raise SourceError(f"original_max_position_embeddings {n_original}", where="config.json")
        kvs["rope.scaling.original_context_length"] = u32(n_original)
        if found:
            larger = max(1.0, n_ctx / n_original)
            factor = sqrt(1 + log(larger) / log(n_original))
            kvs["rope.scaling.attn_factor"] = f32(factor)
        return kvs

    def advice(self, config: Config) -> tuple[Advice, ...]:
        """Phi 3 mini was trained with a window that llama.cpp does not use."""
        window = config.count("sliding_window", 0)
        if not 0 < window < config.count("max_position_embeddings"):
            return ()
        reason = f"attention reaches back {window} tokens; llama.cpp lets it reach further"
        return (Advice(f"--ctx-size {window}", reason),)


def _n_rotated(config: Config) -> int:
    return int(head_dim(config) * rotary_share(config, 1.0))
