"""Byte-level BPE as two files, `vocab.json` and `merges.txt`: what GPT-2 and early Qwen came as.

They do not say how text is split; the tokenizer's class in tokenizer_config.json does. The two are
put together as the tokenizer.json that they stand for, and read as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantkit.arch.base import SideFiles
from quantkit.arch.tokenizer.hf_json import MAX_BYTES, added_tokens_decoder
from quantkit.arch.tokenizer.pretokenizers import QWEN2
from quantkit.errors import SourceError, UnsupportedError

FILES = ("vocab.json", "merges.txt")

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_QWEN2 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False},
        _BYTES | {"use_regex": False},
    ],
}
_SPLITTERS = {"GPT2Tokenizer": _BYTES | {"use_regex": True}, "Qwen2Tokenizer": _QWEN2}


def joined(source: SideFiles) -> bytes | None:
    """The tokenizer.json of the two files, or None where one is missing."""
    vocab, merges = (source.read_bytes(name, MAX_BYTES) for name in FILES)
    if vocab is None or merges is None:
        return None
    settings = source.read_json("tokenizer_config.json") or {}
    kind = settings.get("tokenizer_class") if isinstance(settings, Mapping) else None
    name = str(kind).removesuffix("Fast")
    if name not in _SPLITTERS:
        raise UnsupportedError(
            f"the two files do not say how text is split, and of the tokenizer's class {kind!r} "
            "that is not known",
            where="vocab.json, merges.txt",
            hint="Put the tokenizer.json that transformers makes of them beside them.",
        )
    raw: dict[str, Any] = {
        "added_tokens": [
            {"id": token.token_id, "content": token.content, "special": token.special}
            for token in added_tokens_decoder(settings)
        ],
        "normalizer": {"type": "NFC"} if name == "Qwen2Tokenizer" else None,
        "pre_tokenizer": _SPLITTERS[name],
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": _vocab(vocab), "merges": _merges(merges)},
    }
    return json.dumps(raw, ensure_ascii=False).encode()


def _vocab(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not JSON: {error}", where=FILES[0]) from None


def _merges(data: bytes) -> list[str]:
    """One merge a line in rank order; the first line may name the format's version."""
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 at byte {error.start}", where=FILES[1]) from None
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [line.removesuffix("\r") for line in lines if line.strip()]
