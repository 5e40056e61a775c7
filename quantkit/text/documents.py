"""The documents of a corpus in the order in which they are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.arch.tokenizer.vocab import is_text
from quantkit.errors import QuantkitError, SourceError
from quantkit.text.chat import ChatRefusedError, ChatTemplate, Renderer
from quantkit.text.corpus import Corpus, Stream
from quantkit.text.extras import require

SEPARATOR = "<<<>>>"
_MAX_FILE_BYTES = 1 << 30  # a text file is held as a whole
_MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """A text, the name of the file or data set that it is from, and what its specials mean."""

    text: str
    source: str
    parse_special: bool


@dataclass(frozen=True, slots=True)
class _Chat:
    messages: list[dict[str, Any]]
    tools: list[Any] | None


@dataclass(slots=True)
class Refused:
    """Chats that the template refused: how many of each source, and the first reason."""

    counts: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def documents(
    corpus: Corpus,
    template: ChatTemplate | None,
    *,
    cost: Callable[[Document], int] = lambda document: len(document.text),
    refused: Refused | None = None,
) -> Generator[Document, None, None]:
    """Every document once, sources interleaved by weight, always in the same order.

    Next is the source that has had the least for its weight, as measured by `cost` (characters;
    each document is asked once, before it is given). Chats become text by `template`, or without
    one by joining their contents. A chat that the template refuses is left out and counted in
    `refused`; a source all of whose documents are refused is an error. Texts without characters
    are left out. Raises `SourceError` for files that are not what the corpus says.
    """
    refused = Refused() if refused is None else refused
    with ExitStack() as stack:
        writer = _Writer(template, stack, refused)
        left = {stream.name: writer.documents(stream) for stream in corpus.streams}
        weights = {stream.name: stream.weight for stream in corpus.streams}
        spent = dict.fromkeys(left, 0.0)
        while left:
            name = min(left, key=lambda name: spent[name])
            document = next(left[name], None)
            if document is None:
                del left[name]
                continue
            spent[name] += cost(document) / weights[name]
            yield document


class _Writer:
    """Makes documents of what a stream holds; starts the template's renderer at the first chat."""

    def __init__(self, template: ChatTemplate | None, stack: ExitStack, refused: Refused) -> None:
        self._template = template
        self._stack = stack
        self._renderers: dict[str, Renderer] = {}
        self._refused = refused

    def documents(self, stream: Stream) -> Iterator[Document]:
        special = stream.source.parse_special
        n_given = 0
        for item in _items(stream):
            if isinstance(item, str):
                text, is_special = item, bool(special)
            else:
                rendered = self._render(item, stream)
                if rendered is None:
                    continue
                text, is_special = rendered, self._template is not None and special is not False
            n_given += 1
            if not is_text(text):
                raise SourceError("a text holds half a surrogate pair", where=stream.name)
            if text:
                yield Document(text, stream.name, is_special)
        if not n_given:
            n_refused = self._refused.counts.get(stream.name, 0)
            raise SourceError(
                f"the template refuses all {n_refused} chats: {self._refused.reason}"
                if n_refused
                else "holds no document",
                where=stream.name,
            )

    def _render(self, chat: _Chat, stream: Stream) -> str | None:
        if self._template is None:
            return "\n\n".join(_plain(message) for message in chat.messages) + "\n"
        template = self._template.text
        if chat.tools and self._template.with_tools is not None:
            template = self._template.with_tools
        if template not in self._renderers:
            self._renderers[template] = self._stack.enter_context(Renderer(template))
        renderer = self._renderers[template]
        reason = ""
        # Some templates want a call's arguments as an object, some as its JSON text.
        for messages in (_with_parsed_arguments(chat.messages), chat.messages):
            try:
                return renderer.render(messages, tools=chat.tools, tokens=self._template.tokens)
            except ChatRefusedError as error:
                reason = reason or error.message
        counts = self._refused.counts
        counts[stream.name] = counts.get(stream.name, 0) + 1
        self._refused.reason = self._refused.reason or reason
        return None


def _plain(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _with_parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "tool_calls": [_parsed_call(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _items(stream: Stream) -> Iterator[str | _Chat]:
    if stream.path is None:
        return _rows(stream)
    return _texts(stream.path) if stream.kind == "text" else _lines(stream.path, stream)


def _texts(path: Path) -> Iterator[str]:
    """A text file as one document, or cut at lines that are exactly `<<<>>>`.

    Bytes are taken as they are. The line end at the very end is no part of a single document:
    llama.cpp's tools drop it.
    """
    if (n_bytes := path.stat().st_size) > _MAX_FILE_BYTES:
        raise SourceError(
            f"{n_bytes:,} bytes, at most {_MAX_FILE_BYTES:,} are read",
            where=str(path),
            hint="take a part of it, or cut it into several files",
        )
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 at byte {error.start}", where=str(path)) from None
    if f"\n{SEPARATOR}\n" not in f"\n{text}\n":
        yield text.removesuffix("\n")
        return
    lines: list[str] = []
    for line in [*text.split("\n"), SEPARATOR]:
        if line != SEPARATOR:
            lines.append(line)
            continue
        document = "\n".join(lines).strip("\n")
        lines = []
        if document:
            yield document + "\n"


def _lines(path: Path, stream: Stream) -> Iterator[str | _Chat]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > _MAX_LINE_BYTES:
                raise SourceError(f"a line of more than {_MAX_LINE_BYTES:,} bytes", where=where)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise SourceError(f"not a line of JSON: {str(error)[:200]}", where=where) from None
            yield _item(row, stream, where)


def _rows(stream: Stream) -> Iterator[str | _Chat]:
    source = stream.source
    library = require("datasets")
    try:
        rows = library.load_dataset(
            source.dataset,
            name=source.config,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        for number, row in enumerate(rows):
            yield _item(row, stream, f"{stream.name}: row {number}")
    except QuantkitError:
        raise
    except Exception as error:  # the network's and every file format's
        raise SourceError(f"cannot be read: {str(error)[:400]}", where=stream.name) from error


def _item(row: Any, stream: Stream, where: str) -> str | _Chat:
    """A row or line as text or chat, whichever the source allows and the row holds."""
    columns = stream.source.columns
    if not isinstance(row, dict):
        raise SourceError(f"expected an object, got {type(row).__name__}", where=where)
    if stream.kind != "chat" and isinstance(text := row.get(columns.text), str):
        return text
    if stream.kind != "text" and isinstance(messages := row.get(columns.messages), list):
        tools = row.get(columns.tools)
        if tools is not None and not isinstance(tools, list):
            raise SourceError(f"{columns.tools} is not a list", where=where)
        return _Chat([_message(message, where) for message in messages], tools or None)
    wanted = {
        "text": f"a text {columns.text!r}",
        "chat": f"a list {columns.messages!r}",
        "jsonl": f"a text {columns.text!r} or a list {columns.messages!r}",
    }[stream.kind]
    raise SourceError(f"has no {wanted.removeprefix('a ')}", where=where, hint=f"expected {wanted}")


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message without its nulls, which data sets have for every key that some row has."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise SourceError(f"a message has no role: {str(message)[:80]!r}", where=where)
    present = {key: value for key, value in message.items() if value is not None}
    return {"content": "", **present}
