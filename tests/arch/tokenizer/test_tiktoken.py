"""Kimi's tiktoken list: ids against tiktoken itself, through llama.cpp."""

from __future__ import annotations

import base64
import builtins
import inspect
import json
import pydoc
import random
import re
import resource
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from gguf.vocab import bytes_to_unicode
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from quantkit.arch.tokenizer import tokenizer_kvs
from quantkit.arch.tokenizer.vocab import recover_merges
from quantkit.errors import QuantkitError, SourceError, UnsupportedError
from tests.arch.tokenizer.support import (
    BYTES,
    CAPITAL_AFTER_SMALL,
    FIXTURE,
    KIMI_DIFFERENCES,
    KIMI_REGEX,
    TEXTS,
    Folder,
    ranks_file,
    values,
    write_vocab_gguf,
)
from tests.oracles import llamacpp

CONFIG: dict[str, Any] = {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}}


def kimi_folder(tokens: list[bytes], names: dict[int, str] | None = None) -> Folder:
    """A checkpoint with these ranks; `names` counts from the first special."""
    names = names if names is not None else {0: "[BOS]", 1: "[EOS]"}
    decoder = {str(len(tokens) + i): {"content": name} for i, name in names.items()}
    return Folder(
        tiktoken__model=ranks_file(tokens),
        tokenizer_config__json={"added_tokens_decoder": decoder},
    )


def official(source: Folder, specials: dict[str, int]) -> tiktoken.Encoding:
    """The published tokenizer: the list of ranks under the published pattern."""
    data = source.read_bytes("tiktoken.model", 1 << 30) or b""
    lines = [line.split() for line in data.splitlines()]
    return tiktoken.Encoding(
        "kimi",
        pat_str=KIMI_REGEX,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens=specials,
    )


def ids_of_both(
    source: Folder, vocab_size: int, config: dict[str, Any], texts: list[str], folder: Path
) -> list[tuple[str, list[int], list[int]]]:
    """Each text with tiktoken's ids and llama.cpp's, the latter from our keys."""
    kvs = tokenizer_kvs(source, vocab_size, config)
    found = values(kvs)
    controls = {
        text: i
        for i, (text, kind) in enumerate(zip(found["tokens"], found["token_type"], strict=True))
        if kind == 3
    }
    encoding = official(source, controls)
    path = write_vocab_gguf(folder / "vocab.gguf", kvs)
    ours = llamacpp.tokenize(path, texts)
    theirs = [encoding.encode(text, allowed_special="all") for text in texts]
    return list(zip(texts, theirs, ours, strict=True))


def fixture_kvs() -> dict[str, Any]:
    config = json.loads((FIXTURE / "config.json").read_text())
    return values(tokenizer_kvs(Folder(FIXTURE), 4288, config))


def test_fixture_has_the_keys_of_a_kimi_file() -> None:
    found = fixture_kvs()
    template = (FIXTURE / "chat_template.jinja").read_bytes().decode()
    assert found["tokenizer.chat_template"] == template
    assert {key: value for key, value in found.items() if not isinstance(value, list)} == {
        "model": "gpt2",
        "pre": "kimi-k2",
        "bos_token_id": 4032,
        "eos_token_id": 4033,
        "padding_token_id": 4287,
        "tokenizer.chat_template": template,
    }
    assert len(found["tokens"]) == len(found["token_type"]) == 4288
    assert found["token_type"] == [1] * 4032 + [3] * 256
    assert found["tokens"][4034] == "<|im_end|>"
    assert found["tokens"][4037] == "<|reserved_token_4037|>"
    assert len(found["merges"]) == 4032 - 256


def test_fixture_ids_are_those_of_tiktoken(tmp_path: Path) -> None:
    # Trained on English alone, it has no token that could show where the splitters differ.
    config = json.loads((FIXTURE / "config.json").read_text())
    texts = [
        *TEXTS,
        "<|im_system|>system<|im_middle|>You are helpful.<|im_end|>",
        "<|im_user|>user<|im_middle|>Hi!<|im_end|><|im_assistant|>assistant<|im_middle|>",
        "<think>no</think>yes[EOS][PAD]",
        "[BOS]text<|reserved_token_4037|> more",
        "<|im_end|",
        "[EOT",
    ]
    rows = ids_of_both(Folder(FIXTURE), 4288, config, texts, tmp_path)
    assert len(rows) >= 50
    assert [(text, ours) for text, _, ours in rows] == [(text, ids) for text, ids, _ in rows]


def test_splitting_differs_from_the_published_pattern_only_as_listed(tmp_path: Path) -> None:
    # With every short substring a token, the ids show each place where the text was split.
    pieces = {
        data[begin:end]
        for data in (text.encode() for text in TEXTS)
        for begin in range(len(data))
        for end in range(begin + 2, min(begin + 24, len(data)) + 1)
    }
    tokens = [*BYTES, *sorted(pieces, key=lambda piece: (len(piece), piece))]
    rows = ids_of_both(kimi_folder(tokens), len(tokens) + 256, CONFIG, TEXTS, tmp_path)
    assert {text for text, theirs, ours in rows if theirs != ours} == KIMI_DIFFERENCES


def trained_tokens(texts: list[str], n_tokens: int) -> list[bytes]:
    """Ranks of a BPE vocabulary trained under the published pattern."""
    trainee = tokenizers.Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(KIMI_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    spelled = sorted(trainee.get_vocab().items(), key=lambda item: item[1])
    learned = [bytes(byte_of[letter] for letter in token) for token, _ in spelled]
    return [*BYTES, *(token for token in learned if len(token) > 1)]


def test_a_larger_trained_vocabulary_gives_the_ids_of_tiktoken(tmp_path: Path) -> None:
    prose = [inspect.getdoc(each) or "" for each in vars(builtins).values()]
    source = [inspect.getsource(module) for module in (inspect, json.decoder, pydoc)]
    tokens = trained_tokens([*prose, *source, *TEXTS * 3], 12_000)
    assert len(tokens) > 8_000
    texts = [*TEXTS, *prose, "[BOS]trained[EOS]"]
    rows = ids_of_both(kimi_folder(tokens), len(tokens) + 256, CONFIG, texts, tmp_path)
    # Capitals do not matter here: no token of this vocabulary reaches across one.
    assert {text for text, theirs, ours in rows if theirs != ours} == (
        KIMI_DIFFERENCES - CAPITAL_AFTER_SMALL
    )


@given(st.text(alphabet="abAB 1!\n'sé", max_size=40))
def test_merges_take_the_place_of_ranks(text: str) -> None:
    # What tiktoken does with ranks, done with the merges that llama.cpp is given.
    tokens = [*BYTES, *TRAINED]
    merges = [tuple(merge.split(" ")) for merge in recover_merges(ranks_of(tokens))]
    order = {merge: rank for rank, merge in enumerate(merges)}
    letters = bytes_to_unicode()
    parts = [letters[byte] for byte in text.encode()]
    while candidates := [order[p] for p in pairwise(parts) if p in order]:
        i = next(i for i, p in enumerate(pairwise(parts)) if order.get(p) == min(candidates))
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    by_rank = tiktoken.Encoding(
        "one-chunk", pat_str=r"(?s).+", mergeable_ranks=ranks_of(tokens), special_tokens={}
    )
    spelled = ["".join(letters[byte] for byte in token) for token in tokens]
    assert [spelled[i] for i in by_rank.encode(text)] == parts


TRAINED = [
    b"ab",
    b"\xc3\xa9",
    b"ba",
    b"aa",
    b"aab",
    b" a",
    b" ab",
    b"bb",
    b"aaab",
    b"\n\n",
    b"abab",
]


def ranks_of(tokens: list[bytes]) -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate(tokens)}


def test_a_token_that_bpe_cannot_build_gets_no_merge() -> None:
    assert recover_merges(ranks_of([*BYTES, b"ab", b"abcd"])) == ["a b"]


def test_the_rows_beyond_the_named_specials_are_reserved_and_then_padding() -> None:
    names = {0: "[BOS]", 1: "[EOS]", 22: "<think>"}
    found = values(tokenizer_kvs(kimi_folder(BYTES, names), 256 + 260, CONFIG))
    assert found["tokens"][256:259] == ["[BOS]", "[EOS]", "<|reserved_token_258|>"]
    assert found["tokens"][278] == "<think>"
    assert found["tokens"][256 + 257 :] == ["<|reserved_token_513|>", "[PAD514]", "[PAD515]"]
    assert found["token_type"] == [1] * 256 + [3] * 258 + [5] * 2


def test_specials_without_an_embedding_row_are_left_out() -> None:
    names = {0: "[BOS]", 256: "<|beyond|>"}
    found = values(tokenizer_kvs(kimi_folder(BYTES, names), 256 + 256, CONFIG))
    assert len(found["tokens"]) == 512
    assert "<|beyond|>" not in found["tokens"]


def test_ids_come_from_the_root_of_the_config_before_text_config() -> None:
    config = {
        "model_type": "kimi_k25",
        "bos_token_id": 256,
        "eos_token_id": None,
        "pad_token_id": -1,
        "text_config": {"bos_token_id": 1, "eos_token_id": 257, "pad_token_id": 2},
    }
    found = values(tokenizer_kvs(kimi_folder(BYTES), 512, config))
    assert (found["bos_token_id"], found["eos_token_id"]) == (256, 257)
    assert "padding_token_id" not in found


_GOOD = ranks_file(BYTES)
_LINES = _GOOD.splitlines()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not base64! 0\n" + _GOOD, "tiktoken.model:1: bad base64"),
        (_GOOD + b"YQ 256\n", "tiktoken.model:257: bad base64"),
        (_GOOD + b"YWI=\n", "tiktoken.model:257: expected a rank"),
        (_GOOD + b"YWI= -1\n", "tiktoken.model:257: expected a rank"),
        (_GOOD + b"YWI= 1e3\n", "tiktoken.model:257: expected a rank"),
        (_GOOD + b"YWI= 256 257\n", "tiktoken.model:257: expected a rank"),
        (_GOOD + b"YWI= 99999999999999999999\n", "tiktoken.model:257: expected a rank"),
        (_GOOD + b" 256\n", "tiktoken.model:257: a token of 0 bytes"),
        (_GOOD + b"YWFh" * 400 + b" 256\n", "tiktoken.model:257: a token of 1200 bytes"),
        (_GOOD + b"YWI= 255\n", "tiktoken.model:257: rank 255 is given twice"),
        (_GOOD + b"YWI= 300\n", "tiktoken.model:257: rank 300 where 257 lines"),
        (_GOOD + b"YQ== 256\n", "tiktoken.model: 1 tokens are given twice"),
        (b"\n".join(_LINES[:-1]), "tiktoken.model: byte 0xff has no rank"),
        (b"", "tiktoken.model:"),
        (_GOOD + b"\n" * 600, "tiktoken.model: 856 ranks for a vocabulary of 512"),
    ],
)
def test_damaged_ranks_are_refused_by_line(data: bytes, message: str) -> None:
    source = Folder(
        tiktoken__model=data,
        tokenizer_config__json={"added_tokens_decoder": {"256": {"content": "[BOS]"}}},
    )
    with pytest.raises(SourceError) as caught:
        tokenizer_kvs(source, 512, CONFIG)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "added_tokens_decoder is missing"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder is missing"),
        ({"added_tokens_decoder": ["[BOS]"]}, "not a table"),
        ({"added_tokens_decoder": {"256": "[BOS]"}}, "has no content"),
        ({"added_tokens_decoder": {"256": {"content": ""}}}, "has no content"),
        ({"added_tokens_decoder": {"x": {"content": "[BOS]"}}}, "has id 'x'"),
        ({"added_tokens_decoder": {"-1": {"content": "[BOS]"}}}, "has id '-1'"),
        ({"added_tokens_decoder": {"²56": {"content": "[BOS]"}}}, "has id '²56'"),
        ({"added_tokens_decoder": {"255": {"content": "[BOS]"}}}, "specials have 256 to 513"),
        ({"added_tokens_decoder": {"514": {"content": "[BOS]"}}}, "specials have 256 to 513"),
        ({"added_tokens_decoder": {"256": {"content": "a"}}}, "are both 'a'"),
        (
            {"added_tokens_decoder": {"256": {"content": "<|reserved_token_257|>"}}},
            "ids 256 and 257 are both",
        ),
        ({"added_tokens_decoder": {"256": {"content": "\ud800"}}}, "not a text"),
        ({"added_tokens_decoder": {"256": {"content": "a\0b"}}}, "not a text"),
        ([], "expected a JSON object"),
    ],
)
def test_damaged_names_of_specials_are_refused(settings: Any, message: str) -> None:
    source = Folder(tiktoken__model=_GOOD, tokenizer_config__json=settings)
    with pytest.raises(SourceError, match=re.escape(message)):
        tokenizer_kvs(source, 512, CONFIG)


@pytest.mark.parametrize("vocab_size", [0, -1, 255, 1 << 40])
def test_a_vocabulary_size_that_cannot_be_is_refused(vocab_size: int) -> None:
    with pytest.raises(SourceError):
        tokenizer_kvs(kimi_folder(BYTES), vocab_size, CONFIG)


def test_a_list_of_ranks_from_another_vendor_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="nothing about how text is split"):
        tokenizer_kvs(kimi_folder(BYTES), 512, {"model_type": "qwen"})


@given(st.lists(st.binary(max_size=12), max_size=30))
def test_arbitrary_lines_are_never_more_than_an_error_with_a_cause(lines: list[bytes]) -> None:
    source = Folder(tiktoken__model=b"\n".join([*_LINES, *lines]), tokenizer_config__json={})
    with pytest.raises(QuantkitError):
        tokenizer_kvs(source, 1000, CONFIG)


@pytest.mark.slow
def test_merges_of_kimis_size_are_recovered_in_seconds() -> None:
    tokens = random_bpe(163_584)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = values(tokenizer_kvs(kimi_folder(tokens), 163_840, CONFIG))
    assert time.process_time() - start < 20  # 3.5 s on an idle core
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert len(found["tokens"]) == 163_840
    assert len(found["merges"]) > 150_000


def random_bpe(n_tokens: int) -> list[bytes]:
    """Tokens of about seven bytes, each joined from two before it."""
    rng = random.Random(1)
    tokens, known = [*BYTES], {*BYTES}
    while len(tokens) < n_tokens:
        token = tokens[rng.randrange(min(len(tokens), 4000))] + rng.choice(tokens)
        if len(token) <= 9 and token not in known:
            known.add(token)
            tokens.append(token)
    return tokens
