"""Byte-level tokenizer.json: names of splitters, token types, ids against HF's own library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from quantkit.arch.tokenizer import pretokenizers, tokenizer_kvs
from quantkit.errors import SourceError, UnsupportedError
from tests.arch.tokenizer.support import (
    CAPITAL_AFTER_SMALL,
    KIMI_DIFFERENCES,
    KIMI_REGEX,
    MARKS,
    TEXTS,
    Folder,
    smollm_gguf,
    values,
    write_vocab_gguf,
)
from tests.oracles import llamacpp

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
GPT2 = BYTE_LEVEL | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return step | changes


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# As published, one spelling per family.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_V3_WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
SPLITTERS: dict[str, dict[str, Any]] = {
    "gpt-2": GPT2,
    "smollm": sequence(DIGITS, GPT2),
    "llama-bpe": sequence(split(LLAMA3), BYTE_LEVEL),
    "qwen2": sequence(split(QWEN2), BYTE_LEVEL),
    "qwen35": sequence(split(QWEN35), BYTE_LEVEL),
    "tekken": sequence(split(TEKKEN), BYTE_LEVEL),
    "gpt-4o": sequence(split(GPT4O, behavior="Removed", invert=True), BYTE_LEVEL),
    "kimi-k2": sequence(split(KIMI_REGEX), BYTE_LEVEL),
    "deepseek-coder": sequence(
        split("[\r\n]"),
        split("\\s?\\p{L}+"),
        split("\\s?\\p{P}+"),
        split(DEEPSEEK_HAN),
        DIGITS,
        BYTE_LEVEL,
    ),
    "deepseek-v3": sequence(
        split("\\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK_V3_WORDS), BYTE_LEVEL
    ),
}
# llama.cpp's splitters for words that end at a change of case leave combining marks out, and know
# a contraction by ASCII letters only.
KNOWN_DIFFERENCES = {
    "tekken": {*MARKS},
    "gpt-4o": {*MARKS, "it'\u017f"},
    "kimi-k2": KIMI_DIFFERENCES - CAPITAL_AFTER_SMALL,
}


def trained(pre_tokenizer: dict[str, Any], **model: Any) -> dict[str, Any]:
    """A tokenizer.json with this splitting, in which every piece of TEXTS is a token."""
    base = tokenizers.Tokenizer(models.BPE())
    base.decoder = decoders.ByteLevel()
    spec = json.loads(base.to_str()) | {"pre_tokenizer": pre_tokenizer}
    trainee = tokenizers.Tokenizer.from_str(json.dumps(spec))
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainee.train_from_iterator(TEXTS * 2, trainer)
    raw = json.loads(trainee.to_str())
    raw["model"] |= model
    return raw


def vocab_size(raw: dict[str, Any]) -> int:
    return len(raw["model"]["vocab"])


def small(**changes: Any) -> dict[str, Any]:
    """A whole tokenizer.json of seven tokens."""
    return {
        "added_tokens": [{"id": 6, "content": "<|end|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": GPT2,
        "post_processor": None,
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4},
            "merges": ["a b", ["ab", "c"]],
        },
    } | changes


@pytest.mark.parametrize("name", SPLITTERS)
def test_splitters_are_known_by_their_steps_and_give_the_ids_of_hf(
    name: str, tmp_path: Path
) -> None:
    raw = trained(SPLITTERS[name], ignore_merges=name in {"llama-bpe", "tekken"})
    kvs = tokenizer_kvs(Folder(tokenizer__json=raw), vocab_size(raw), {})
    assert values(kvs)["pre"] == name
    original = tokenizers.Tokenizer.from_str(json.dumps(raw))
    ours = llamacpp.tokenize(write_vocab_gguf(tmp_path / "vocab.gguf", kvs), TEXTS)
    theirs = [original.encode(text, add_special_tokens=False).ids for text in TEXTS]
    different = {text for text, a, b in zip(TEXTS, ours, theirs, strict=True) if a != b}
    assert different == KNOWN_DIFFERENCES.get(name, set())


def test_deepseek_v2_is_known_by_its_long_list_of_letters(tmp_path: Path) -> None:
    # The list is too long to write down twice; what counts is that llama.cpp's is the same.
    regexes = next(k for k, v in pretokenizers._NAMES.items() if v == "deepseek-llm")[:-1]
    raw = trained(sequence(*(split(regex) for regex in regexes), DIGITS, BYTE_LEVEL))
    kvs = tokenizer_kvs(Folder(tokenizer__json=raw), vocab_size(raw), {})
    assert values(kvs)["pre"] == "deepseek-llm"
    original = tokenizers.Tokenizer.from_str(json.dumps(raw))
    ours = llamacpp.tokenize(write_vocab_gguf(tmp_path / "vocab.gguf", kvs), TEXTS)
    assert ours == [original.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_whole_words_that_are_tokens_stay_whole_only_where_the_tokenizer_says_so() -> None:
    for ignore_merges, name in ((True, "llama-bpe"), (False, "smaug-bpe")):
        raw = small(pre_tokenizer=SPLITTERS["llama-bpe"])
        raw["model"]["ignore_merges"] = ignore_merges
        assert values(tokenizer_kvs(Folder(tokenizer__json=raw), 7, {}))["pre"] == name


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        "ByteLevel",
        BYTE_LEVEL,
        GPT2 | {"add_prefix_space": True},
        sequence(split(r"\p{N}{1,4}"), GPT2),
        sequence(split(LLAMA3, behavior="MergedWithNext"), BYTE_LEVEL),
        sequence(split(LLAMA3, invert=True), BYTE_LEVEL),
        sequence(split(LLAMA3 + "|x"), BYTE_LEVEL),
        sequence(DIGITS | {"individual_digits": False}, GPT2),
        sequence({"type": "Whitespace"}, BYTE_LEVEL),
        {"type": "Metaspace", "replacement": "▁"},
        {"type": "Sequence", "pretokenizers": 5},
        {"type": "Split", "pattern": {"String": " "}},
    ],
)
def test_other_splitters_are_shown_and_refused(pre_tokenizer: Any) -> None:
    source = Folder(tokenizer__json=small(pre_tokenizer=pre_tokenizer))
    with pytest.raises(UnsupportedError, match="unknown pre-tokenizer") as caught:
        tokenizer_kvs(source, 7, {})
    assert json.dumps(pre_tokenizer, ensure_ascii=False) in caught.value.message
    assert "llama-bpe" in caught.value.hint


def test_deeply_nested_splitters_do_not_exhaust_the_stack() -> None:
    pre_tokenizer: dict[str, Any] = GPT2
    for _ in range(400):
        pre_tokenizer = sequence(pre_tokenizer)
    found = values(tokenizer_kvs(Folder(tokenizer__json=small(pre_tokenizer=pre_tokenizer)), 7, {}))
    assert found["pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("normalizer", "accepted"),
    [
        (None, True),
        ({"type": "Sequence", "normalizers": []}, True),
        ({"type": "NFC"}, True),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}]}, True),
        ({"type": "NFKC"}, False),
        ({"type": "Lowercase"}, False),
        ({"type": "Prepend", "prepend": " "}, False),
        ("NFC", False),
    ],
)
def test_normalizers_that_change_ids_are_refused(normalizer: Any, accepted: bool) -> None:
    source = Folder(tokenizer__json=small(normalizer=normalizer))
    if accepted:
        assert values(tokenizer_kvs(source, 7, {}))["pre"] == "gpt-2"
    else:
        with pytest.raises(UnsupportedError, match="normalise"):
            tokenizer_kvs(source, 7, {})


def test_types_say_where_a_token_comes_from() -> None:
    added = [
        {"id": 5, "content": "<user>", "special": False},
        {"id": 6, "content": "<|end|>", "special": True},
        {"id": 7, "content": "<｜User｜>", "special": False},
        {"id": 4, "content": "abc", "special": True},
    ]
    settings = {
        "bos_token": {"content": "c"},
        "added_tokens_decoder": {
            "8": {"content": "<config>", "special": True},
            "5": {"content": "<user>", "special": True},
        },
    }
    source = Folder(tokenizer__json=small(added_tokens=added), tokenizer_config__json=settings)
    found = values(tokenizer_kvs(source, 11, {}))
    assert list(zip(found["tokens"], found["token_type"], strict=True)) == [
        ("a", 1),
        ("b", 1),
        ("c", 3),
        ("ab", 1),
        ("abc", 3),
        ("<user>", 4),
        ("<|end|>", 3),
        ("<｜User｜>", 3),
        ("<config>", 3),
        ("[PAD9]", 5),
        ("[PAD10]", 5),
    ]
    assert found["merges"] == ["a b", "ab c"]


def _model(**changes: Any) -> dict[str, Any]:
    return small(model=small()["model"] | changes)


def _added(**changes: Any) -> dict[str, Any]:
    return small(added_tokens=[{"id": 6, "content": "<|end|>", "special": True} | changes])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (small(model=None), "model is missing"),
        (_model(vocab=["a", "b"]), "model.vocab is not a table"),
        (_model(vocab={"a": 0, "b": 0}), "'a' and 'b' have id 0"),
        (_model(vocab={"a": 7}), "token 'a' has id 7, expected 0 to 6"),
        (_model(vocab={"a": -1}), "token 'a' has id -1"),
        (_model(vocab={"a": True}), "token 'a' has id True"),
        (_model(vocab={"a": 1.0}), "token 'a' has id 1.0"),
        (_model(vocab={"a" * 5000: 1}), "a token of 5000 characters"),
        (_model(vocab={"a": 0, "\ud800": 1}, merges=[]), "token 1 is not a text"),
        (_model(vocab={"a": 0, "b\0": 1}, merges=[]), "token 1 is not a text"),
        (_model(merges=None), "model.merges is not a list"),
        (_model(merges=["ab"]), "merge 0 is 'ab', not two tokens"),
        (_model(merges=["a b c"]), "merge 0 is 'a b c', not two tokens"),
        (_model(merges=[["a", 1]]), "not two tokens"),
        (_model(merges=[["a"]]), "not two tokens"),
        (_model(merges=[5]), "merge 0 is '5', not two tokens"),
        (_model(merges=["a b", "a x"]), "merge 1: 'x' is not a token"),
        (_model(merges=["b c"]), "merge 0: 'bc' is not a token"),
        (_model(vocab={"a ": 0, "b": 1, "a b": 2}, merges=[["a ", "b"]]), "has a space in it"),
        (small(added_tokens={}), None),
        (small(added_tokens={"6": "x"}), "added_tokens is not a list"),
        (small(added_tokens=["x"]), "has no content"),
        (_added(content=None), "has no content"),
        (_added(content=""), "has no content"),
        (_added(id="6"), "has id '6'"),
        (_added(id=-1), "has id -1"),
        (_added(id=7), "has id 7, but the model has 7 ids"),
        (_added(id=0), "id 0 is both 'a' and '<|end|>'"),
        (_added(content="a"), "ids 0 and 6 are both 'a'"),
        (_added(content="[PAD5]"), "ids 5 and 6 are both '[PAD5]'"),
        ([], "expected a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b'{"model": ' + b"[" * 200_000, "not JSON"),
        (b'{"model": ' + b"1" * 10_000 + b"}", "not JSON"),
    ],
)
def test_damaged_files_are_refused(raw: Any, message: str | None) -> None:
    source = Folder(tokenizer__json=raw)
    if message is None:
        assert len(values(tokenizer_kvs(source, 7, {}))["tokens"]) == 7
        return
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        tokenizer_kvs(source, 7, {})
    assert caught.value.where == "tokenizer.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "Unigram"},
        {"type": "WordPiece"},
        {"continuing_subword_prefix": "##"},
        {"end_of_word_suffix": "</w>"},
        {"dropout": 0.1},
    ],
)
def test_other_algorithms_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(str(next(iter(changes.values()))))):
        tokenizer_kvs(Folder(tokenizer__json=_model(**changes)), 7, {})


def test_a_checkpoint_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"none of tiktoken\.model, tokenizer\.model"):
        tokenizer_kvs(Folder(), 7, {})


def test_smollm2_comes_out_as_the_published_file_has_it(tmp_path: Path) -> None:
    published = smollm_gguf()
    was = values(published)
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    raw = {
        "added_tokens": [
            {"id": i, "content": token, "special": True, **options}
            for i, (token, kind) in enumerate(zip(was["tokens"], was["token_type"], strict=True))
            if kind == 3
        ],
        "normalizer": None,
        "pre_tokenizer": SPLITTERS["smollm"],
        "post_processor": None,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(was["tokens"])},
            "merges": was["merges"],
        },
    }
    settings = {
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": was["tokenizer.chat_template"],
    }
    config = {"model_type": "llama", "bos_token_id": 99, "eos_token_id": 99}
    kvs = tokenizer_kvs(Folder(tokenizer__json=raw, tokenizer_config__json=settings), 49152, config)
    assert kvs == published
    original = tokenizers.Tokenizer.from_str(json.dumps(raw))
    texts = [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]
    ours = llamacpp.tokenize(write_vocab_gguf(tmp_path / "vocab.gguf", kvs), texts)
    assert ours == [original.encode(text, add_special_tokens=False).ids for text in texts]
