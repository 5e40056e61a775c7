"""gpt-oss: sinks, biases everywhere, windows on every other layer. GGUF `gpt-oss`.

Experts come stacked, gate and up rows taking turns: as MXFP4 blocks, rows first, or (as
transformers saves them) as floats, columns first.
"""

from __future__ import annotations

from quantkit.arch.base import Config, WeightMap, refuse
from quantkit.arch.decoder import ATTN_NORM, Decoder, Row, attention, n_experts
from quantkit.arch.windows import check_pattern
from quantkit.container.kv import u32
from quantkit.types import GgmlType, Kv, Slab, SlabOp, TensorSpec, Weight, WeightFormat

_FLOATS = (WeightFormat.F32, WeightFormat.F16, WeightFormat.BF16)
# Part -> (source, what to take of MXFP4 rows, of float columns, of a bias)
_PARTS = {
    "gate": ("gate_up_proj", SlabOp.EVEN_ROWS, SlabOp.EVEN_COLUMNS_AS_ROWS, SlabOp.EVEN_COLUMNS),
    "up": ("gate_up_proj", SlabOp.ODD_ROWS, SlabOp.ODD_COLUMNS_AS_ROWS, SlabOp.ODD_COLUMNS),
    "down": ("down_proj", SlabOp.COPY, SlabOp.TRANSPOSE, SlabOp.COPY),
}


class GptOss(Decoder):
    """Experts in every layer, the activation clamped."""

    title = "gpt-oss"
    arch = "gpt-oss"
    architectures = ("GptOssForCausalLM",)
    layer = (
        ATTN_NORM,
        *attention(biases="qkvo"),
        Row("attn_sinks.weight", "self_attn.sinks", "sinks", "heads"),
        # This architecture calls the norm before the feed-forward so.
        Row("post_attention_norm.weight", "post_attention_layernorm.weight", "norm", "hidden"),
    )
    routed = (
        Row("ffn_gate_inp.weight", "mlp.router.weight", "router", "experts hidden", bias=True),
    )

    def check(self, config: Config) -> None:
        """llama.cpp has the activation's constants and the pattern of windows built in."""
        super().check(config)
        check_pattern(config, self.arch, lambda i: i % 2 == 0)
        alpha, limit = config.number("swiglu_alpha", 1.702), config.number("swiglu_limit", 7.0)
        if (alpha, limit) != (1.702, 7.0):
            refuse(f"swiglu_alpha {alpha:g}, swiglu_limit {limit:g}: llama.cpp has 1.702 and 7")

    def more(self, config: Config, weights: WeightMap, i: int) -> list[TensorSpec]:
        """The experts."""
        return [tensor for part in _PARTS for tensor in _experts(config, weights, i, part)]

    def kvs(self, config: Config) -> dict[str, Kv]:
        """Also the window and the experts' width."""
        return super().kvs(config) | {
            "attention.sliding_window": u32(config.count("sliding_window")),
            "expert_feed_forward_length": u32(config.count("intermediate_size")),
        }


def _experts(config: Config, weights: WeightMap, i: int, part: str) -> list[TensorSpec]:
    """One matrix of all experts, and its biases."""
    hidden, width = config.count("hidden_size"), config.count("intermediate_size")
    count = n_experts(config)
    source, of_rows, of_columns, of_bias = _PARTS[part]
    n_out, n_in = (hidden, width) if part == "down" else (width, hidden)
    stored = n_out if part == "down" else 2 * n_out
    name = f"layers.{i}.mlp.experts.{source}"
    if weights.format(name) in _FLOATS:
        weight, per_expert, op = weights.take(name, count, n_in, stored), n_in, of_columns
    else:
        weight, per_expert, op = weights.take(name, count, stored, n_in), stored, of_rows
    gguf, role = f"blk.{i}.ffn_{part}_exps", f"routed_expert.{part}"
    slabs = tuple(Slab(weight, e * per_expert, (e + 1) * per_expert, op) for e in range(count))
    bias: Weight = weights.take(f"{name}_bias", count, stored)
    return [
        TensorSpec(f"{gguf}.weight", role, i, (count, n_out, n_in), slabs),
        TensorSpec(
            f"{gguf}.bias",
            role,
            i,
            (count, n_out),
            (Slab(bias, 0, count, of_bias),),
            keep=GgmlType.F32,
        ),
    ]
