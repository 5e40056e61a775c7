"""What llama.cpp's converter decides by the model rather than by the tokenizer's files.

Some models have a splitter's name of their own for a regex that others have too, and GLM's
special tokens are chosen by hand. `model_type` in config.json tells the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.arch.tokenizer.special import KEYS
from quantkit.arch.tokenizer.vocab import Vocab
from quantkit.types import Kv, KvType

# The first has `ignore_merges`; without it llama.cpp knows the same splitter by another name.
_GLM = {"llama-bpe": "glm4", "smaug-bpe": "chatglm-bpe"}

# model_type -> splitter by its regex -> the model's own name of it
_SPLITTERS: Mapping[str, Mapping[str, str]] = {
    "glm4_moe": _GLM,
    "minimax_m2": {"gpt-4o": "minimax-m2"},
}

# model_type -> role -> text. A turn of the user ends the assistant's, and so does a tool's answer.
_SPECIALS: Mapping[str, Mapping[str, str]] = {
    "glm4_moe": {
        "bos": "[gMASK]",
        "eot": "<|user|>",
        "unk": "<|endoftext|>",
        "eom": "<|observation|>",
    },
}


def renamed(vocab: Vocab, config: Mapping[str, Any]) -> Vocab:
    """The vocabulary with the splitter's name that the model goes by."""
    name = _by_model(_SPLITTERS, config).get(vocab.pre, vocab.pre)
    return replace(vocab, pre=name)


def model_specials(vocab: Vocab, config: Mapping[str, Any]) -> dict[str, Kv]:
    """`*_token_id` of tokens that the model is known to have, where the vocabulary has them."""
    kvs = {}
    for role, text in _by_model(_SPECIALS, config).items():
        if text in vocab.tokens:
            token_id = vocab.tokens.index(text)
            kvs[f"tokenizer.ggml.{KEYS[role]}"] = Kv(KvType.U32, token_id)
    return kvs


def _by_model(
    table: Mapping[str, Mapping[str, str]], config: Mapping[str, Any]
) -> Mapping[str, str]:
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        kind = each.get("model_type")
        if isinstance(kind, str) and kind in table:
            return table[kind]
    return {}
