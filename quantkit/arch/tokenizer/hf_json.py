"""Strict reading of the parts of `tokenizer.json` that end up in a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.arch.tokenizer.vocab import TokenType, added_type, placeholder
from quantkit.errors import SourceError, UnsupportedError
from quantkit.run.json_size import parsed_bytes

FILE = "tokenizer.json"
MAX_BYTES = 64 << 20  # the largest published ones have about 35 MB
_MAX_PARSED_BYTES = 768 << 20

_MAX_TOKEN_CHARS = 4096  # bounds the work that is quadratic in a token's length
_SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True, slots=True)
class BpeModel:
    """`model` of a BPE tokenizer.json: token -> id, merges in rank order, and two flags."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    byte_fallback: bool
    ignore_merges: bool
    unk_token: str | None


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One entry of `added_tokens`."""

    token_id: int
    content: str
    special: bool


def parse(data: bytes) -> Mapping[str, Any]:
    """The file as a table. It is too large for the limit that other JSON files are read with."""
    if parsed_bytes(data) > _MAX_PARSED_BYTES:
        raise SourceError("takes too much memory, unlike any tokenizer", where=FILE)
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not JSON: {error}", where=FILE) from None
    if not isinstance(raw, dict):
        raise SourceError("expected a JSON object", where=FILE)
    return raw


def read_bpe_model(raw: Mapping[str, Any], vocab_size: int) -> BpeModel:
    """The BPE model; other algorithms and BPE variants that llama.cpp lacks are refused."""
    model = raw.get("model")
    if not isinstance(model, Mapping):
        raise SourceError("model is missing", where=FILE)
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedError(
            f"tokenizer algorithm {model.get('type')!r}",
            where=FILE,
            hint="BPE and SentencePiece BPE tokenizers are supported.",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise UnsupportedError(f"BPE with {key} = {model[key]!r}", where=FILE)
    vocab = _read_vocab(model.get("vocab"), vocab_size)
    unk_token = model.get("unk_token")
    return BpeModel(
        vocab,
        _read_merges(model.get("merges"), vocab),
        byte_fallback=model.get("byte_fallback") is True,
        ignore_merges=model.get("ignore_merges") is True,
        unk_token=unk_token if isinstance(unk_token, str) else None,
    )


def _read_vocab(raw: Any, vocab_size: int) -> dict[str, int]:
    if not isinstance(raw, dict):
        raise SourceError("model.vocab is not a table of tokens", where=FILE)
    for token, token_id in raw.items():
        if len(token) > _MAX_TOKEN_CHARS:
            raise SourceError(f"a token of {len(token)} characters", where=FILE)
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise SourceError(
                f"token {token!r} has id {token_id!r}, expected 0 to {vocab_size - 1}", where=FILE
            )
    if len(set(raw.values())) != len(raw):
        by_id: dict[int, str] = {}
        for token, token_id in raw.items():
            if (other := by_id.setdefault(token_id, token)) != token:
                raise SourceError(f"{other!r} and {token!r} have id {token_id}", where=FILE)
    return raw


def _read_merges(raw: Any, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges given as "left right" or as [left, right]; both parts and the whole are tokens."""
    if not isinstance(raw, list):
        raise SourceError("model.merges is not a list", where=FILE)
    merges = []
    for rank, entry in enumerate(raw):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not (isinstance(parts, list) and len(parts) == 2):
            raise SourceError(f"merge {rank} is {str(entry)[:80]!r}, not two tokens", where=FILE)
        left, right = parts
        if not (isinstance(left, str) and isinstance(right, str)):
            raise SourceError(f"merge {rank} is {str(entry)[:80]!r}, not two tokens", where=FILE)
        for part in (left, right, left + right):
            if part not in vocab:
                raise SourceError(f"merge {rank}: {part[:80]!r} is not a token", where=FILE)
        merges.append((left, right))
    return merges


def read_added_tokens(raw: Mapping[str, Any]) -> list[AddedToken]:
    """`added_tokens` in file order; ids are only known not to be negative."""
    entries = raw.get("added_tokens") or []
    if not isinstance(entries, list):
        raise SourceError("added_tokens is not a list", where=FILE)
    return [
        added_token(entry, entry.get("id") if isinstance(entry, Mapping) else None, FILE)
        for entry in entries
    ]


def added_tokens_decoder(settings: Mapping[str, Any]) -> list[AddedToken]:
    """The same from tokenizer_config.json, where they are a table from id to token."""
    where = "tokenizer_config.json"
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, Mapping):
        raise SourceError("added_tokens_decoder is not a table", where=where)
    return [
        added_token(
            entry, int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key, where
        )
        for key, entry in entries.items()
    ]


def added_token(entry: Any, token_id: Any, where: str) -> AddedToken:
    """One added token, checked."""
    content = entry.get("content") if isinstance(entry, Mapping) else None
    if not isinstance(content, str) or not content:
        raise SourceError(f"added token {token_id!r} has no content", where=where)
    if type(token_id) is not int or token_id < 0:
        raise SourceError(f"added token {content!r} has id {token_id!r}", where=where)
    return AddedToken(token_id, content, entry.get("special") is True)


def lay_out(
    model: BpeModel, added: list[AddedToken], settings: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[TokenType]]:
    """Texts and types of all `vocab_size` ids: vocabulary, added tokens, and what fills the holes.

    tokenizer_config.json (`settings`) can add tokens and name special ones; where both files
    speak of an id, tokenizer.json decides whether it is special.
    """
    texts = {token_id: token for token, token_id in model.vocab.items()}
    types: dict[int, TokenType] = {}
    for role in _SPECIAL_ROLES:
        if (text := token_text(settings.get(f"{role}_token"))) in model.vocab:
            types[model.vocab[text]] = TokenType.CONTROL
    for token in [*added_tokens_decoder(settings), *added]:
        if token.token_id >= vocab_size:
            raise SourceError(
                f"added token {token.content!r} has id {token.token_id}, but the model has "
                f"{vocab_size} ids",
                where=FILE,
            )
        if (other := texts.setdefault(token.token_id, token.content)) != token.content:
            raise SourceError(
                f"id {token.token_id} is both {other!r} and {token.content!r}", where=FILE
            )
        types[token.token_id] = added_type(token.content, token.special)
    return (
        [texts[i] if i in texts else placeholder(i) for i in range(vocab_size)],
        [
            types.get(i, TokenType.NORMAL if i in texts else TokenType.UNUSED)
            for i in range(vocab_size)
        ],
    )


def token_text(entry: Any) -> str | None:
    """The text of a token named in tokenizer_config.json, there a string or an object."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None
