"""From the class name in config.json to the family that knows it."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.arch.base import OTHER_WAY, Config, Family, Model, SideFiles, WeightMap
from quantkit.arch.deepseek import DeepSeek
from quantkit.arch.gemma import Gemma2, Gemma3
from quantkit.arch.glm import Glm4Moe
from quantkit.arch.gpt_oss import GptOss
from quantkit.arch.llama import Llama, Mixtral
from quantkit.arch.minimax import MiniMaxM2
from quantkit.arch.phi import Phi3
from quantkit.arch.qwen import Qwen2, Qwen3, Qwen3Moe
from quantkit.arch.tokenizer import tokenizer_kvs
from quantkit.arch.vision import describe_vision, has_tower
from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import Weight

FAMILIES: tuple[Family, ...] = (
    DeepSeek(),
    Llama(),
    Mixtral(),
    Qwen2(),
    Qwen3(),
    Qwen3Moe(),
    Phi3(),
    Glm4Moe(),
    Gemma2(),
    Gemma3(),
    GptOss(),
    MiniMaxM2(),
)


def describe_text(
    config: Config, weights: Mapping[str, Weight], files: SideFiles, *, with_vocab: bool = True
) -> Model:
    """The text model: tensors, architecture KVs and, unless told otherwise, the tokenizer.

    Raises `UnsupportedError` for a class that no family knows.
    """
    model = family_of(config).describe(config, WeightMap(weights))
    if with_vocab:
        model.kvs.update(tokenizer_kvs(files, vocab_size(config), config.raw))
    return model


def family_of(config: Config) -> Family:
    """The family of a config's class; `UnsupportedError` says what works instead."""
    name = _class_name(config)
    for family in FAMILIES:
        if name in family.architectures:
            return family
    raise UnsupportedError(
        f"architecture {name} is not known",
        where="config.json",
        hint=f"{OTHER_WAY}; `quantkit families` lists what is known",
    )


def vocab_size(config: Config) -> int:
    """Rows of the embedding, as config.json says or the family takes for granted."""
    if config.has("vocab_size"):
        return config.count("vocab_size")
    return config.over(getattr(family_of(config), "defaults", {})).count("vocab_size")


def describe_mmproj(config: Config, weights: Mapping[str, Weight], files: SideFiles) -> Model:
    """The vision tower and projector."""
    if not has_tower(config, weights):
        raise UnsupportedError(
            "no vision tower that llama.cpp has a projector for", where="config.json"
        )
    return describe_vision(config, WeightMap(weights), files)


def _class_name(config: Config) -> str:
    names = config.raw.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise SourceError("architectures is missing", where="config.json")
    return names[0]
