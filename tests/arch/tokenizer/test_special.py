"""Special ids, `add_*_token` and chat templates, against `SpecialVocab` of the gguf package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantkit.arch.tokenizer import tokenizer_kvs
from quantkit.errors import SourceError
from quantkit.types import Kv, KvType
from tests.arch.tokenizer.support import Folder, values

NAMES = ("<s>", "</s>", "<unk>", "<pad>", "<sep>", "<|eot|>", "<|cls|>")
TOKENIZER: dict[str, Any] = {
    "added_tokens": [{"id": i, "content": name, "special": True} for i, name in enumerate(NAMES)],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": {"type": "BPE", "vocab": {"a": 7}, "merges": []},
}
N_VOCAB = 10


def special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")


def template(single: list[Any], pair: list[Any] | None = None) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": single, "pair": pair or [A, B]}


BYTE_LEVEL = {"type": "ByteLevel"}
BOS_EOS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


def found(
    settings: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    post_processor: Any = None,
    **files: Any,
) -> dict[str, Any]:
    """What is written beside the vocabulary itself."""
    source = Folder(
        tokenizer__json=TOKENIZER | {"post_processor": post_processor},
        tokenizer_config__json=settings or {},
        **files,
    )
    every = values(tokenizer_kvs(source, N_VOCAB, config or {}))
    return {k: v for k, v in every.items() if "_token" in k and k != "token_type"}


@pytest.mark.parametrize(
    ("settings", "post_processor"),
    [
        ({"chat_template": "x"}, None),
        ({"bos_token": 5, "eos_token": {"content": 7}}, None),
        (BOS_EOS, None),
        (BOS_EOS, template([special("<s>"), A])),
        (BOS_EOS | {"sep_token": "<sep>", "mask_token": "<|eot|>", "cls_token": "<|cls|>"}, None),
        ({"cls_token": "<|cls|>", "sep_token": "<sep>", "bos_token": None}, None),
        ({"bos_token": "<s>", "eos_token": "none", "pad_token": "<pad>"}, BYTE_LEVEL),
        ({"bos_token": "<s>", "unk_token": "<unk>"}, template([A, special("<|eot|>")])),
    ],
)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5},
        {"eos_token_id": [1, 5], "text_config": {"eos_token_id": 4, "pad_token_id": 3}},
        {"bos_token_id": None, "text_config": {"bos_token_id": 6}, "eos_token_id": N_VOCAB},
    ],
)
def test_ids_are_those_of_the_gguf_package(
    settings: dict[str, Any], config: dict[str, Any], post_processor: Any, tmp_path: Path
) -> None:
    contents = {
        "tokenizer.json": TOKENIZER | {"post_processor": post_processor},
        "tokenizer_config.json": settings,
        "config.json": config,
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    oracle = gguf.SpecialVocab(tmp_path, n_vocab=N_VOCAB)
    keys = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
    expected = {
        f"{keys.get(role, role)}_token_id": token_id
        for role, token_id in oracle.special_token_ids.items()
        if role != "cls"  # no key for it
    }
    ids = found(settings, config, post_processor)
    assert {key: ids[key] for key in ids if key.endswith("_id")} == expected


@pytest.mark.parametrize(
    ("single", "pair", "expected"),
    [
        ([special("<s>"), A], [special("<s>"), A, special("<s>"), B], {"bos": True, "sep": False}),
        ([A, special("</s>")], None, {"eos": True}),
        ([special("<s>"), A, special("</s>")], None, {"bos": True, "eos": True}),
        ([special("<|eot|>"), A], None, {"bos": False}),
        (
            [special("<s>"), A, special("</s>")],
            [special("<s>"), A, special("</s>"), special("</s>"), B, special("</s>")],
            {"bos": True, "eos": True, "sep": True},
        ),
        ([A], [A, special("</s>"), B], {"sep": True}),
        ([A], [A, special("<pad>"), B], {"sep": False}),
        ([A], [A, B], {}),
        ([A], [B, special("</s>"), A], {}),
    ],
)
def test_templates_say_what_is_added(
    single: list[Any], pair: list[Any] | None, expected: dict[str, bool], tmp_path: Path
) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    for name, content in {
        "tokenizer.json": TOKENIZER | {"post_processor": template(single, pair)},
        "tokenizer_config.json": settings,
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert gguf.SpecialVocab(tmp_path).add_special_token == expected
    flags = found(settings, post_processor=template(single, pair))
    # Where a byte-level tokenizer.json adds no BOS, that is said too: see below.
    assert {key: flags[key] for key in flags if key.startswith("add_")} == {
        "add_bos_token": False
    } | {f"add_{role}_token": value for role, value in expected.items()}


def test_a_template_that_ends_in_another_token_makes_the_old_eos_eot() -> None:
    ids = found(BOS_EOS, post_processor=template([special("<s>"), A, special("<|eot|>")]))
    assert (ids["eos_token_id"], ids["eot_token_id"]) == (5, 1)
    assert ids["add_eos_token"] is True


def test_a_template_names_a_bos_that_the_config_does_not() -> None:
    flags = found({}, post_processor=template([special("<s>"), A]))
    assert (flags["bos_token_id"], flags["add_bos_token"]) == (0, True)


@pytest.mark.parametrize(
    ("post_processor", "settings", "bos", "eos"),
    [
        (None, {}, False, None),
        (BYTE_LEVEL, {}, False, False),
        (BYTE_LEVEL, {"add_bos_token": True}, True, False),
        (None, {"add_bos_token": True, "add_eos_token": "yes"}, True, None),
        (template([special("<s>"), A]), {"add_bos_token": False}, True, None),
        ({"type": "Sequence", "processors": [BYTE_LEVEL]}, {}, False, False),
        (
            {"type": "Sequence", "processors": [BYTE_LEVEL, template([special("<s>"), A])]},
            {},
            True,
            False,
        ),
        ({"type": "RobertaProcessing"}, {}, True, True),
    ],
)
def test_a_template_counts_before_the_config_and_the_config_before_silence(
    post_processor: Any, settings: dict[str, Any], bos: bool, eos: bool | None
) -> None:
    # llama.cpp adds a BOS by default for some names of splitters, so silence is spelled out.
    flags = found(BOS_EOS | settings, post_processor=post_processor)
    assert (flags.get("add_bos_token"), flags.get("add_eos_token")) == (bos, eos)


@pytest.mark.parametrize(
    "post_processor",
    [
        "TemplateProcessing",
        {"type": "Sequence", "processors": 5},
        {"type": "Sequence", "processors": [None, []]},
        {"type": "TemplateProcessing"},
        {"type": "TemplateProcessing", "single": 5, "pair": {"a": 1}},
        template([5, None], ["x", [], {}]),
        template([{"SpecialToken": None}, {"SpecialToken": {"id": [1]}}]),
    ],
)
def test_malformed_post_processors_do_no_harm(post_processor: Any) -> None:
    assert found(BOS_EOS, post_processor=post_processor)["bos_token_id"] == 0


def templates(settings: dict[str, Any], **files: Any) -> dict[str, Kv]:
    source = Folder(tokenizer__json=TOKENIZER, tokenizer_config__json=settings, **files)
    kvs = tokenizer_kvs(source, N_VOCAB, {})
    return {key: kv for key, kv in kvs.items() if key.startswith("tokenizer.chat")}


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({}, {}, None),
        ({"chat_template": "{{ a }}"}, {"chat_template__jinja": "b"}, "{{ a }}"),
        ({"chat_template": None}, {"chat_template__jinja": "b"}, "b"),
        ({}, {"chat_template__jinja": "{%- x -%}\r\n\t中 \n"}, "{%- x -%}\r\n\t中 \n"),
        ({}, {"chat_template__jinja": "b", "chat_template__json": {"chat_template": "c"}}, "b"),
        ({}, {"chat_template__json": {"chat_template": "c"}}, "c"),
        ({}, {"chat_template__json": {}}, None),
    ],
)
def test_the_chat_template_is_taken_as_it_is(
    settings: dict[str, Any], files: dict[str, Any], expected: str | None
) -> None:
    kvs = templates(settings, **files)
    wanted = {} if expected is None else {"tokenizer.chat_template": Kv(KvType.STRING, expected)}
    assert kvs == wanted


def test_named_templates_are_kept_by_name() -> None:
    named = [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
        {"name": "rag/x", "template": "c"},
    ]
    assert templates({"chat_template": named}) == {
        "tokenizer.chat_template": Kv(KvType.STRING, "a"),
        "tokenizer.chat_template.tool_use": Kv(KvType.STRING, "b"),
        "tokenizer.chat_template.rag_x": Kv(KvType.STRING, "c"),
        "tokenizer.chat_templates": Kv(KvType.ARRAY, ["tool_use", "rag_x"], KvType.STRING),
    }


@pytest.mark.parametrize(
    "value", [5, {"a": "b"}, ["a"], [{"name": "x"}], [{"template": "x"}], "\ud800"]
)
def test_a_template_of_another_shape_is_refused(value: Any) -> None:
    with pytest.raises(SourceError, match="chat template"):
        templates({"chat_template": value})
