"""Llama 2/3, Mistral, SmolLM2: grouped-query attention and a SwiGLU MLP. GGUF `llama`.

llama.cpp rotates adjacent pairs, Hugging Face rotates halves, so the rows of q and k are
interleaved head by head.
"""

from __future__ import annotations

from quantkit.arch.base import Config, Model, WeightMap, ends, matrix, norm, swiglu, whole
from quantkit.arch.rope import rope_freqs, rope_kvs
from quantkit.container.kv import f32, u32
from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import GgmlType, Kv, Slab, SlabOp, TensorSpec, Weight

ARCH = "llama"


class Llama:
    """The `llama` family."""

    architectures = ("LlamaForCausalLM", "MistralForCausalLM")

    def describe(self, config: Config, weights: WeightMap) -> Model:
        """See `Family.describe`."""
        if config.string("hidden_act", "silu") != "silu":
            raise UnsupportedError("hidden_act is not silu", where="config.json")
        for name in weights.names():
            if name.endswith(".rotary_emb.inv_freq"):
                weights.ignore(name, "recomputed at run time")
        embedding, head = ends(config, weights)
        tensors = [embedding]
        if freqs := rope_freqs(config, _head_dim(config)):
            tensors.append(freqs)
        for i in range(config.count("num_hidden_layers")):
            tensors += self._layer(config, weights, i)
        tensors += head
        weights.refuse_leftovers("Llama")
        return Model(ARCH, tuple(tensors), self._kvs(config), ignored=weights.ignored)

    def _layer(self, config: Config, weights: WeightMap, i: int) -> list[TensorSpec]:
        hidden, width = config.count("hidden_size"), config.count("intermediate_size")
        n_heads, head_dim = config.count("num_attention_heads"), _head_dim(config)
        n_kv = config.count("num_key_value_heads", n_heads)
        hf, blk = f"layers.{i}.", f"blk.{i}."
        before = weights.take(f"{hf}input_layernorm.weight", hidden)
        after = weights.take(f"{hf}post_attention_layernorm.weight", hidden)
        tensors = [norm(f"{blk}attn_norm.weight", i, before)]
        for part, rows in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
            name = f"{hf}self_attn.{part}_proj"
            weight = weights.take(f"{name}.weight", rows * head_dim, hidden)
            heads = 0 if part == "v" else rows
            tensors.append(
                _rotated(f"{blk}attn_{part}.weight", f"attention.{part}", i, weight, heads)
            )
            if f"{name}.bias" in weights:
                offset = weights.take(f"{name}.bias", rows * head_dim)
                tensors.append(
                    _rotated(f"{blk}attn_{part}.bias", f"attention.{part}", i, offset, heads)
                )
        out = weights.take(f"{hf}self_attn.o_proj.weight", hidden, n_heads * head_dim)
        tensors += [
            matrix(f"{blk}attn_output.weight", "attention.output", i, out),
            norm(f"{blk}ffn_norm.weight", i, after),
        ]
        tensors += swiglu(weights, f"{hf}mlp.", blk, "dense_ffn", i, (width, hidden))
        return tensors

    def _kvs(self, config: Config) -> dict[str, Kv]:
        n_heads, head_dim = config.count("num_attention_heads"), _head_dim(config)
        kvs = {
            "vocab_size": u32(config.count("vocab_size")),
            "block_count": u32(config.count("num_hidden_layers")),
            "context_length": u32(config.count("max_position_embeddings")),
            "embedding_length": u32(config.count("hidden_size")),
            "feed_forward_length": u32(config.count("intermediate_size")),
            "attention.head_count": u32(n_heads),
            "attention.head_count_kv": u32(config.count("num_key_value_heads", n_heads)),
            "attention.layer_norm_rms_epsilon": f32(config.number("rms_norm_eps", 1e-6)),
            "rope.dimension_count": u32(head_dim),
        }
        if config.has("head_dim"):
            kvs["attention.key_length"] = u32(head_dim)
            kvs["attention.value_length"] = u32(head_dim)
        kvs |= rope_kvs(config)
        return {f"{ARCH}.{key}": kv for key, kv in kvs.items()}


def _head_dim(config: Config) -> int:
    hidden, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    if n_heads == 0:
        raise SourceError("num_attention_heads is 0", where="config.json")
    head_dim = config.count("head_dim", hidden // n_heads)
    if head_dim % 2:
        raise SourceError(f"head_dim {head_dim} is odd", where="config.json")
    return head_dim


def _rotated(name: str, role: str, layer: int, weight: Weight, n_heads: int) -> TensorSpec:
    """Rows of q or k, interleaved head by head; `n_heads` 0 leaves them as they are (v)."""
    keep = GgmlType.F32 if len(weight.shape) == 1 else None
    if not n_heads:
        return TensorSpec(name, role, layer, weight.shape, whole(weight), keep=keep)
    per_head = weight.shape[0] // n_heads
    slabs = tuple(
        Slab(weight, h * per_head, (h + 1) * per_head, SlabOp.INTERLEAVE) for h in range(n_heads)
    )
    return TensorSpec(name, role, layer, weight.shape, slabs, keep=keep)
