"""Chats as the text that the model was trained on: the checkpoint's template, in a cage.

A template is a program by a stranger. It is rendered by jinja2's immutable sandbox, without
loaders, in a child process (`_jinja.py`) that has few seconds of CPU time and little memory per
chat and may not write files.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.arch.base import SideFiles
from quantkit.arch.tokenizer.hf_json import token_text
from quantkit.arch.tokenizer.special import chat_template_kvs
from quantkit.errors import SourceError
from quantkit.run.closing import Closing
from quantkit.text.extras import require

MAX_CHARS = 16 << 20
_SECONDS = 2  # of CPU time per chat; honest templates take milliseconds
_MEMORY_BYTES = 1 << 30
_WHERE = "chat_template"
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class ChatRefusedError(SourceError):
    """The template does not render this chat; it may render others."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A checkpoint's template and the special tokens that it may name (`bos_token`: `<s>`).

    `with_tools` is the variant for chats with tools, where there is one.
    """

    text: str
    tokens: Mapping[str, str]
    with_tools: str | None = None


def read_chat_template(files: SideFiles) -> ChatTemplate | None:
    """The template that a conversion would copy; None for a model that has none."""
    settings = files.read_json("tokenizer_config.json") or {}
    if not isinstance(settings, Mapping):
        raise SourceError("expected a JSON object", where="tokenizer_config.json")
    kvs = chat_template_kvs(files, settings)
    if "tokenizer.chat_template" not in kvs:
        return None
    tokens = {f"{role}_token": token_text(settings.get(f"{role}_token")) for role in _TOKENS}
    tools = kvs.get("tokenizer.chat_template.tool_use")
    return ChatTemplate(
        kvs["tokenizer.chat_template"].value,
        {name: text for name, text in tokens.items() if text is not None},
        None if tools is None else tools.value,
    )


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **tokens: str,
) -> str:
    """One chat as text. Raises what `Renderer` raises."""
    with Renderer(template) as renderer:
        return renderer.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, tokens=tokens
        )


class Renderer(Closing):
    """Renders many chats by one template; a context manager, its child ends with it.

    As `transformers` does: blocks are trimmed, `break` and `continue` are known, `tojson` does not
    escape HTML. `strftime_now` always tells 1 January 2026. Raises `SourceError` for a template
    that is no jinja2, or that takes more than 2 s of CPU time, 1 GiB of memory or 16 Mi
    characters of text; after time or memory have run out the renderer cannot be used again.
    """

    def __init__(self, template: str) -> None:
        require("jinja2")
        script = Path(__file__).with_name("_jinja.py")
        self._child = subprocess.Popen(  # noqa: S603  (our own script)
            [sys.executable, "-P", str(script), str(_SECONDS), str(_MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._ask({"template": template, "max_chars": MAX_CHARS})
        except ChatRefusedError as error:
            self.close()
            raise SourceError(error.message, where=_WHERE) from None
        except BaseException:
            self.close()
            raise

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokens: Mapping[str, str] | None = None,
    ) -> str:
        """One chat as text; `ChatRefusedError` where the template raises an error."""
        context = {
            **(tokens or {}),
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text: str = self._ask({"context": context})["text"]
        return text

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatRefusedError(f"the chat is not plain data: {error}", where="chat") from None
        stdin, stdout = self._child.stdin, self._child.stdout
        if stdin is None or stdout is None:
            raise ValueError("the renderer is closed")
        try:
            stdin.write(line)
            stdin.flush()
        except BrokenPipeError:
            reply = b""
        else:
            reply = stdout.readline()
        if not reply.endswith(b"\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(reply)
        if "error" in answer:
            raise ChatRefusedError(answer["error"], where=_WHERE)
        if "too_long" in answer:
            raise SourceError(
                f"gives more than {MAX_CHARS:,} characters or takes more than 1 GiB of memory",
                where=_WHERE,
                hint="it is damaged or hostile; use plain text instead",
            )
        return answer

    def _died(self) -> SourceError:
        status = self._child.wait()
        cause = (
            f"takes more than {_SECONDS} s"
            if status == -signal.SIGXCPU
            else f"ended the process that renders it (status {status})"
        )
        return SourceError(
            cause, where=_WHERE, hint="it is damaged or hostile; use plain text instead"
        )

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        self._child.communicate()
