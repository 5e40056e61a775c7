"""From the class name in config.json to the family that knows it."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.arch.base import Config, Family, Model, SideFiles, WeightMap
from quantkit.arch.deepseek import DeepSeek
from quantkit.arch.llama import Llama
from quantkit.arch.tokenizer import tokenizer_kvs
from quantkit.arch.vision import describe_vision, has_tower
from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import Weight

FAMILIES: tuple[Family, ...] = (DeepSeek(), Llama())


def describe_text(
    config: Config, weights: Mapping[str, Weight], files: SideFiles, *, with_vocab: bool = True
) -> Model:
    """The text model: tensors, architecture KVs and, unless told otherwise, the tokenizer.

    Raises `UnsupportedError` for a class that no family knows.
    """
    name = _class_name(config)
    for family in FAMILIES:
        if name in family.architectures:
            model = family.describe(config, WeightMap(weights))
            if with_vocab:
                model.kvs.update(tokenizer_kvs(files, config.count("vocab_size"), config.raw))
            return model
    known = ", ".join(sorted(a for family in FAMILIES for a in family.architectures))
    raise UnsupportedError(
        f"architecture {name} is not known", where="config.json", hint=f"known are: {known}"
    )


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
