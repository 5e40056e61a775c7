"""Builders of tokenizers and corpora."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from quantkit.text.tokenizer import Tokenizer, open_tokenizer
from quantkit.text.tokens import TokenSet
from tests.arch.tokenizer.support import FIXTURE, Folder

CONFIG: Mapping[str, Any] = json.loads((FIXTURE / "config.json").read_text())


def fixture_tokenizer() -> Tokenizer:
    return open_tokenizer(Folder(FIXTURE), CONFIG)


def token_set(ids: Any, **changes: Any) -> TokenSet:
    ids = np.asarray(ids, np.int32)
    fields = {
        "starts": np.zeros(1, np.int64),
        "sources": {"a.txt": len(ids)},
        "name": "set",
        "n_vocab": 1000,
        "tokenizer": "t" * 64,
        "corpus": "c" * 64,
    }
    return TokenSet(ids, **(fields | changes))


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    """A line of JSONL: user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": messages, **more}


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def corpus_file(folder: Path, sources: list[Any], files: Mapping[str, str], **more: Any) -> str:
    """Write a corpus with its files; its path."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content.encode())
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "sources": sources, **more}))
    return str(path)
