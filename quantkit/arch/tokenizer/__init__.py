"""Tokenizers: from the files beside the weights to `tokenizer.*` keys of a GGUF file.

Nothing of the checkpoint is run or rendered, and no tokenizer library is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.arch.base import SideFiles
from quantkit.arch.tokenizer import gpt2_files, hf_json, spm, tiktoken
from quantkit.arch.tokenizer.bpe_json import bpe_vocab
from quantkit.arch.tokenizer.by_model import model_specials, renamed
from quantkit.arch.tokenizer.llama_json import llama_json_vocab
from quantkit.arch.tokenizer.special import chat_template_kvs, special_kvs
from quantkit.arch.tokenizer.vocab import Vocab
from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import Kv, KvType

_MAX_VOCAB = 1 << 22  # the largest published ones have 2^18 entries

_FILES = ((tiktoken.FILE, tiktoken.MAX_BYTES), (spm.FILE, spm.MAX_BYTES))

__all__ = ["SideFiles", "tokenizer_file", "tokenizer_kvs"]


def tokenizer_kvs(source: SideFiles, vocab_size: int, config: Mapping[str, Any]) -> dict[str, Kv]:
    """Every `tokenizer.*` key, for a model whose embedding has `vocab_size` rows.

    `config` is config.json as it is. The first of `tiktoken.model`, `tokenizer.model`,
    `tokenizer.json` and the pair `vocab.json`, `merges.txt` counts. Raises SourceError for files
    that contradict themselves, each other or `vocab_size`, and UnsupportedError for a tokenizer
    that llama.cpp would not reproduce.
    """
    if not 0 < vocab_size <= _MAX_VOCAB:
        raise SourceError(f"vocab_size = {vocab_size}", where="config.json")
    settings = _table(source, "tokenizer_config.json") or {}
    file, data = tokenizer_file(source)
    beside = data if file == hf_json.FILE else source.read_bytes(hf_json.FILE, hf_json.MAX_BYTES)
    raw = None if beside is None else hf_json.parse(beside)
    vocab = renamed(_read_vocab(source, (file, data), raw, settings, config, vocab_size), config)
    kvs = vocab.kvs(file)
    prefix = settings.get("add_prefix_space")
    if not isinstance(prefix, bool):
        prefix = vocab.add_space_prefix
    if prefix is not None:
        kvs["tokenizer.ggml.add_space_prefix"] = Kv(KvType.BOOL, prefix)
    kvs |= special_kvs(config, settings, raw, vocab_size, vocab.add_bos)
    kvs |= model_specials(vocab, config)
    kvs |= chat_template_kvs(source, settings)
    return kvs


def tokenizer_file(source: SideFiles) -> tuple[str, bytes]:
    """Name and content of the file that holds the vocabulary, the first that is there."""
    for file, max_bytes in _FILES:
        if (data := source.read_bytes(file, max_bytes)) is not None:
            return file, data
    data = source.read_bytes(hf_json.FILE, hf_json.MAX_BYTES)
    if (data := gpt2_files.joined(source) if data is None else data) is not None:
        return hf_json.FILE, data
    hint = "Fetch the tokenizer's files too, or convert without a vocabulary."
    if source.read_bytes("tekken.json", hf_json.MAX_BYTES) is not None:
        hint = "tekken.json is not read; put the tokenizer.json that transformers makes beside it."
    raise UnsupportedError(
        f"no tokenizer: none of {tiktoken.FILE}, {spm.FILE} and {hf_json.FILE} is there",
        hint=hint,
    )


def _read_vocab(
    source: SideFiles,
    found: tuple[str, bytes],
    raw: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    vocab_size: int,
) -> Vocab:
    file, data = found
    if file == tiktoken.FILE:
        return tiktoken.tiktoken_vocab(data, settings, config, vocab_size)
    if file == spm.FILE:
        added = _table(source, "added_tokens.json")
        return spm.spm_vocab(data, added, settings, vocab_size)
    raw = hf_json.parse(data) if raw is None else raw
    model = hf_json.read_bpe_model(raw, vocab_size)
    read = llama_json_vocab if model.byte_fallback else bpe_vocab
    return read(raw, model, settings, vocab_size)


def _table(source: SideFiles, name: str) -> Mapping[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    content = source.read_json(name)
    if content is not None and not isinstance(content, Mapping):
        raise SourceError("expected a JSON object", where=name)
    return content
