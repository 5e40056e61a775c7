"""Text to token ids: the vocabulary's own library, and llama.cpp's rules around special tokens.

A converted file and this module see the same tokens, types and flags: both come from
`tokenizer_kvs`, which refuses what llama.cpp could not reproduce. Where llama.cpp's splitter
differs from the original's (docs/tokenizers.md has the list), the original's ids are given, which
are those that the model was trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.arch.base import Config, SideFiles
from quantkit.arch.registry import vocab_size
from quantkit.arch.tokenizer import hf_json, spm, tiktoken, tokenizer_file, tokenizer_kvs
from quantkit.arch.tokenizer.pretokenizers import KIMI
from quantkit.arch.tokenizer.vocab import TokenType
from quantkit.errors import SourceError
from quantkit.text.extras import require
from quantkit.types import Kvs

_PREFIX = "tokenizer.ggml."
# What decides about ids, and no more: another chat template or EOS is the same tokenizer.
_DIGESTED = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "merges",
    "scores",
    "add_space_prefix",
    "bos_token_id",
    "add_bos_token",
)
_BOS_OF_SENTENCEPIECE = 1  # llama.cpp's default where a file names none

# tiktoken's regex engine keeps a state per blank of a run and panics when a million are kept.
_MAX_BLANKS = 400_000
_LONG_BLANKS = re.compile(rf"\s{{{_MAX_BLANKS + 1}}}")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Special:
    """A token that is cut out of the text before anything is merged.

    `always` is true of user-defined ones; control tokens are cut out only where asked for.
    """

    text: str
    token_id: int
    always: bool


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of `n_vocab` ids, those without a token included.

    `add_bos` says whether llama.cpp puts `bos` before a text; `encode` never does. `digest` is the
    same for checkpoints and files that give the same ids.
    """

    n_vocab: int
    bos: int | None
    add_bos: bool
    digest: str
    _specials: tuple[Special, ...]  # longest first
    _encode_plain: Encode

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids of `text`, with no BOS or EOS added.

        With `parse_special` the text of a control token (`<|im_end|>`) becomes that token, else
        it is text like any other. Text of any length is encoded as one.
        """
        parts: list[str | int] = [text]
        for special in self._specials:
            if (special.always or parse_special) and special.text in text:
                parts = list(_cut_out(special, parts))
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._encode_plain(part)
        return ids


def _cut_out(special: Special, parts: list[str | int]) -> Iterator[str | int]:
    for part in parts:
        if isinstance(part, int):
            yield part
            continue
        for i, piece in enumerate(part.split(special.text)):
            if i:
                yield special.token_id
            yield piece


def open_tokenizer(files: SideFiles, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint, from the file that a conversion would take it from.

    `config` is config.json as it is. Raises what `tokenizer_kvs` raises, and UsageError where the
    library for that file is not installed.
    """
    n_vocab = vocab_size(Config(config))
    kvs = tokenizer_kvs(files, n_vocab, config)
    is_sentencepiece = _value(kvs, "model") == "llama"
    bos = _value(kvs, "bos_token_id", _BOS_OF_SENTENCEPIECE if is_sentencepiece else None)
    return Tokenizer(
        n_vocab=n_vocab,
        bos=bos,
        add_bos=bos is not None and _value(kvs, "add_bos_token", is_sentencepiece),
        digest=_digest(kvs),
        _specials=tuple(_specials(kvs)),
        _encode_plain=_plain_encoder(*tokenizer_file(files), n_vocab, kvs),
    )


def _value(kvs: Kvs, key: str, default: Any = None) -> Any:
    kv = kvs.get(_PREFIX + key)
    return default if kv is None else kv.value


def _digest(kvs: Kvs) -> str:
    """sha256 of everything that decides about ids, in hex."""
    data = {key: _value(kvs, key) for key in _DIGESTED}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _specials(kvs: Kvs) -> list[Special]:
    """The tokens that llama.cpp cuts out of a text, in its order."""
    kinds = {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED}
    found = [
        Special(text, token_id, always=kind == TokenType.USER_DEFINED)
        for token_id, (text, kind) in enumerate(
            zip(_value(kvs, "tokens"), _value(kvs, "token_type"), strict=True)
        )
        if kind in kinds
    ]
    return sorted(found, key=lambda special: -len(special.text.encode()))


def _plain_encoder(file: str, data: bytes, n_vocab: int, kvs: Kvs) -> Encode:
    if file == tiktoken.FILE:
        return _kimi_encoder(data, n_vocab)
    prefix = bool(_value(kvs, "add_space_prefix", True))
    if file == spm.FILE:
        return _sentencepiece_encoder(data, prefix)
    is_sentencepiece = _value(kvs, "model") == "llama"
    return _json_encoder(data, prefix if is_sentencepiece else None)


def _kimi_encoder(data: bytes, n_vocab: int) -> Encode:
    library = require("tiktoken")
    encoding = library.Encoding(
        tiktoken.FILE,
        pat_str=KIMI,
        mergeable_ranks=tiktoken.read_ranks(data, n_vocab),
        special_tokens={},
    )

    def encode(text: str) -> list[int]:
        if _LONG_BLANKS.search(text):
            raise SourceError(
                f"more than {_MAX_BLANKS:,} blanks in a row",
                where="text",
                hint="tiktoken cannot split such a run; take it out",
            )
        ids: list[int] = encoding.encode_ordinary(text)
        return ids

    return encode


def _sentencepiece_encoder(data: bytes, prefix: bool) -> Encode:
    """Repeated fields of a protobuf message are merged, so what is appended overrules the model.

    llama.cpp keeps every blank, and `add_space_prefix` decides about the one before the text.
    """
    overrule = bytes((0x1A, 4, 0x18, prefix, 0x20, 0))  # normalizer_spec: fields 3 and 4
    library = require("sentencepiece")
    try:
        processor = library.SentencePieceProcessor(model_proto=data + overrule)
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"SentencePiece refuses it: {error}", where=spm.FILE) from None

    def encode(text: str) -> list[int]:
        ids: list[int] = processor.encode(text)
        return ids

    return encode


def _json_encoder(data: bytes, prefix: bool | None) -> Encode:
    """The model of a tokenizer.json alone: added tokens are cut out already, nothing is added.

    `prefix` is None for byte-level ones, which say themselves how they split. The others get what
    a GGUF file holds of their normalizer: a space before the text or none, and ▁ for spaces.
    """
    raw = hf_json.parse(data)
    spec: dict[str, Any] = {"version": "1.0", "model": raw["model"], "added_tokens": []}
    if prefix is None:
        spec |= {key: raw.get(key) for key in ("normalizer", "pre_tokenizer")}
    else:
        steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
        spec |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    library = require("tokenizers")
    try:
        model = library.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises the base class itself
        raise SourceError(f"tokenizers refuses it: {error}", where=hf_json.FILE) from None

    def encode(text: str) -> list[int]:
        ids: list[int] = model.encode(text, add_special_tokens=False).ids
        return ids

    return encode
