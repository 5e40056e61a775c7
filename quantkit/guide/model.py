"""What has to be known of a model to say how it runs: sizes of tensors, and a few of its numbers.

The same for a planned file and for one that is there. Metadata of a file are not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite

from quantkit.container.names import shown
from quantkit.errors import GgufError
from quantkit.types import GgmlType, Kv, Kvs, KvType

_MAX_LAYERS = 4096  # models have a hundred or so
_MAX_WIDTH = 1 << 24
_WHOLE = {KvType.U8, KvType.I8, KvType.U16, KvType.I16, KvType.U32, KvType.I32, KvType.U64}
_LAYER = re.compile(r"blk\.(\d{1,4})\.")
_EXPERT = re.compile(r"\.(ffn_(?:up|down|gate|gate_up)_exps)\.")
_SAMPLING = ("temp", "top_k", "top_p", "min_p", "penalty_repeat")
_JINJA_OPENING = re.compile(r"\{[{%#]")
_JINJA_TOKEN = re.compile(
    r"""'[^']*'?|"[^"]*"?|[}%]\}|(?<![.\w])(?P<name>enable_thinking|thinking)\b"""
)
_KIMI_THINKING = {"temp": 1.0, "top_p": 0.95, "min_p": 0.01}
_KIMI_INSTANT = {"temp": 0.6}
# ggml has no CUDA kernels for them: on that device they would go back and forth.
NOT_ON_CUDA = frozenset({GgmlType.TQ1_0, GgmlType.TQ2_0})


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of the file; `expert` is `ffn_down_exps` and the like, None for other tensors."""

    name: str
    type: GgmlType
    n_bytes: int

    @property
    def layer(self) -> int | None:
        """The number after `blk.`."""
        found = _LAYER.match(self.name)
        return int(found[1]) if found else None

    @property
    def expert(self) -> str | None:
        """The kind of routed expert that the tensor stacks."""
        found = _EXPERT.search(self.name)
        return found[1] if found else None

    @property
    def is_input(self) -> bool:
        """Looked up, not multiplied: llama.cpp leaves it in RAM."""
        return self.name.startswith(("token_embd", "token_types", "position_embd"))


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's numbers. `cache_rows` holds, by layer, the widths that one token caches.

    With multi-head latent attention that is one row, latent and rotated key (576 in Kimi K2.5);
    else keys and values, each `head_count_kv * length` wide.
    """

    n_layers: int
    n_ctx: int
    hidden: int
    n_vocab: int
    n_experts: int
    n_used: int
    cache_rows: tuple[tuple[int, ...], ...]
    is_mla: bool


@dataclass(frozen=True, slots=True)
class Tip:
    """llama.cpp flags that this model needs, and why."""

    flag: str
    reason: str


@dataclass(frozen=True)
class Model:
    """A file or shard set, there or planned. `files` are names, or paths, in order.

    `sampling` are the defaults in the file, `instant` what differs with thinking off. `switch` is
    the variable of the chat template that turns thinking off. `mmproj` is (file, bytes).
    """

    name: str
    arch: str
    files: tuple[str, ...]
    n_bytes: int
    tensors: tuple[Held, ...]
    shape: Shape
    sampling: Mapping[str, float] = field(default_factory=dict)
    instant: Mapping[str, float] = field(default_factory=dict)
    switch: str | None = None
    mmproj: tuple[str, int] | None = None
    tips: tuple[Tip, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def experts(self) -> tuple[Held, ...]:
        """Tensors of routed experts, layer by layer."""
        found = [tensor for tensor in self.tensors if tensor.expert and tensor.layer is not None]
        return tuple(sorted(found, key=lambda t: (t.layer or 0, t.name)))

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def read_shape(kvs: Kvs, *, where: str) -> Shape:
    """The numbers in GGUF metadata. `GgufError` where one is missing or cannot be meant."""
    kv = kvs.get("general.architecture")
    if kv is None or kv.type is not KvType.STRING:
        raise GgufError("general.architecture is missing", where=where)
    keys = _Keys(kvs, str(kv.value), where)
    n_layers = keys.count("block_count", most=_MAX_LAYERS)
    hidden = keys.count("embedding_length")
    n_experts = keys.count("expert_count", 0)
    is_mla = f"{kv.value}.attention.key_length_mla" in kvs
    return Shape(
        n_layers=n_layers,
        n_ctx=keys.count("context_length"),
        hidden=hidden,
        n_vocab=keys.count("vocab_size", _n_tokens(kvs)),
        n_experts=n_experts,
        n_used=keys.count("expert_used_count", 0, most=max(n_experts, 1)),
        cache_rows=_cache_rows(keys, n_layers, hidden, is_mla=is_mla),
        is_mla=is_mla,
    )


def read_sampling(kvs: Kvs) -> dict[str, float]:
    """`general.sampling.*` as far as llama.cpp's command line has an option for it."""
    chosen = {}
    for key in _SAMPLING:
        kv = kvs.get(f"general.sampling.{key}")
        if kv and kv.type in {*_WHOLE, KvType.F32, KvType.F64} and isfinite(kv.value):
            chosen[key] = float(f"{kv.value:.7g}")  # what an f32 holds
    return chosen


def with_recommended_sampling(model: Model, kvs: Kvs) -> Model:
    """Kimi K2.5 and later, told by tokenizer and switch, get Moonshot's values where they lack any.

    Neither its generation_config.json nor a recipe for many models says them.
    """
    pre = kvs.get("tokenizer.ggml.pre")
    if model.switch is None or pre is None or pre.value != "kimi-k2":
        return model
    sampling, instant = model.sampling or _KIMI_THINKING, model.instant or _KIMI_INSTANT
    return replace(model, sampling=sampling, instant=instant)


def thinking_switch(template: str | None) -> str | None:
    """Which variable a Jinja chat template asks whether to think: in statements, not in its text.

    None for a template without one.
    """
    text, at = template or "", 0
    while opening := _JINJA_OPENING.search(text, at):
        if opening[0] == "{#":
            at = text.find("#}", opening.end())
            if at < 0:
                return None
            continue
        for token in _JINJA_TOKEN.finditer(text, opening.end()):
            if token["name"]:
                return token["name"]
            if token[0] == {"{{": "}}", "{%": "%}"}[opening[0]]:
                at = token.end()
                break
        else:
            return None
    return None


class _Keys:
    """Counts of one architecture, bounded."""

    def __init__(self, kvs: Kvs, arch: str, where: str) -> None:
        self._kvs, self._arch, self._where = kvs, arch, where

    def count(self, name: str, default: int | None = None, most: int = _MAX_WIDTH) -> int:
        kv = self._kvs.get(f"{self._arch}.{name}")
        if kv is None:
            if default is None:
                raise GgufError(f"{shown(self._arch)}.{name} is missing", where=self._where)
            return default
        return self._bounded(name, kv.value if kv.type in _WHOLE else None, most)

    def per_layer(self, name: str, default: int, n_layers: int) -> list[int]:
        """A count for all layers, or an array with one for each."""
        kv = self._kvs.get(f"{self._arch}.{name}")
        if kv is None or kv.type is not KvType.ARRAY:
            return [self.count(name, default)] * n_layers
        if len(kv.value) != n_layers or kv.item not in _WHOLE:
            raise GgufError(
                f"{shown(self._arch)}.{name} should hold {n_layers} whole numbers",
                where=self._where,
            )
        return [self._bounded(name, value, _MAX_WIDTH) for value in kv.value]

    def _bounded(self, name: str, value: int | None, most: int) -> int:
        if value is None or not 0 <= value <= most:
            raise GgufError(
                f"{shown(self._arch)}.{name} should be a number up to {most}, not {value}",
                where=self._where,
            )
        return value


def _cache_rows(
    keys: _Keys, n_layers: int, hidden: int, *, is_mla: bool
) -> tuple[tuple[int, ...], ...]:
    if is_mla:  # values are the latent part of the key's row
        return ((keys.count("attention.key_length"),),) * n_layers
    heads = keys.per_layer("attention.head_count", 1, n_layers)
    kv_heads = keys.per_layer("attention.head_count_kv", max(heads, default=1), n_layers)
    rows = []
    for n_heads, n_kv in zip(heads, kv_heads, strict=True):
        width = hidden // max(n_heads, 1)
        k = keys.count("attention.key_length", width)
        v = keys.count("attention.value_length", width)
        rows.append((n_kv * k, n_kv * v))
    return tuple(rows)


def _n_tokens(kvs: Mapping[str, Kv]) -> int:
    kv = kvs.get("tokenizer.ggml.tokens")
    return len(kv.value) if kv and kv.type is KvType.ARRAY else 0
