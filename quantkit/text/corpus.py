"""Corpora: what text is measured with, as a small YAML file, and the documents in it, mixed.

A corpus is data: sources with weights, each a file beside the YAML or a data set of the Hub at a
pinned commit. Shipped ones lie in `quantkit/corpora/`; any text or JSONL file is a corpus of its
own. docs/corpora.md lists every key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantkit.errors import UsageError
from quantkit.run.settings import parse_settings, read_settings

_HINT = "docs/corpora.md lists every key"
_HUB_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Kind = Literal["text", "chat", "jsonl"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(_Strict):
    """What the fields of a row or of a JSONL line are called."""

    text: str = "text"
    messages: str = "messages"
    tools: str = "tools"


class Source(_Strict):
    """One entry of `sources`.

    `file` is a path or glob relative to the YAML, with `/`, that stays below it; `dataset` a Hub
    id with `revision`, a commit's 40 hex digits, and `split`. `kind` says what a document is:
    `text` (a text file, or rows with a text column), `chat` (lines or rows with messages) or
    `jsonl` (lines of either sort); a file ending in .jsonl is `jsonl` and everything else `text`
    if it does not say. `weight` is the source's part of the tokens. `parse_special` says whether
    the text of special tokens means them: by default it does in chats that a template rendered.
    """

    file: str | None = None
    dataset: str | None = Field(None, pattern=rf"^{_HUB_NAME}(/{_HUB_NAME})?$")
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    config: str | None = None
    split: str | None = None
    kind: Kind | None = None
    columns: Columns = Columns()
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    parse_special: bool | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give either file or dataset")
        if self.file is not None:
            self._check_file(self.file)
        elif self.revision is None or self.split is None:
            raise ValueError("a dataset needs revision (a commit, 40 hex digits) and split")
        elif self.kind == "jsonl":
            raise ValueError("a dataset is of kind text or chat")
        return self

    def _check_file(self, file: str) -> None:
        if any((self.config, self.split, self.revision)):
            raise ValueError("config, split and revision belong to a dataset")
        parts = PurePosixPath(file).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in file or ":" in file:
            raise ValueError(f"{file!r} is not a path below the corpus file")


class CorpusFile(_Strict):
    """The whole YAML."""

    name: str = Field(pattern=_NAME)
    description: str = ""
    sources: Annotated[tuple[Source, ...], Field(min_length=1, max_length=1024)]


@dataclass(frozen=True, slots=True)
class Stream:
    """One file or data set to read documents from. `path` is None for a data set."""

    name: str
    source: Source
    path: Path | None
    weight: float

    @property
    def kind(self) -> Kind:
        """What a document is, the default filled in."""
        is_jsonl = self.path is not None and self.path.suffix == ".jsonl"
        return self.source.kind or ("jsonl" if is_jsonl else "text")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where the documents are. The files of a glob share its weight in proportion to their size."""

    name: str
    description: str
    streams: tuple[Stream, ...]

    def digest(self) -> str:
        """sha256 of all that decides about the documents: settings and the files' content."""
        data = []
        for stream in self.streams:
            settings = stream.source.model_dump(exclude={"file"})
            content = None if stream.path is None else _file_digest(stream.path)
            data.append([stream.kind, settings, stream.weight, content])
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_corpus(name_or_path: str) -> Corpus:
    """A shipped corpus by name, a YAML file, or any text or JSONL file as a corpus of one source.

    Raises `UsageError` for a name or file that is not there and for settings that do not parse.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        return _from_yaml(path)
    if name_or_path in shipped_corpora():
        return _from_yaml(_shipped_folder() / f"{name_or_path}.yaml")
    if path.is_file():
        source = Source(file="file")  # its name may look like a glob
        return Corpus(path.name, "", (Stream(path.name, source, path, 1.0),))
    raise UsageError(
        f"no corpus is called {name_or_path!r}, and there is no such file",
        hint=f"shipped are: {', '.join(shipped_corpora())}; or give a .yaml, .txt or .jsonl",
    )


def shipped_corpora() -> list[str]:
    """Names of the corpora that come with quantkit."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def _shipped_folder() -> Path:
    return Path(str(resources.files("quantkit") / "corpora"))


def _from_yaml(path: Path) -> Corpus:
    text = read_settings(path, "corpus")
    settings = parse_settings(text, CorpusFile, where=str(path), hint=_HINT)
    streams = [stream for source in settings.sources for stream in _streams(source, path)]
    names = [stream.name for stream in streams]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{twice[0]} is named by two sources", where=str(path), hint=_HINT)
    return Corpus(settings.name, settings.description, tuple(streams))


def _streams(source: Source, where: Path) -> Iterator[Stream]:
    if source.file is None:
        name = ":".join(filter(None, (source.dataset, source.config, source.split)))
        yield Stream(name, source, None, source.weight)
        return
    root = where.parent
    try:
        paths = sorted(path for path in root.glob(source.file) if path.is_file())
    except ValueError as error:
        raise UsageError(f"{source.file!r}: {error}", where=str(where), hint=_HINT) from None
    if not paths:
        raise UsageError(f"no file matches {source.file!r}", where=str(where), hint=_HINT)
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UsageError(
                f"{path.name!r} is a link that leads out of the corpus's folder",
                where=str(where),
                hint="replace the link by a copy of the file if you trust it",
            )
    sizes = [max(path.stat().st_size, 1) for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        name = path.relative_to(root).as_posix()
        yield Stream(name, source, path, source.weight * (size / sum(sizes)))
