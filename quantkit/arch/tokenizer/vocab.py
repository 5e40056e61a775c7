"""A vocabulary in GGUF terms, and what every kind of tokenizer shares on the way to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from quantkit.errors import SourceError
from quantkit.types import Kv, KvType


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`; the numbers are SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocab:
    """One entry per row of the embedding.

    `model` is llama.cpp's algorithm: "gpt2" (byte-level BPE, with `merges`, tokens spelled in
    GPT-2's byte alphabet) or "llama" (SentencePiece, with `scores`). `add_bos` and
    `add_space_prefix` are what the tokenizer itself says; None leaves llama.cpp's default.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_bos: bool | None = None
    add_space_prefix: bool | None = None

    def kvs(self, where: str) -> dict[str, Kv]:
        """The vocabulary's own keys; refuses token texts that llama.cpp would stumble over."""
        _check_texts(self.tokens, where)
        kvs = {
            "tokenizer.ggml.model": Kv(KvType.STRING, self.model),
            "tokenizer.ggml.pre": Kv(KvType.STRING, self.pre),
            "tokenizer.ggml.tokens": Kv(KvType.ARRAY, self.tokens, KvType.STRING),
            "tokenizer.ggml.token_type": Kv(KvType.ARRAY, [int(t) for t in self.types], KvType.I32),
        }
        if self.scores is not None:
            kvs["tokenizer.ggml.scores"] = Kv(KvType.ARRAY, self.scores, KvType.F32)
        if self.merges is not None:
            kvs["tokenizer.ggml.merges"] = Kv(KvType.ARRAY, self.merges, KvType.STRING)
        return kvs


def _check_texts(tokens: list[str], where: str) -> None:
    """Unique (llama.cpp aborts otherwise), UTF-8, and without NUL, which ends a C string."""
    if len(set(tokens)) != len(tokens):
        first: dict[str, int] = {}
        for token_id, text in enumerate(tokens):
            if (other := first.setdefault(text, token_id)) != token_id:
                raise SourceError(f"ids {other} and {token_id} are both {text!r}", where=where)
    for token_id, text in enumerate(tokens):
        if "\0" in text or not is_text(text):
            raise SourceError(f"token {token_id} is not a text: {text[:80]!r}", where=where)


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it; JSON's escapes can smuggle in half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# How SentencePiece spells the bytes of a character that has no piece.
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def placeholder(token_id: int) -> str:
    """The text of an embedding row that no token uses."""
    return f"[PAD{token_id}]"


def looks_special(text: str) -> bool:
    """Whether a token is a control token although its file does not say so.

    DeepSeek's `<｜User｜>` and some of Gemma's are such; the rule is the reference converter's.
    """
    return (
        text in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def added_type(text: str, special: bool) -> TokenType:
    """The type of a token that was added to a trained vocabulary."""
    return TokenType.CONTROL if special or looks_special(text) else TokenType.USER_DEFINED


def user_text(piece: str, kind: TokenType) -> str:
    """A SentencePiece-style token as llama.cpp compares it.

    It looks for user-defined tokens in the text as it was written, with real spaces.
    """
    return piece.replace("▁", " ") if kind is TokenType.USER_DEFINED else piece


# GPT-2's spelling of bytes as printable characters: what Latin-1 prints stands for itself, the
# other 68 bytes are numbered from U+0100.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_ALPHABET: Mapping[int, str] = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)
}


def spell_bytes(token: bytes) -> str:
    """`token` in GPT-2's byte alphabet, as llama.cpp stores byte-level tokens."""
    return token.decode("latin-1").translate(BYTE_ALPHABET)


def recover_merges(ranks: Mapping[bytes, int]) -> list[str]:
    """BPE merges, in rank order, of a vocabulary of which only the ranks are known.

    A token's merge joins the two parts that its bytes reduce to with the merges of lower rank.
    A token whose bytes do not come down to two parts was not made by BPE and gets no merge.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and len(parts := _reduce(token, ranks, rank)) == 2:
            merges.append(f"{spell_bytes(parts[0])} {spell_bytes(parts[1])}")
    return merges


def _reduce(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """What is left of `token` after BPE with the ranks below `limit`, lowest rank first."""
    bounds = list(range(len(token) + 1))
    rank_of = ranks.get
    joined = [rank_of(token[i : i + 2], limit) for i in range(len(token) - 1)]
    while joined and (best := min(joined)) < limit:
        i = joined.index(best)
        del joined[i], bounds[i + 1]
        if i < len(joined):
            joined[i] = rank_of(token[bounds[i] : bounds[i + 2]], limit)
        if i:
            joined[i - 1] = rank_of(token[bounds[i - 1] : bounds[i + 1]], limit)
    return [token[begin:end] for begin, end in pairwise(bounds)]
