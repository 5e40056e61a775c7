"""SentencePiece-style BPE that was published as tokenizer.json only (byte fallback, ▁ for space).

llama.cpp has no merges for these: it joins the two neighbours whose union is the token with the
highest score. Scores that fall with the rank of a token's merge make it join the same pairs in
the same order as the merges say, provided that the merges of one token stand together and that
every way to put a token together from two others is a merge. Both are checked. (The reference
converter writes one score for all tokens, which splits differently.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.arch.tokenizer.hf_json import FILE, BpeModel, lay_out, read_added_tokens
from quantkit.arch.tokenizer.vocab import BYTE_PIECES, TokenType, Vocab, user_text
from quantkit.errors import UnsupportedError

_HINT = "Put the SentencePiece file (tokenizer.model) beside tokenizer.json."
_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREFIX = {"type": "Prepend", "prepend": "▁"}


def llama_json_vocab(
    raw: Mapping[str, Any], model: BpeModel, settings: Mapping[str, Any], vocab_size: int
) -> Vocab:
    """The vocabulary of a tokenizer.json of Llama 2's kind, filled up to `vocab_size`."""
    prefix = _has_prefix(raw)
    tokens, types = lay_out(model, read_added_tokens(raw), settings, vocab_size)
    if missing := [piece for piece in BYTE_PIECES if piece not in model.vocab]:
        raise UnsupportedError(f"byte token {missing[0]} is missing", where=FILE, hint=_HINT)
    for piece in BYTE_PIECES:
        types[model.vocab[piece]] = TokenType.BYTE
    if model.unk_token in model.vocab:
        types[model.vocab[model.unk_token]] = TokenType.UNKNOWN
    # Added tokens are cut out of the text before anything is joined.
    scores = _scores(
        model, [t for t, kind in zip(tokens, types, strict=True) if kind is TokenType.NORMAL]
    )
    tokens = [user_text(text, kind) for text, kind in zip(tokens, types, strict=True)]
    return Vocab(
        "llama",
        "default",
        tokens,
        types,
        scores=[scores.get(token, 0.0) for token in tokens],
        add_space_prefix=None if prefix else False,
    )


def _has_prefix(raw: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text; other treatments than ▁ for space are refused."""
    normalizer, splitter = raw.get("normalizer"), raw.get("pre_tokenizer")
    if isinstance(normalizer, Mapping) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")
    else:
        steps = [normalizer] if normalizer else []
    if not splitter and steps in ([_PREFIX, _SPACE], [_SPACE]):
        return bool(steps[0] == _PREFIX)
    if not steps and isinstance(splitter, Mapping) and splitter.get("type") == "Metaspace":
        scheme = splitter.get("prepend_scheme", "always")
        if splitter.get("replacement") == "▁" and splitter.get("split") is False:
            return bool(scheme != "never" and splitter.get("add_prefix_space", True))
    raise UnsupportedError(
        f"normalizer {normalizer!r} and pre_tokenizer {splitter!r} are not those of a "
        "SentencePiece model",
        where=FILE,
        hint=_HINT,
    )


def _scores(model: BpeModel, plain: list[str]) -> dict[str, float]:
    """Token -> minus the rank of its first merge, as SentencePiece itself scores BPE.

    Refuses merges that scores cannot stand for; `plain` are the tokens that joining can lead to.
    """
    splits: dict[str, set[str]] = {}
    scores: dict[str, float] = {}
    previous = ""
    for rank, (left, right) in enumerate(model.merges):
        token = left + right
        if token in scores and token != previous:
            raise UnsupportedError(
                f"merge {rank} makes {token!r} again, after merges of other tokens",
                where=FILE,
                hint=_HINT,
            )
        scores.setdefault(token, -float(rank))
        splits.setdefault(token, set()).add(left)
        previous = token
    for token in plain:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if (
                _can_stand(left, scores)
                and _can_stand(right, scores)
                and left not in splits.get(token, ())
            ):
                raise UnsupportedError(
                    f"llama.cpp would join {left!r} and {right!r}, which no merge does",
                    where=FILE,
                    hint=_HINT,
                )
    return scores


def _can_stand(text: str, scores: Mapping[str, float]) -> bool:
    """Whether `text` can be a symbol while merging: one character, or what a merge made."""
    return len(text) == 1 or text in scores
