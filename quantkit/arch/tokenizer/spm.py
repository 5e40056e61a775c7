"""SentencePiece BPE models (`tokenizer.model`): Llama 2, Mistral, TinyLlama.

The file is a protobuf message of a few kinds of field; a reader of our own needs no dependency
and bounds every length by what is left of the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.arch.tokenizer.hf_json import AddedToken, added_tokens_decoder
from quantkit.arch.tokenizer.vocab import (
    BYTE_PIECES,
    TokenType,
    Vocab,
    added_type,
    placeholder,
    user_text,
)
from quantkit.errors import SourceError, UnsupportedError

FILE = "tokenizer.model"
MAX_BYTES = 64 << 20

_BPE = 2  # TrainerSpec.ModelType; 1 is unigram
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0  # the reference converter's

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the model; its position is its id."""

    text: str
    score: float
    type: TokenType


@dataclass(frozen=True, slots=True)
class SpmModel:
    """What of a `ModelProto` a GGUF file needs."""

    pieces: list[Piece]
    algorithm: int
    add_dummy_prefix: bool
    has_charsmap: bool


def spm_vocab(
    data: bytes, added: Mapping[str, Any] | None, settings: Mapping[str, Any], vocab_size: int
) -> Vocab:
    """The vocabulary of a `tokenizer.model`, with the tokens of added_tokens.json (`added`, text
    -> id) and tokenizer_config.json (`settings`) laid over it, filled up to `vocab_size`.

    Refuses unigram models and ones that rewrite their input (llama.cpp would do neither), ones
    without byte pieces (llama.cpp fails on the first unknown character) and ones with more pieces
    than the embedding has rows. Added tokens without a row are left out.
    """
    model = read_spm(data, vocab_size)
    _require_supported(model)
    tokens = [piece.text for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    types = [piece.type for piece in model.pieces]
    for token_id in range(len(tokens), vocab_size):
        tokens.append(placeholder(token_id))
        scores.append(_UNUSED_SCORE)
        types.append(TokenType.UNUSED)
    for token in [*_added_tokens(added), *added_tokens_decoder(settings)]:
        if token.token_id < vocab_size:
            types[token.token_id] = added_type(token.content, token.special)
            tokens[token.token_id] = token.content
            scores[token.token_id] = _ADDED_SCORE
    tokens = [user_text(text, kind) for text, kind in zip(tokens, types, strict=True)]
    prefix = None if model.add_dummy_prefix else False
    return Vocab("llama", "default", tokens, types, scores=scores, add_space_prefix=prefix)


def _require_supported(model: SpmModel) -> None:
    if model.algorithm != _BPE:
        raise UnsupportedError(
            f"SentencePiece algorithm {model.algorithm}, expected {_BPE} (BPE)",
            where=FILE,
            hint="llama.cpp merges by score as BPE does; other models would split differently.",
        )
    if model.has_charsmap:
        raise UnsupportedError(
            "the model normalises its input by a character map, which llama.cpp does not",
            where=FILE,
        )
    bytes_found = {piece.text for piece in model.pieces if piece.type is TokenType.BYTE}
    if missing := [piece for piece in BYTE_PIECES if piece not in bytes_found]:
        raise UnsupportedError(
            f"byte piece {missing[0]} is missing; llama.cpp needs all 256 for characters that "
            "have no piece",
            where=FILE,
        )


def _added_tokens(added: Mapping[str, Any] | None) -> Iterator[AddedToken]:
    for content, token_id in (added or {}).items():
        if type(token_id) is not int or token_id < 0 or not content:
            raise SourceError(f"{content!r} has id {token_id!r}", where="added_tokens.json")
        yield AddedToken(token_id, content, special=False)


def read_spm(data: bytes, max_pieces: int) -> SpmModel:
    """Parse a SentencePiece `ModelProto`; fields that say nothing about ids are skipped."""
    pieces: list[Piece] = []
    algorithm, dummy_prefix, charsmap = 1, True, False  # protobuf's defaults
    for field, value in _fields(data):
        if field == 1:
            if len(pieces) == max_pieces:
                raise SourceError(f"more pieces than the {max_pieces} of vocab_size", where=FILE)
            pieces.append(_piece(_message(value), len(pieces)))
        elif field == 2:
            for inner, content in _fields(_message(value)):
                if inner == 3 and isinstance(content, int):
                    algorithm = content
        elif field == 3:
            for inner, content in _fields(_message(value)):
                if inner == 2:
                    charsmap = bool(content)
                elif inner == 3:
                    dummy_prefix = bool(content)
    if not pieces:
        raise SourceError("not a SentencePiece model: it has no pieces", where=FILE)
    return SpmModel(pieces, algorithm, dummy_prefix, charsmap)


def _piece(data: bytes, token_id: int) -> Piece:
    text, score, kind = b"", 0.0, TokenType.NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = _message(value)
        elif field == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif field == 3 and isinstance(value, int):
            try:
                kind = TokenType(value)
            except ValueError:
                raise SourceError(f"piece {token_id} has type {value}", where=FILE) from None
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise SourceError(f"piece {token_id} is not UTF-8: {text[:40]!r}", where=FILE) from None
    if not decoded or not math.isfinite(score):
        raise SourceError(f"piece {token_id} is {decoded!r} with score {score}", where=FILE)
    return Piece(decoded, score, kind)


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise SourceError("not a SentencePiece model: a number where a message goes", where=FILE)
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message: number, and an int (varint) or the raw bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in {_FIXED32, _FIXED64}:
            length = 4 if wire == _FIXED32 else 8
        else:
            raise SourceError(f"not a protobuf message: wire type {wire} at byte {at}", where=FILE)
        if length > len(data) - at:
            raise SourceError(
                f"a field of {length} bytes where {len(data) - at} are left", where=FILE
            )
        yield field, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number of up to 64 bits at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise SourceError("the file ends inside a number", where=FILE)
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise SourceError(f"a number of more than 64 bits at byte {at - 10}", where=FILE)
