"""What the allocator's tests are about: Kimi K2.5's tensors, and costs made up for them."""

from __future__ import annotations

import random
from functools import cache

from quantkit.allocate.choices import Group, Option
from quantkit.arch.base import Config, Model, WeightMap
from quantkit.arch.deepseek import DeepSeek
from quantkit.types import GgmlType, TensorRef, TensorSpec, Weight, WeightFormat

KIMI = {
    "vocab_size": 163840,
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 1,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 262144,
}


class AnyWeights(WeightMap):
    """Has every weight that a family asks for, in the shape that it expects, and no more."""

    def __init__(self) -> None:
        super().__init__({})

    def __contains__(self, name: str) -> bool:
        return name.endswith("e_score_correction_bias")

    def take(self, name: str, *shape: int) -> Weight:
        ref = TensorRef(name, "BF16", shape, "model.safetensors", 0, 0)
        return Weight(name, WeightFormat.BF16, shape, ref)


@cache
def kimi() -> Model:
    return DeepSeek().describe(Config(KIMI), AnyWeights())


def made_up_costs(seed: int, spread: float = 0.5):
    """Costs that fall with the bits, more for small tensors; no two tensors and types are alike."""

    def cost(spec: TensorSpec, type_: GgmlType) -> float:
        weight = random.Random(f"{seed} {spec.name}").lognormvariate(0, spread)
        twist = random.Random(f"{seed} {spec.name} {type_.name}").lognormvariate(0, spread / 3)
        return 1e-4 * weight * twist * spec.n_weights**0.25 * 4.0 ** (1.75 - type_.bpw)

    return cost


def tensor(name: str, role: str, layer: int | None, *shape: int, keep: GgmlType | None = None):
    return TensorSpec(name, role, layer, shape or (16, 512), keep=keep)


def group(name: str, *options: tuple[int, float]) -> Group:
    """A group of one tensor with options (bytes, cost), the smallest first in order of types."""
    types = (t for t in GgmlType if t.block_size > 1)
    made = tuple(Option(t, n, c) for t, (n, c) in zip(types, options, strict=False))
    return Group(name, (f"{name}.weight",), 256, made)


def floor(groups) -> int:
    """Bytes of the smallest assignment."""
    return sum(min(option.n_bytes for option in g.options) for g in groups)


def ceiling(groups) -> int:
    """Bytes of the largest assignment."""
    return sum(max(option.n_bytes for option in g.options) for g in groups)
