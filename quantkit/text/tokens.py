"""Token sets: what statistics and scores are taken over, with the digests that say what it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.errors import SourceError, UsageError
from quantkit.run import fs
from quantkit.source.header import parse_header, read_header
from quantkit.text.chat import ChatTemplate
from quantkit.text.corpus import Corpus
from quantkit.text.documents import Document, Refused, documents
from quantkit.text.tokenizer import Tokenizer
from quantkit.types import TensorRef

_FORMAT = "quantkit-tokens-1"
_HINT = "the file is damaged or not a token set; make it again"
_MAX_VOCAB = 1 << 31

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token ids of a corpus, one document after the other.

    `ids` i32[n], all in 0 to `n_vocab` - 1; `starts` i64[n_documents] is where each document
    begins; `sources` the tokens of each source by its name. `tokenizer` and `corpus` are the
    digests of what they were made with. `refused` counts the chats that the template refused.
    """

    ids: Ids
    starts: npt.NDArray[np.int64]
    sources: Mapping[str, int]
    name: str
    n_vocab: int
    tokenizer: str
    corpus: str
    refused: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of the ids, the documents' starts and the tokenizer's digest, in hex."""
        hasher = hashlib.sha256(self.tokenizer.encode())
        hasher.update(self.ids.astype("<i4").data)
        hasher.update(self.starts.astype("<i8").data)
        return hasher.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file with `ids`, `starts` and, as metadata, all the rest."""
        about = {
            "format": _FORMAT,
            "name": self.name,
            "n_vocab": self.n_vocab,
            "sources": self.sources,
            "refused": self.refused,
            "tokenizer": self.tokenizer,
            "corpus": self.corpus,
            "digest": self.digest,
        }
        starts, ids = self.starts.astype("<i8"), self.ids.astype("<i4")
        header = {
            "__metadata__": {"quantkit": json.dumps(about)},
            "starts": _entry("I64", starts, 0),
            "ids": _entry("I32", ids, starts.nbytes),
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        fs.write_whole(
            path, len(text).to_bytes(8, "little") + text + starts.tobytes() + ids.tobytes()
        )


def _entry(dtype: str, values: npt.NDArray[Any], begin: int) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(values.shape),
        "data_offsets": [begin, begin + values.nbytes],
    }


def tokenise(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None,
    budget: int | None,
    parse_special: bool | None = None,
) -> TokenSet:
    """The corpus as tokens, at most `budget` of them (the last document is cut).

    Every document is encoded by itself and as a whole; where the tokenizer adds a BOS, one stands
    before the first, as llama.cpp puts it before a text. `parse_special` overrules what the
    sources say. Raises `UsageError` for a budget below 1 and `SourceError` for a corpus without
    text.
    """
    if budget is not None and budget < 1:
        raise UsageError(f"a budget of {budget} tokens")
    parts: list[Ids] = []
    names: list[str] = []

    def encode(document: Document) -> int:
        special = document.parse_special if parse_special is None else parse_special
        ids = tokenizer.encode(document.text, parse_special=special)
        if not parts and tokenizer.add_bos and ids[:1] != [tokenizer.bos]:
            ids = [tokenizer.bos or 0, *ids]
        parts.append(np.array(ids, np.int32))
        names.append(document.source)
        return len(ids)

    refused = Refused()
    n_tokens = 0
    with closing(documents(corpus, template, cost=encode, refused=refused)) as given:
        for _ in given:
            n_tokens += len(parts[-1])
            if budget is not None and n_tokens >= budget:
                parts[-1] = parts[-1][: len(parts[-1]) - (n_tokens - budget)]
                break
    lengths = np.array([len(part) for part in parts], np.int64)
    if not lengths.sum():
        raise SourceError("holds no text", where=corpus.name)
    sources = {stream.name: 0 for stream in corpus.streams}
    for name, length in zip(names, lengths.tolist(), strict=True):
        sources[name] += length
    return TokenSet(
        ids=np.concatenate(parts),
        starts=(lengths.cumsum() - lengths)[lengths > 0],
        sources=sources,
        name=corpus.name,
        n_vocab=tokenizer.n_vocab,
        tokenizer=tokenizer.digest,
        corpus=corpus.digest(),
        refused=refused.counts,
    )


def load_tokens(path: Path) -> TokenSet:
    """A token set that `save` wrote. Every field is checked; `SourceError` for anything else."""
    where = str(path)
    try:
        with path.open("rb") as file:

            def read(offset: int, n_bytes: int) -> bytes:
                file.seek(offset)
                return file.read(n_bytes)

            n_bytes = path.stat().st_size
            raw = read_header(read, n_bytes, where)
            refs = {ref.name: ref for ref in parse_header(raw, n_bytes, where)}
            if refs.keys() != {"ids", "starts"}:
                raise SourceError(f"holds {sorted(refs)[:8]}", where=where, hint=_HINT)
            ids = _vector(read, refs["ids"], "I32", where)
            starts = _vector(read, refs["starts"], "I64", where)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", where=where) from error
    about = _about(json.loads(raw).get("__metadata__", {}), where)
    claimed = about.pop("digest")
    tokens = TokenSet(ids.astype(np.int32), starts.astype(np.int64), **about)
    _check(tokens, where)
    if tokens.digest != claimed:
        raise SourceError("the digest does not fit the tokens", where=where, hint=_HINT)
    return tokens


def _vector(
    read: Callable[[int, int], bytes], ref: TensorRef, dtype: str, where: str
) -> npt.NDArray[Any]:
    if ref.dtype != dtype or len(ref.shape) != 1 or not ref.shape[0]:
        raise SourceError(
            f"{ref.name} is {ref.dtype} {list(ref.shape)}, expected {dtype} [n]",
            where=where,
            hint=_HINT,
        )
    return np.frombuffer(read(ref.begin, ref.n_bytes), "<i4" if dtype == "I32" else "<i8")


def _about(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """The metadata as arguments of TokenSet, and `digest`."""
    fail = partial(SourceError, where=where, hint=_HINT)
    try:
        about = json.loads(metadata["quantkit"])
    except (KeyError, ValueError, RecursionError):
        raise fail("has no metadata of a token set") from None
    if not isinstance(about, dict) or about.pop("format", None) != _FORMAT:
        raise fail(f"is not of the format {_FORMAT}")
    kinds = {
        "name": str,
        "n_vocab": int,
        "sources": dict,
        "refused": dict,
        "tokenizer": str,
        "corpus": str,
        "digest": str,
    }
    if about.keys() != kinds.keys() or any(
        type(about[key]) is not kind for key, kind in kinds.items()
    ):
        raise fail("its metadata lacks a key, has one too many or one of another type")
    counts = [*about["sources"].values(), *about["refused"].values()]
    if any(type(count) is not int or count < 0 for count in counts):
        raise fail("a count of its metadata is not a whole number")
    return about


def _check(tokens: TokenSet, where: str) -> None:
    ids, starts = tokens.ids, tokens.starts
    problem = ""
    if not 0 < tokens.n_vocab < _MAX_VOCAB:
        problem = f"n_vocab is {tokens.n_vocab}"
    elif ids.min() < 0 or ids.max() >= tokens.n_vocab:
        problem = f"ids go from {ids.min()} to {ids.max()}, the vocabulary to {tokens.n_vocab - 1}"
    elif starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(ids):
        problem = "the documents' starts do not rise from 0 to the last token"
    elif sum(tokens.sources.values()) != len(ids):
        problem = f"its sources have {sum(tokens.sources.values())} tokens, it has {len(ids)}"
    if problem:
        raise SourceError(problem, where=where, hint=_HINT)


def chunks(tokens: TokenSet, n_ctx: int) -> Ids:
    """The ids cut into i32[n_chunks, n_ctx] as llama.cpp's tools do: the rest is dropped."""
    if n_ctx < 1:
        raise UsageError(f"a context of {n_ctx} tokens")
    n_chunks = len(tokens.ids) // n_ctx
    if not n_chunks:
        raise UsageError(
            f"{tokens.name} has {len(tokens.ids):,} tokens, one chunk takes {n_ctx:,}",
            hint="take a longer text, or a shorter context",
        )
    return tokens.ids[: n_chunks * n_ctx].reshape(n_chunks, n_ctx)
