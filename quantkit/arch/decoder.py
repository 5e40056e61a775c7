"""A decoder described by tables: what most families are.

A family is a subclass: names, `Row`s, and the few numbers that its own keys need. The tables say
both names of a tensor, its role and its shape in the words of `sizes`; everything else follows
(slabs, experts stacked, biases, what stays F32).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from quantkit.arch.base import (
    Advice,
    Config,
    Model,
    WeightMap,
    ends,
    refuse,
    stack,
)
from quantkit.arch.rope import rope_freqs, rope_kvs
from quantkit.container.kv import f32, u32
from quantkit.errors import SourceError
from quantkit.types import GgmlType, Kv, Slab, SlabOp, TensorSpec, Weight

_KEPT = frozenset({"norm", "router", "router_bias", "sinks"})  # roles that stay F32
_LAYER = re.compile(r"layers\.(\d+)\.")
_VISION = ("vision_tower.", "vision_model.", "visual.", "mm_projector.", "multi_modal_projector.")
_GATING = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of tensor that a layer has.

    `gguf` is its name behind `blk.N.`, `hf` the checkpoint's behind `layers.N.`, where `{e}`
    stands for an expert's number. `shape` names sizes, rows first. With `bias`, a bias of the
    same name goes along where there is one. `heads` names the number of heads whose rows
    llama.cpp wants as adjacent rope pairs.
    """

    gguf: str
    hf: str
    role: str
    shape: str
    bias: bool = False
    heads: str = ""
    optional: bool = False


def attention(*, biases: str = "", adjacent: bool = False) -> tuple[Row, ...]:
    """Grouped-query attention; `biases` are the letters of those that may have one."""
    sizes = {"q": ("q hidden", "heads"), "k": ("kv hidden", "kv_heads"), "v": ("kv hidden", "")}
    rows = [
        Row(
            f"attn_{part}.weight",
            f"self_attn.{part}_proj.weight",
            f"attention.{part}",
            shape,
            bias=part in biases,
            heads=heads if adjacent else "",
        )
        for part, (shape, heads) in sizes.items()
    ]
    output = Row(
        "attn_output.weight", "self_attn.o_proj.weight", "attention.output", "hidden q",
        bias="o" in biases,
    )  # fmt: skip
    return (*rows, output)


def qk_norms(q: str = "head", k: str = "head", *, optional: bool = False) -> tuple[Row, ...]:
    """Norms of queries and keys: per head, or as wide as `q` and `k` say."""
    return (
        Row("attn_q_norm.weight", "self_attn.q_norm.weight", "norm", q, optional=optional),
        Row("attn_k_norm.weight", "self_attn.k_norm.weight", "norm", k, optional=optional),
    )


def swiglu_rows(hf: str, role: str, suffix: str, width: str) -> tuple[Row, ...]:
    """Gate, up and down; `hf` has `{part}` for their name."""
    shapes = {"gate": f"{width} hidden", "up": f"{width} hidden", "down": f"hidden {width}"}
    return tuple(
        Row(f"ffn_{part}{suffix}.weight", hf.format(part=part, e="{e}"), f"{role}.{part}", shape)
        for part, shape in shapes.items()
    )


ATTN_NORM = Row("attn_norm.weight", "input_layernorm.weight", "norm", "hidden")
FFN_NORM = Row("ffn_norm.weight", "post_attention_layernorm.weight", "norm", "hidden")
SWIGLU = swiglu_rows("mlp.{part}_proj.weight", "dense_ffn", "", "ffn")
ROUTER = Row("ffn_gate_inp.weight", "mlp.gate.weight", "router", "experts hidden")
EXPERTS = swiglu_rows("mlp.experts.{e}.{part}_proj.weight", "routed_expert", "_exps", "expert_ffn")


class Decoder:
    """A family as tables; see `Family`. Subclasses set the attributes and extend the methods."""

    title: str
    arch: str
    architectures: tuple[str, ...]
    layer: tuple[Row, ...] = ()
    dense: tuple[Row, ...] = SWIGLU
    routed: tuple[Row, ...] = ()
    defaults: Mapping[str, Any] = MappingProxyType({})  # what a config may leave out
    activation = "silu"
    long_rope = False  # LongRoPE's two sets of factors are known
    norm_plus_one = False  # the checkpoint's norms lack the 1 that they are used with

    def describe(self, config: Config, weights: WeightMap) -> Model:
        """See `Family.describe`."""
        config = config.over(self.defaults)
        self.check(config)
        n_layers = config.count("num_hidden_layers")
        ignore_unused(weights, n_layers)
        embedding, head = ends(config, weights)
        sizes = self.sizes(config)
        tensors = [embedding, *self.rope_tensors(config)]
        n_dense = self.n_dense(config)
        for i in range(n_layers):
            rows = self.layer + (self.dense if i < n_dense else self.routed)
            for row in rows:
                tensors += _tensors(row, i, sizes, weights)
            tensors += self.more(config, weights, i)
        tensors += head
        weights.refuse_leftovers(self.title)
        if self.norm_plus_one:
            tensors = [_plus_one(t) if t.role == "norm" else t for t in tensors]
        kvs = {f"{self.arch}.{key}": kv for key, kv in self.kvs(config).items()}
        return Model(self.arch, tuple(tensors), kvs, self.advice(config), weights.ignored)

    def check(self, config: Config) -> None:
        """Refuse what llama.cpp would run differently."""
        name = config.string("hidden_act", config.string("hidden_activation", self.activation))
        if name != self.activation:
            refuse(f"hidden_act {name!r}: llama.cpp's {self.arch} computes {self.activation}")
        if config.flag("use_sliding_window", False):
            refuse(f"use_sliding_window: llama.cpp's {self.arch} attends to everything")

    def sizes(self, config: Config) -> dict[str, int]:
        """The words that shapes are written in."""
        n_heads, dim = config.count("num_attention_heads"), head_dim(config)
        n_kv = config.count("num_key_value_heads", n_heads)
        sizes = {
            "hidden": config.count("hidden_size"),
            "heads": n_heads,
            "kv_heads": n_kv,
            "head": dim,
            "q": n_heads * dim,
            "kv": n_kv * dim,
            "ffn": config.count("intermediate_size"),
        }
        if self.routed:
            sizes["experts"] = n_experts(config)
            sizes["expert_ffn"] = config.count("moe_intermediate_size", sizes["ffn"])
            sizes["shared_ffn"] = sizes["expert_ffn"] * config.count("n_shared_experts", 0)
        return sizes

    def n_dense(self, config: Config) -> int:
        """How many layers, from the first on, have no experts."""
        return 0 if self.routed else config.count("num_hidden_layers")

    def rope_tensors(self, config: Config) -> Sequence[TensorSpec]:
        """Frequency divisors that no key can say: Llama 3's."""
        freqs = rope_freqs(config, head_dim(config))
        return [freqs] if freqs else []

    def more(self, config: Config, weights: WeightMap, i: int) -> Sequence[TensorSpec]:
        """Tensors of a layer that no row can say."""
        return ()

    def advice(self, config: Config) -> tuple[Advice, ...]:
        """What somebody who runs the file has to know."""
        return ()

    def kvs(self, config: Config) -> dict[str, Kv]:
        """Architecture keys without the prefix: those that llama.cpp's converter always writes."""
        kvs = {
            "block_count": u32(config.count("num_hidden_layers")),
            "context_length": u32(config.count("max_position_embeddings")),
            "embedding_length": u32(config.count("hidden_size")),
            "feed_forward_length": u32(config.count("intermediate_size")),
            "attention.head_count": u32(config.count("num_attention_heads")),
            "attention.head_count_kv": u32(
                config.count("num_key_value_heads", config.count("num_attention_heads"))
            ),
            "attention.layer_norm_rms_epsilon": f32(config.number("rms_norm_eps", 1e-6)),
        }
        if config.has("head_dim"):
            kvs["attention.key_length"] = u32(head_dim(config))
            kvs["attention.value_length"] = u32(head_dim(config))
        if self.routed:
            kvs["expert_count"] = u32(n_experts(config))
            kvs["expert_used_count"] = u32(config.count("num_experts_per_tok"))
        if config.has("scoring_func"):
            kvs["expert_gating_func"] = u32(gating(config))
        for key, name in (
            ("n_group", "expert_group_count"),
            ("topk_group", "expert_group_used_count"),
        ):
            if config.has(key):
                kvs[name] = u32(config.count(key))
        return kvs | rope_kvs(config, long_rope=self.long_rope)


def head_dim(config: Config) -> int:
    """Width of a head, as given or as what the hidden size leaves to each."""
    hidden, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    if n_heads == 0:
        raise SourceError("num_attention_heads is 0", where="config.json")
    dim = config.count("head_dim", hidden // n_heads)
    if dim % 2:
        raise SourceError(f"head_dim {dim} is odd", where="config.json")
    return dim


def n_experts(config: Config) -> int:
    """Number of routed experts, under any of the names that families have for it."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.has(key):
            return config.count(key)
    raise SourceError("num_experts is missing", where="config.json")


def gating(config: Config, default: str | None = None) -> int:
    """llama.cpp's number for `scoring_func`."""
    name = config.string("scoring_func", default)
    if name not in _GATING:
        refuse(f"scoring_func {name!r} is not known")
    return _GATING[name]


def ignore_unused(weights: WeightMap, n_layers: int) -> None:
    """Leave out, with a reason each, what a text model in llama.cpp has no use for."""
    for name in list(weights.names()):
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= n_layers:
            weights.ignore(name, "multi-token prediction; llama.cpp does not run it here")
        elif name.startswith(_VISION):
            weights.ignore(name, "vision; goes into the mmproj file")
        elif name.endswith(".rotary_emb.inv_freq"):
            weights.ignore(name, "recomputed at run time")


def _tensors(row: Row, i: int, sizes: dict[str, int], weights: WeightMap) -> Iterator[TensorSpec]:
    """A row's tensor in layer `i`, and its bias."""
    shape = [sizes[word] for word in row.shape.split()]
    hf, name = f"layers.{i}.{row.hf}", f"blk.{i}.{row.gguf}"
    if "{e}" in row.hf:
        experts = [weights.take(hf.format(e=e), *shape) for e in range(sizes["experts"])]
        yield stack(name, row.role, i, experts)
        return
    if row.optional and hf not in weights:
        return
    n_heads = sizes[row.heads] if row.heads else 0
    yield _tensor(name, row.role, i, weights.take(hf, *shape), n_heads)
    bias = hf.removesuffix(".weight") + ".bias"
    if row.bias and bias in weights:
        weight = weights.take(bias, shape[0])
        yield _tensor(name.removesuffix(".weight") + ".bias", row.role, i, weight, n_heads)


def _tensor(name: str, role: str, layer: int, weight: Weight, n_heads: int) -> TensorSpec:
    """All of a weight; with `n_heads`, halves of every head's rows become adjacent pairs."""
    keep = GgmlType.F32 if len(weight.shape) == 1 or role in _KEPT else None
    n_rows = weight.shape[0]
    step = n_rows // n_heads if n_heads else n_rows
    op = SlabOp.INTERLEAVE if n_heads else SlabOp.COPY
    slabs = tuple(Slab(weight, row, row + step, op) for row in range(0, n_rows, max(1, step)))
    return TensorSpec(name, role, layer, weight.shape, slabs, keep=keep)


def _plus_one(tensor: TensorSpec) -> TensorSpec:
    slabs = tuple(replace(slab, op=SlabOp.PLUS_ONE) for slab in tensor.slabs)
    return replace(tensor, slabs=slabs)
