"""The child process that renders chat templates; `chat` talks to it in lines of JSON.

It is run as a script and imports nothing of quantkit. Its limits are the system's: a template that
computes or allocates without end takes this process with it and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TODAY = datetime(2026, 1, 1, tzinfo=UTC)  # the same text on every day


class _Generation(Extension):
    """`{% generation %}`, which marks what the model says for training, and prints its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _answer(request: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    if "template" in request:
        state["template"] = _environment().from_string(request["template"])
        state["max_chars"] = request["max_chars"]
        return {}
    parts: list[str] = []
    n_chars = 0
    for part in state["template"].generate(request["context"]):
        n_chars += len(part)
        if n_chars > state["max_chars"]:
            return {"too_long": True}
        parts.append(part)
    return {"text": "".join(parts)}


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(kind, (soft, hard))


def _main(seconds: int, max_bytes: int) -> None:
    _limit(resource.RLIMIT_AS, max_bytes)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + seconds)
        try:
            answer = _answer(json.loads(line), state)
        except MemoryError:
            answer = {"too_long": True}
        except Exception as error:  # whatever a stranger's template does
            answer = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
