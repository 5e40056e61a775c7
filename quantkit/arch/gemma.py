"""Gemma 2 and 3: norms around both halves of a layer, windows on most layers, tied head.

GGUF `gemma2`, `gemma3`. llama.cpp scales the embedding itself.
"""

from __future__ import annotations

from math import isclose
from types import MappingProxyType

from quantkit.arch.base import Config, refuse
from quantkit.arch.decoder import ATTN_NORM, Decoder, Row, attention, head_dim, qk_norms
from quantkit.arch.windows import check_pattern
from quantkit.container.kv import f32, u32
from quantkit.types import Kv

_NORMS = (
    ATTN_NORM,
    Row("post_attention_norm.weight", "post_attention_layernorm.weight", "norm", "hidden"),
    Row("ffn_norm.weight", "pre_feedforward_layernorm.weight", "norm", "hidden"),
    Row("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "norm", "hidden"),
)


class Gemma2(Decoder):
    """Soft caps on scores and logits; every other layer has a window."""

    title = "Gemma 2"
    arch = "gemma2"
    architectures: tuple[str, ...] = ("Gemma2ForCausalLM",)
    layer = (*_NORMS, *attention())
    activation = "gelu_pytorch_tanh"
    norm_plus_one = True
    defaults = MappingProxyType({"tie_word_embeddings": True, "sliding_window": 4096})
    period = 2  # the last of so many layers attends to everything
    largest = 46  # layers of the 27B, whose scores llama.cpp scales by hidden size over heads

    def check(self, config: Config) -> None:
        """llama.cpp derives the pattern of windows and the scale of scores by itself."""
        super().check(config)
        n_layers, hidden = config.count("num_hidden_layers"), config.count("hidden_size")
        check_pattern(config, self.arch, lambda i: i % self.period < self.period - 1)
        scale = head_dim(config)
        if n_layers == self.largest:
            scale = hidden // config.count("num_attention_heads")
        if not isclose(config.number("query_pre_attn_scalar", scale), scale):
            refuse(
                f"query_pre_attn_scalar {config.number('query_pre_attn_scalar'):g}: llama.cpp's "
                f"{self.arch} would scale scores by 1/sqrt({scale})"
            )
        if not config.flag("tie_word_embeddings", True):
            refuse(f"llama.cpp's {self.arch} has no head of its own")

    def kvs(self, config: Config) -> dict[str, Kv]:
        """Also caps and window."""
        kvs = super().kvs(config) | {
            "attention.sliding_window": u32(config.count("sliding_window"))
        }
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        return kvs | {key: f32(config.number(key)) for key in caps if config.has(key)}


class Gemma3(Gemma2):
    """Norms on the heads of queries and keys instead of the cap on scores; two rope bases."""

    title = "Gemma 3 (text)"
    arch = "gemma3"
    architectures = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    layer = (*_NORMS, *attention(), *qk_norms())
    # The published 4B says little more than its size; the rest is transformers' defaults.
    defaults = MappingProxyType(
        {
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        }
    )
    period = 6
    largest = 62

    def check(self, config: Config) -> None:
        """See `Gemma2`."""
        super().check(config)
        if config.has("attn_logit_softcapping"):
            refuse("attn_logit_softcapping: llama.cpp's gemma3 has none")
