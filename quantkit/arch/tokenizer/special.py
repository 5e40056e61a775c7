"""Special token ids, whether they are added to a text, and the chat template.

The precedence is that of the reference converter (`SpecialVocab` of the gguf package): ids come
from the token named in tokenizer_config.json, looked up in tokenizer.json, then from config.json,
there from the root before `text_config`. generation_config.json has no say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.arch.base import SideFiles
from quantkit.arch.tokenizer.hf_json import read_added_tokens, token_text
from quantkit.arch.tokenizer.vocab import is_text
from quantkit.errors import SourceError
from quantkit.types import Kv, KvType

_MAX_TEMPLATE_BYTES = 4 << 20

# Role -> key; llama.cpp spells "seperator" so. A class token only stands in for a missing BOS.
KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


def special_kvs(
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    raw: Mapping[str, Any] | None,
    vocab_size: int,
    add_bos: bool | None,
) -> dict[str, Kv]:
    """`*_token_id` and `add_*_token`. `raw` is tokenizer.json, `add_bos` the last resort.

    An id that is negative or beyond the vocabulary means "none", as it does in the wild.
    """
    names = {role: token_text(settings.get(f"{role}_token")) for role in (*KEYS, "cls")}
    names["bos"] = names["bos"] or names["cls"]
    names["eos"] = names["eos"] or names["sep"]
    adds: dict[str, bool] = {}
    by_text: dict[str, int] = {}
    if raw is not None:
        for token in read_added_tokens(raw):
            by_text.setdefault(token.content, token.token_id)
        adds = _post_processing(raw.get("post_processor"), settings, names)
    else:
        _add_flags(settings, adds)
    if add_bos is not None:
        adds.setdefault("bos", add_bos)
    kvs = {}
    for role, key in KEYS.items():
        token_id = by_text.get(names[role] or "", -1)
        if not 0 <= token_id < vocab_size:
            token_id = _configured_id(config, role, vocab_size)
        if token_id >= 0:
            kvs[f"tokenizer.ggml.{key}"] = Kv(KvType.U32, token_id)
    for role, value in adds.items():
        kvs[f"tokenizer.ggml.add_{role}_token"] = Kv(KvType.BOOL, value)
    return kvs


def _configured_id(config: Mapping[str, Any], role: str, vocab_size: int) -> int:
    """`{role}_token_id` of config.json, or -1. A list (several EOS) names no single token."""
    text = config.get("text_config")
    token_id = config.get(f"{role}_token_id")
    if token_id is None and isinstance(text, Mapping):
        token_id = text.get(f"{role}_token_id")
    return token_id if type(token_id) is int and 0 <= token_id < vocab_size else -1


def _add_flags(settings: Mapping[str, Any], adds: dict[str, bool]) -> None:
    for role in ("bos", "eos", "sep"):
        if isinstance(flag := settings.get(f"add_{role}_token"), bool):
            adds.setdefault(role, flag)


def _post_processing(
    post_processor: Any, settings: Mapping[str, Any], names: dict[str, str | None]
) -> dict[str, bool]:
    """Which specials are added to a text.

    A template says so itself; then tokenizer_config.json's flags count; a post-processor that is
    only about bytes adds nothing.
    """
    adds: dict[str, bool] = {}
    kinds = set()
    for processor in _processors(post_processor):
        kinds.add(processor.get("type"))
        if processor.get("type") == "TemplateProcessing":
            single, pair = _items(processor, "single"), _items(processor, "pair")
            _read_single(single, names, adds)
            _read_pair(single, pair, names, adds)
        elif processor.get("type") == "RobertaProcessing":
            adds.update(bos=True, eos=True, sep=True)
    _add_flags(settings, adds)
    if "ByteLevel" in kinds:
        adds.setdefault("bos", False)
        adds.setdefault("eos", False)
    return adds


def _processors(post_processor: Any) -> list[Mapping[str, Any]]:
    if not isinstance(post_processor, Mapping):
        return []
    inner = post_processor.get("processors", [post_processor])
    return [each for each in inner if isinstance(each, Mapping)] if isinstance(inner, list) else []


def _items(processor: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
    """A template as ("SpecialToken", text) and ("Sequence", "A") pairs."""
    items = processor.get(key) or []
    flat = []
    for item in items if isinstance(items, list) else []:
        for kind, body in item.items() if isinstance(item, Mapping) else ():
            flat.append((str(kind), str(body.get("id")) if isinstance(body, Mapping) else ""))
    return flat


def _ends(single: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """The special tokens that a template puts first and last, if any."""
    if len(single) < 2:
        return None, None
    (first_kind, first), (last_kind, last) = single[0], single[-1]
    return (
        first if first_kind == "SpecialToken" else None,
        last if last_kind == "SpecialToken" else None,
    )


def _read_single(
    single: list[tuple[str, str]], names: dict[str, str | None], adds: dict[str, bool]
) -> None:
    """A leading special is BOS. A trailing one is EOS; an EOS of another name becomes EOT."""
    first, last = _ends(single)
    if first is not None:
        names["bos"] = names["bos"] or first
        adds["bos"] = first == names["bos"]
    if last is not None:
        if names["eos"] not in {None, last}:
            names["eot" if names["eot"] is None else "eom"] = names["eos"]
        names["eos"] = last
        adds["eos"] = True


def _read_pair(
    single: list[tuple[str, str]],
    pair: list[tuple[str, str]],
    names: dict[str, str | None],
    adds: dict[str, bool],
) -> None:
    """Whether a separator stands between two texts: `A [sep|eos] ([sep|eos]) B`."""
    first, last = _ends(single)
    if pair and pair[0] == ("SpecialToken", first):
        pair = pair[1:]
    if pair and pair[-1] == ("SpecialToken", last):
        pair = pair[:-1]
    if len(pair) < 3 or pair[0] != ("Sequence", "A") or pair[-1] != ("Sequence", "B"):
        return
    separators = {names["sep"], names["eos"]} - {None}
    between = [text if kind == "SpecialToken" else None for kind, text in pair[1:-1]]
    adds["sep"] = (between[0] in separators and last is None) or (
        len(between) == 2 and between[1] in separators
    )
    if adds["sep"]:
        names["sep"] = names["sep"] or names["eos"]


def chat_template_kvs(files: SideFiles, settings: Mapping[str, Any]) -> dict[str, Kv]:
    """The template as published, never rendered: one text, or several by name.

    tokenizer_config.json comes first, then chat_template.jinja, then chat_template.json.
    """
    template = settings.get("chat_template")
    if template is None:
        template = files.read_text("chat_template.jinja", _MAX_TEMPLATE_BYTES)
    if template is None and isinstance(wrapped := files.read_json("chat_template.json"), Mapping):
        template = wrapped.get("chat_template")
    if template is None:
        return {}
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    kvs, others = {}, []
    for entry in named:
        name, text = (
            (entry.get("name"), entry.get("template"))
            if isinstance(entry, Mapping)
            else (None, None)
        )
        if not (isinstance(name, str) and isinstance(text, str) and is_text(text)):
            raise SourceError(
                f"expected a chat template's name and text, got {str(entry)[:80]!r}",
                where="tokenizer_config.json",
            )
        name = re.sub(r"[^A-Za-z0-9]", "_", name)
        if name == "default":
            kvs["tokenizer.chat_template"] = Kv(KvType.STRING, text)
        else:
            others.append(name)
            kvs[f"tokenizer.chat_template.{name}"] = Kv(KvType.STRING, text)
    if others:
        kvs["tokenizer.chat_templates"] = Kv(KvType.ARRAY, others, KvType.STRING)
    return kvs
