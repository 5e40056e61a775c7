"""Texts of several domains, halved, of what quantkit ships: to calibrate on one, score another.

    python benchmarks/texts.py OUT [--count MODEL ...]

For every domain OUT gets `NAME.txt` and two halves of it that share no document,
`NAME.calibration.txt` and `NAME.eval.txt`. Documents are separated as `quantkit.text.documents`
reads them. Chats are their messages without a template, so that every model sees the same text;
tool calls and what special tokens would say are left out. `--count` tells the tokens of each file
by a checkpoint's tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.source.checkpoint import open_checkpoint
from quantkit.text.corpus import Corpus, load_corpus
from quantkit.text.documents import SEPARATOR, documents
from quantkit.text.tokenizer import open_tokenizer
from quantkit.text.tokens import tokenise

# What the domains are, by the shipped corpus's files.
DOMAINS = {
    "chat": ("core/chat.jsonl", "core/chat_code.jsonl", "core/tools.jsonl"),
    "code": ("core/code.txt",),
    "languages": ("core/lang.txt", "core/chat_zh.jsonl", "core/chat_multi.jsonl"),
    "maths": ("core/maths.txt",),
    "prose": ("core/prose.txt", "core/tables.txt"),
}


def texts(corpus: Corpus) -> dict[str, list[str]]:
    """Documents of every domain, always in the same order; refuses files that belong to none."""
    streams = {stream.name: stream for stream in corpus.streams}
    if strays := streams.keys() ^ {name for names in DOMAINS.values() for name in names}:
        raise SystemExit(f"{', '.join(sorted(strays))}: not in both the corpus and the domains")
    made = {}
    for domain, names in DOMAINS.items():
        part = Corpus(domain, "", tuple(streams[name] for name in names))
        made[domain] = [_document(document.text) for document in documents(part, None)]
    return made


def _document(text: str) -> str:
    text = text.strip("\n") + "\n"
    if f"\n{SEPARATOR}\n" in f"\n{text}":
        raise SourceError("a document holds the separator", where="corpus")
    return text


def write(folder: Path, domain: str, found: Sequence[str]) -> list[Path]:
    """The whole and the halves. Documents alternate, as neighbours are often of one kind."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"": found, ".calibration": found[::2], ".eval": found[1::2]}
    paths = []
    for part, chosen in parts.items():
        path = folder / f"{domain}{part}.txt"
        path.write_bytes(f"{SEPARATOR}\n".join(chosen).encode())
        paths.append(path)
    return paths


def count(model: Path, paths: Sequence[Path]) -> list[int]:
    """Tokens of each file, as calibration and evaluation count them."""
    with open_checkpoint(model) as checkpoint:
        tokenizer = open_tokenizer(checkpoint, checkpoint.config)
    sets = [
        tokenise(load_corpus(str(path)), tokenizer, template=None, budget=None) for path in paths
    ]
    return [tokens.ids.size for tokens in sets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=Path, nargs="+", default=[], metavar="MODEL")
    args = parser.parse_args()
    paths = []
    for domain, found in texts(load_corpus("core")).items():
        paths += write(args.out, domain, found)
        print(f"{domain}: {len(found)} documents")
    counts = [count(model, paths) for model in args.count]
    print(f"| file | bytes |{''.join(f' {model.name} tokens |' for model in args.count)}")
    print("|---|---|" + "---|" * len(counts))
    for path, *numbers in zip(paths, *counts, strict=True):
        cells = (path.name, *(f"{n:,}" for n in (path.stat().st_size, *numbers)))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
