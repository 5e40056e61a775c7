"""Markdown out of names and figures that may hold anything: nothing of them becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from quantkit.container.names import escaped

_SPECIAL = re.compile(r"[\\`*_\[\]<>&|~#$!{}]|:(?=//)|(?<=www)\.|@")
_BACKTICKS = re.compile("`+")


def text(words: str) -> str:
    """Words that stay words: one line, and no character of it is Markdown, HTML or a link."""
    return _SPECIAL.sub(lambda found: "\\" + found[0], escaped(words))


def code(words: str) -> str:
    """A code span, also within a table."""
    line = escaped(words).replace("|", "\\|")
    fence = "`" * (_longest(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def link(words: str, target: str) -> str:
    """A link around Markdown `words`; `target` is percent-encoded where it could end the link."""
    safe = "".join(c if c.isalnum() or c in _PLAIN else _percent(c) for c in target)
    return f"[{words}]({safe})"


def block(content: str, language: str = "") -> list[str]:
    """Lines of a fenced block, in a fence that nothing inside can close."""
    lines = [escaped(line) for line in content.splitlines()]
    fence = "`" * max(3, _longest("\n".join(lines)) + 1)
    return [f"{fence}{language}", *lines, fence]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 99) -> list[str]:
    """Lines of a table of Markdown cells; behind the first `words` columns they are numbers."""
    rule = ["---:" if k >= words else "---" for k in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def folded(title: str, content: Iterable[str]) -> list[str]:
    """Lines behind a line that opens them: the words of `title`."""
    return [f"<details><summary>{escape(escaped(title))}</summary>", "", *content, "", "</details>"]


_PLAIN = frozenset("-._~/:?=&%#+,@")


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))


def _longest(words: str) -> int:
    return max(map(len, _BACKTICKS.findall(words)), default=0)
