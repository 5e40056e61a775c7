"""Kimi's tokenizer: `tiktoken.model` (a list of ranks) and the specials' names in the config.

The list has no room for the splitting regex; that is in the checkpoint's Python code, which is
never run. So only checkpoints that say they are Kimi's are read, and llama.cpp's `kimi-k2` stands
for the regex.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from typing import Any

from quantkit.arch.tokenizer.hf_json import added_tokens_decoder
from quantkit.arch.tokenizer.vocab import (
    TokenType,
    Vocab,
    placeholder,
    recover_merges,
    spell_bytes,
)
from quantkit.errors import SourceError, UnsupportedError

FILE = "tiktoken.model"
MAX_BYTES = 32 << 20  # Kimi K2's list has 2.8 MB

# The ids right above the ranks are special, named or not: 256, and two more by an off-by-one of
# the original code (its last ids, 163840 and 163841 for K2, have no embedding row).
_N_SPECIALS = 256 + 2

_MAX_TOKEN_BYTES = 1024  # bounds the work of recovering merges


def tiktoken_vocab(
    data: bytes, settings: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int
) -> Vocab:
    """The vocabulary of a `tiktoken.model`, filled up to `vocab_size`.

    Refuses ranks with a hole, a duplicate, a missing byte or more entries than the embedding has
    rows, and names of specials that are not in the special range.
    """
    _require_kimi(settings, config)
    ranks = read_ranks(data, vocab_size)
    n_ranks = len(ranks)
    names = _special_names(settings, n_ranks)
    tokens = [spell_bytes(token) for token in ranks]
    types = [TokenType.NORMAL] * n_ranks
    for token_id in range(n_ranks, vocab_size):
        if token_id < n_ranks + _N_SPECIALS:
            tokens.append(names.get(token_id, f"<|reserved_token_{token_id}|>"))
            types.append(TokenType.CONTROL)
        else:
            tokens.append(placeholder(token_id))
            types.append(TokenType.UNUSED)
    return Vocab("gpt2", "kimi-k2", tokens, types, merges=recover_merges(ranks))


def _require_kimi(settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    configs = (config, text) if isinstance(text, Mapping) else (config,)
    kinds = [str(each.get("model_type", "")) for each in configs]
    if not any(kind.startswith("kimi") for kind in kinds):
        raise UnsupportedError(
            f"a list of ranks says nothing about how text is split, and model type "
            f"{' / '.join(kinds)!r} (tokenizer class {settings.get('tokenizer_class')!r}) is not "
            "one of Kimi's, whose splitting is known",
            where=FILE,
            hint="Convert the tokenizer to tokenizer.json and put that beside the weights instead.",
        )


def read_ranks(data: bytes, vocab_size: int) -> dict[bytes, int]:
    """Token bytes -> rank, in rank order, of lines `base64 rank`; every rank and byte once."""
    n_lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if n_lines > vocab_size:
        raise SourceError(f"{n_lines} ranks for a vocabulary of {vocab_size}", where=FILE)
    lines = data.splitlines()
    slots: list[bytes | None] = [None] * len(lines)
    for number, line in enumerate(lines, 1):
        token, rank = _parse_line(line, f"{FILE}:{number}")
        if rank >= len(slots):
            raise SourceError(
                f"rank {rank} where {len(slots)} lines should give 0 to {len(slots) - 1}",
                where=f"{FILE}:{number}",
            )
        if slots[rank] is not None:
            raise SourceError(f"rank {rank} is given twice", where=f"{FILE}:{number}")
        slots[rank] = token
    ranks = {token: rank for rank, token in enumerate(slots) if token is not None}
    if len(ranks) != len(slots):
        raise SourceError(f"{len(slots) - len(ranks)} tokens are given twice", where=FILE)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise SourceError(f"byte 0x{missing[0]:02x} has no rank", where=FILE)
    return ranks


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    encoded, _, digits = line.partition(b" ")
    try:
        token = binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error as error:
        raise SourceError(f"bad base64 {encoded[:40]!r} ({error})", where=where) from None
    if not 0 < len(token) <= _MAX_TOKEN_BYTES:
        raise SourceError(
            f"a token of {len(token)} bytes, expected 1 to {_MAX_TOKEN_BYTES}", where=where
        )
    if not digits.isdigit() or len(digits) > 9:
        raise SourceError(f"expected a rank after the token, got {digits[:40]!r}", where=where)
    return token, int(digits)


def _special_names(settings: Mapping[str, Any], n_ranks: int) -> dict[int, str]:
    """Id -> name from `added_tokens_decoder`; ids without one are reserved."""
    names = {token.token_id: token.content for token in added_tokens_decoder(settings)}
    where = "tokenizer_config.json"
    if not names:
        raise SourceError(
            "added_tokens_decoder is missing: the special tokens have no names",
            where=where,
            hint="Fetch the tokenizer_config.json that was published with tiktoken.model.",
        )
    for token_id, name in names.items():
        if not n_ranks <= token_id < n_ranks + _N_SPECIALS:
            raise SourceError(
                f"added token {name!r} has id {token_id}, but specials have {n_ranks} to "
                f"{n_ranks + _N_SPECIALS - 1}",
                where=where,
            )
    return names
