"""Models to run, from shapes alone: Kimi K2.5 as published, and a dense Llama."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import _kimi

from quantkit.arch import base, deepseek, llama
from quantkit.container.kv import string
from quantkit.guide.model import Model
from quantkit.pipeline.guide import model_of_plan
from quantkit.pipeline.planning import Planned
from quantkit.plan.build import Limits, TypeChooser, build_plan
from quantkit.recipe import load_recipe
from quantkit.types import GgmlType, TensorRef, Weight, WeightFormat

SMOLLM2 = {
    "vocab_size": 49152,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


class EveryWeight(base.WeightMap):
    """Has every weight that a family asks for; routed experts are INT4 where `int4` says so."""

    def __init__(self, *, int4: bool) -> None:
        super().__init__({})
        self._int4 = int4

    def __contains__(self, name: str) -> bool:
        return name.endswith("e_score_correction_bias")

    def take(self, name: str, *shape: int) -> Weight:
        packed = self._int4 and ".experts." in name
        format_ = WeightFormat.INT4_G32 if packed else WeightFormat.BF16
        return Weight(name, format_, shape, TensorRef(name, "BF16", shape, "m.safetensors", 0, 0))


@cache
def kimi() -> base.Model:
    return deepseek.DeepSeek().describe(base.Config(_kimi.config()), EveryWeight(int4=True))


def dense(fields: dict[str, Any]) -> base.Model:
    return llama.Llama().describe(base.Config(fields), EveryWeight(int4=False))


@cache
def planned_kimi(recipe: str) -> Planned:
    return plan(kimi(), recipe, "Kimi-K2.5")


def plan(model: base.Model, recipe: str, name: str) -> Planned:
    loaded = load_recipe(recipe)
    made = build_plan(
        model.tensors,
        TypeChooser(loaded, model.tensors, frozenset(GgmlType)),
        {"general.architecture": string(model.arch)} | model.kvs,
        stem=f"{name}-{loaded.name}",
        arch=model.arch,
        recipe_name=loaded.name,
        source_fingerprint="",
        limits=Limits(),
    )
    return Planned(loaded, (made,), model.advice, {})


@cache
def kimi_file(recipe: str = "ud-tq1_0", mmproj: bool = True) -> Model:
    model = model_of_plan(planned_kimi(recipe))
    return replace(model, mmproj=("mmproj-Kimi-K2.5-F16.gguf", 948_000_000) if mmproj else None)


@cache
def llama_file(recipe: str = "q8_0", *, small: bool = False) -> Model:
    fields, name = (SMOLLM2, "SmolLM2-135M") if small else (LLAMA_8B, "Llama-8B")
    return model_of_plan(plan(dense(fields), recipe, name))
