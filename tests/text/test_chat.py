"""Templates: the same text as transformers gives, and none of them gets out or goes on forever."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from quantkit.errors import SourceError, UsageError
from quantkit.text import chat
from quantkit.text.chat import ChatRefusedError, Renderer, read_chat_template, render
from tests.arch.tokenizer.support import FIXTURE, Folder

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 < 3 & \"x\" 'y' é 北京?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "f:0", "type": "function", "function": {"name": "f", "arguments": {"b": [1]}}}
        ],
    },
    {"role": "tool", "tool_call_id": "f:0", "content": "yes"},
    {"role": "assistant", "content": "  Yes.\n"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}},
    }
]
# Every construct that published templates are made of.
TEMPLATES = {
    "fixture": (FIXTURE / "chat_template.jinja").read_text(),
    "chatml": """{{ bos_token }}
    {% for message in messages %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' }}
    {% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "tools": """{%- macro call(c) -%}{{ c.id }}:{{ c.function.arguments | tojson }}{%- endmacro -%}
{% if tools %}{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|
{{- tools | tojson(separators=(',', ':')) }}{% endif %}
{% set ns = namespace(n=0) %}
{% for m in messages if m.role != 'system' %}
{% if m.tool_calls is defined and m.tool_calls %}
{{ call(m.tool_calls[0]) }}{% continue %}
{% endif %}
{% set ns.n = ns.n + 1 %}{{ loop.index0 }}{{ ns.n }}{{ m.content.split(' ')[0] }}{{ missing }}
{% if loop.last %}{% break %}{% endif %}
{% endfor %}{{ messages[-1]['content'].rstrip() ~ messages | length }}{{ documents is none }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ m.content }}{% endif %}
{% endfor %}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_what_transformers_renders(name: str, prompt: bool) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (theirs,), _ = render_jinja_template(
        conversations=[CHAT],
        tools=TOOLS,
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        **tokens,
    )
    ours = render(TEMPLATES[name], CHAT, tools=TOOLS, add_generation_prompt=prompt, **tokens)
    assert ours == theirs


def test_one_renderer_renders_many_chats_and_keeps_nothing_between_them() -> None:
    template = "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages }}"
    with Renderer(template) as renderer:
        assert [renderer.render([]) for _ in range(3)] == ["1[]"] * 3
    with pytest.raises(ValueError, match="closed"):
        renderer.render([])


def test_the_date_is_always_the_same() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}", []) == "01 Jan 2026"


def test_what_a_template_says_against_a_chat_is_passed_on() -> None:
    with Renderer("{{ raise_exception('no ' ~ messages[0].role) }}") as renderer:
        with pytest.raises(ChatRefusedError, match="no system") as caught:
            renderer.render(CHAT)
        assert caught.value.where == "chat_template"
        with pytest.raises(ChatRefusedError, match="no user"):
            renderer.render(CHAT[1:])


# What strangers try. None may give this text or leave a file; `{canary}` is a path.
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "class by item": "{{ ''['__class__'] }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "builtins": "{{ raise_exception.__globals__['__builtins__'].open('{canary}', 'w') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch {canary}') }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch {canary}').read() }}",
    "self": "{{ self._TemplateReference__context }}",
    "self init": "{{ self.__init__.__globals__.__builtins__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "strftime": "{{ strftime_now.__self__.__class__ }}",
    "macro code": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "format": "{{ '{0.__class__.__init__}'.format(messages) }}",
    "format map": "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "format by attr": "{{ ('{0.__class__}'|attr('format'))(messages) }}",
    "format by map": "{{ ['{0.__class__}']|map('format', messages)|list }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "from import": "{% from 'os' import system %}{{ system('touch {canary}') }}",
    "extends": "{% extends 'base.html' %}",
    "change messages": "{% set x = messages.append(1) %}",
    "change context": "{% set x = messages[0].update({'role': 'x'}) %}",
    "no jinja": "{% for %}",
    "unknown tag": "{% exec 'x' %}",
    "unknown filter": "{{ 'x' | popen }}",
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long range": "{% for i in range(10 ** 9) %}x{% endfor %}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_templates_stay_in_their_cage(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    template = ESCAPES[name].replace("{canary}", str(canary))
    start = time.monotonic()
    try:
        text = render(template, CHAT)
    except SourceError as error:
        assert error.where == "chat_template"
    else:  # undefined prints as nothing
        assert text == ""
    assert not canary.exists()
    assert time.monotonic() - start < 20


LARGE = {
    "string": "{{ 'a' * 10 ** 10 }}",
    "list": "{{ [0] * 10 ** 10 }}",
    "centre": "{{ 'a'.center(10 ** 10) }}",
    "filter": "{{ 'a' | center(10 ** 10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(50) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "many pieces": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "just too long": "{{ 'a' * (16 * 1024 * 1024 + 1) }}",
}


@pytest.mark.parametrize("name", LARGE)
def test_texts_and_values_without_end_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match="more than 16,777,216 characters") as caught:
        render(LARGE[name], [])
    assert not isinstance(caught.value, ChatRefusedError)


def test_a_text_of_the_longest_length_is_given() -> None:
    assert len(render("{{ 'a' * (16 * 1024 * 1024) }}", [])) == chat.MAX_CHARS


ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "long steps": "{% for i in range(99999) %}{{ ('a' * 9999999).count('b') }}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_stopped(name: str) -> None:
    with pytest.raises(SourceError, match="takes more than 2 s") as caught:
        render(ENDLESS[name], [])
    assert "hostile" in caught.value.hint


def test_a_child_that_is_gone_is_an_error_and_not_a_wait() -> None:
    with Renderer("x") as renderer:
        renderer._child.kill()
        renderer._child.wait()
        for _ in range(2):
            with pytest.raises(SourceError, match="ended the process"):
                renderer.render([])


def test_a_chat_that_is_no_plain_data_is_refused() -> None:
    with pytest.raises(ChatRefusedError, match="not plain data"):
        render("x", [{"role": "user", "content": object()}])


def test_the_template_and_its_tokens_are_read_as_a_conversion_reads_them() -> None:
    template = read_chat_template(Folder(FIXTURE))
    assert template is not None
    assert template.text == TEMPLATES["fixture"]
    assert template.tokens == {
        f"{role}_token": f"[{role.upper()}]" for role in ("bos", "eos", "unk", "pad")
    }
    assert template.with_tools is None
    assert read_chat_template(Folder()) is None


def test_a_template_for_tools_is_kept_apart() -> None:
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    settings = {"chat_template": named, "eos_token": {"content": "</s>"}}
    template = read_chat_template(Folder(tokenizer_config__json=settings))
    assert template is not None
    assert (template.text, template.with_tools, dict(template.tokens)) == (
        "A",
        "B",
        {"eos_token": "</s>"},
    )


@pytest.mark.parametrize("settings", [[1], {"chat_template": 5}, {"chat_template": [{}]}])
def test_settings_that_hold_no_template_are_refused(settings: Any) -> None:
    with pytest.raises(SourceError):
        read_chat_template(Folder(tokenizer_config__json=json.dumps(settings)))


def test_a_missing_jinja2_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("quantkit.text.extras.import_module", absent)
    with pytest.raises(UsageError, match="jinja2") as caught:
        render("x", [])
    assert "quantkit[calibrate]" in caught.value.hint
