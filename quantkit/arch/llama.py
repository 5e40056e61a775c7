"""Llama 2/3, Mistral, SmolLM2, and Mixtral with its experts. GGUF `llama`.

llama.cpp rotates adjacent pairs, Hugging Face rotates halves, so the rows of q and k are
interleaved head by head.
"""

from __future__ import annotations

from quantkit.arch.base import Advice, Config
from quantkit.arch.decoder import ATTN_NORM, FFN_NORM, Decoder, Row, attention, head_dim
from quantkit.container.kv import u32
from quantkit.types import Kv

_EXPERT = "block_sparse_moe.experts.{e}."


class Llama(Decoder):
    """The `llama` family without experts."""

    title = "Llama, Mistral"
    arch = "llama"
    architectures: tuple[str, ...] = ("LlamaForCausalLM", "MistralForCausalLM")
    layer = (ATTN_NORM, *attention(biases="qkvo", adjacent=True), FFN_NORM)

    def kvs(self, config: Config) -> dict[str, Kv]:
        """Also the vocabulary's size, by which llama.cpp tells some models apart."""
        return super().kvs(config) | {
            "vocab_size": u32(config.count("vocab_size")),
            "rope.dimension_count": u32(head_dim(config)),
        }

    def advice(self, config: Config) -> tuple[Advice, ...]:
        """Mistral 7B v0.1 was trained with a window that llama.cpp does not know of."""
        window = config.count("sliding_window", 0)
        if not 0 < window < config.count("max_position_embeddings"):
            return ()
        reason = f"attention reaches back {window} tokens; llama.cpp lets it reach further"
        return (Advice(f"--ctx-size {window}", reason),)


class Mixtral(Llama):
    """The `llama` family with experts in every layer."""

    title = "Mixtral"
    architectures = ("MixtralForCausalLM",)
    routed = (
        Row("ffn_gate_inp.weight", "block_sparse_moe.gate.weight", "router", "experts hidden"),
        Row("ffn_gate_exps.weight", f"{_EXPERT}w1.weight", "routed_expert.gate", "ffn hidden"),
        Row("ffn_up_exps.weight", f"{_EXPERT}w3.weight", "routed_expert.up", "ffn hidden"),
        Row("ffn_down_exps.weight", f"{_EXPERT}w2.weight", "routed_expert.down", "hidden ffn"),
    )
