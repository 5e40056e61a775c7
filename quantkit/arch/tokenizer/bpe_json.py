"""Byte-level BPE from tokenizer.json: GPT-2, Llama 3, Qwen, DeepSeek, SmolLM, Mistral's tekken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.arch.tokenizer.hf_json import FILE, BpeModel, lay_out, read_added_tokens
from quantkit.arch.tokenizer.pretokenizers import recognise
from quantkit.arch.tokenizer.vocab import Vocab
from quantkit.errors import SourceError


def bpe_vocab(
    raw: Mapping[str, Any], model: BpeModel, settings: Mapping[str, Any], vocab_size: int
) -> Vocab:
    """The vocabulary of a byte-level tokenizer.json, filled up to `vocab_size`.

    A tokenizer.json adds a BOS only where its post-processor does (see `special`); llama.cpp's
    own default depends on the splitter's name, so it is overruled.
    """
    for rank, merge in enumerate(model.merges):
        if any(part.isspace() or " " in part for part in merge):
            raise SourceError(f"merge {rank} has a space in it: {merge!r}", where=FILE)
    tokens, types = lay_out(model, read_added_tokens(raw), settings, vocab_size)
    return Vocab(
        "gpt2",
        recognise(raw, ignore_merges=model.ignore_merges),
        tokens,
        types,
        merges=[f"{left} {right}" for left, right in model.merges],
        add_bos=False,
    )
