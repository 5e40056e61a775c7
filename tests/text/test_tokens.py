"""Token sets: made, cut, saved; a file that is not exactly one is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from quantkit.errors import SourceError, UsageError
from quantkit.text.chat import read_chat_template
from quantkit.text.corpus import load_corpus
from quantkit.text.tokens import TokenSet, chunks, load_tokens, tokenise
from tests.arch.tokenizer.support import FIXTURE, Folder
from tests.text.support import chat, corpus_file, fixture_tokenizer, jsonl, token_set

TOKENIZER = fixture_tokenizer()


def made(path: str, **options: Any) -> TokenSet:
    template = read_chat_template(Folder(FIXTURE))
    return tokenise(
        load_corpus(path), TOKENIZER, **{"template": template, "budget": None} | options
    )


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    rows = [chat("What is 2+2?", f"It is 4, {i}.") for i in range(20)]
    files = {"a.txt": "Hello <|im_end|> world. " * 50, "b.jsonl": jsonl(*rows)}
    return corpus_file(tmp_path, [{"file": "a.txt"}, {"file": "b.jsonl"}], files)


def test_every_document_is_encoded_by_itself_and_counted_for_its_source(mixed: str) -> None:
    tokens = made(mixed)
    parts = np.split(tokens.ids, tokens.starts[1:])
    assert len(parts) == 21
    assert parts[0].tolist() == TOKENIZER.encode(
        ("Hello <|im_end|> world. " * 50), parse_special=False
    )
    user = "<|im_user|>user<|im_middle|>What is 2+2?<|im_end|>"
    answer = "<|im_assistant|>assistant<|im_middle|>It is 4, 0.<|im_end|>"
    assert parts[1].tolist() == TOKENIZER.encode(user + answer, parse_special=True)
    assert tokens.sources == {"a.txt": len(parts[0]), "b.jsonl": len(tokens.ids) - len(parts[0])}
    assert tokens.tokenizer == TOKENIZER.digest
    assert tokens.corpus == load_corpus(mixed).digest()
    assert (tokens.name, tokens.n_vocab, tokens.refused) == ("mine", 4288, {})


def test_a_plain_file_is_encoded_as_a_whole_as_llama_perplexity_does(tmp_path: Path) -> None:
    text = "One line.\n\n  Another <think>\n" * 100
    (tmp_path / "t.txt").write_text(text)
    tokens = made(str(tmp_path / "t.txt"))
    assert tokens.ids.tolist() == TOKENIZER.encode(text[:-1], parse_special=False)
    assert tokens.starts.tolist() == [0]
    special = made(str(tmp_path / "t.txt"), parse_special=True)
    assert special.ids.tolist() == TOKENIZER.encode(text[:-1], parse_special=True)
    assert special.digest != tokens.digest


def test_one_bos_stands_first_where_the_tokenizer_adds_one(mixed: str, tmp_path: Path) -> None:
    adding = dataclasses.replace(TOKENIZER, add_bos=True)
    with_bos = tokenise(load_corpus(mixed), adding, template=None, budget=None)
    without = tokenise(load_corpus(mixed), TOKENIZER, template=None, budget=None)
    assert with_bos.ids.tolist() == [TOKENIZER.bos, *without.ids.tolist()]
    assert with_bos.starts.tolist() == [0, *(without.starts[1:] + 1).tolist()]
    (tmp_path / "b.txt").write_text("[BOS]x")
    given_ = tokenise(
        load_corpus(str(tmp_path / "b.txt")), adding, template=None, budget=None, parse_special=True
    )
    assert given_.ids.tolist().count(TOKENIZER.bos) == 1


@pytest.mark.parametrize("budget", [1, 10, 450, 600])
def test_a_budget_cuts_the_same_tokens_short(mixed: str, budget: int) -> None:
    whole, part = made(mixed), made(mixed, budget=budget)
    assert len(whole.ids) > 600
    assert part.ids.tolist() == whole.ids[:budget].tolist()
    assert sum(part.sources.values()) == budget
    assert part.starts.tolist() == [n for n in whole.starts.tolist() if n < budget]


def test_a_budget_beyond_the_corpus_takes_all_of_it(mixed: str) -> None:
    assert made(mixed, budget=10**9).digest == made(mixed).digest


@pytest.mark.parametrize("budget", [0, -1])
def test_no_budget_is_refused(mixed: str, budget: int) -> None:
    with pytest.raises(UsageError, match="budget"):
        made(mixed, budget=budget)


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(SourceError, match="holds no text"):
        made(str(tmp_path / "a.txt"))


def test_refused_chats_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(chat("x"), {"messages": [{"role": "r"}]}))
    template = dataclasses.replace(
        read_chat_template(Folder(FIXTURE)),
        text="{% if messages[0].role == 'r' %}{{ raise_exception('r') }}{% endif %}ok",
    )
    assert made(str(tmp_path / "a.jsonl"), template=template).refused == {"a.jsonl": 1}


def test_the_built_in_corpus_is_the_same_each_time() -> None:
    once, again = made("core", budget=20_000), made("core", budget=20_000)
    assert once.digest == again.digest
    assert sum(once.sources.values()) == 20_000
    weights = {".jsonl": 0, ".txt": 0}
    for name, count in once.sources.items():
        weights[Path(name).suffix] += count
    assert weights[".jsonl"] / weights[".txt"] == pytest.approx(3 / 2, rel=0.25)


token_sets = st.integers(1, 5000).flatmap(
    lambda n_vocab: st.lists(
        st.lists(st.integers(0, n_vocab - 1), min_size=1, max_size=20), min_size=1, max_size=8
    ).map(
        lambda parts: token_set(
            [token for part in parts for token in part],
            starts=np.cumsum([0, *map(len, parts[:-1])], dtype=np.int64),
            sources={"ä.txt": sum(map(len, parts)), "none": 0},
            refused={"none": 3},
            n_vocab=n_vocab,
        )
    )
)


@settings(max_examples=50, deadline=None)
@given(tokens=token_sets)
def test_what_is_saved_is_loaded(tokens: TokenSet, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("tokens") / "t.safetensors"
    tokens.save(path)
    loaded = load_tokens(path)
    for field in dataclasses.fields(TokenSet):
        np.testing.assert_equal(getattr(loaded, field.name), getattr(tokens, field.name))
    assert (loaded.ids.dtype, loaded.starts.dtype) == (np.int32, np.int64)
    assert loaded.digest == tokens.digest
    with safe_open(path, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("ids"), tokens.ids)
        np.testing.assert_array_equal(file.get_tensor("starts"), tokens.starts)


def saved(folder: Path, **changes: Any) -> bytes:
    token_set([1, 2, 3, 4, 5, 6], starts=np.array([0, 4]), **changes).save(folder / "good")
    return (folder / "good").read_bytes()


def rebuilt(good: bytes, change: Any) -> bytes:
    """The file with its header changed; `change(header, about)` may replace either's content."""
    n = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + n])
    about = json.loads(header["__metadata__"]["quantkit"])
    change(header, about)
    if "quantkit" in header.get("__metadata__", {}):
        header["__metadata__"]["quantkit"] = json.dumps(about)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + good[8 + n :]


def test_rebuilding_without_a_change_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(rebuilt(saved(tmp_path), lambda header, about: None))
    assert load_tokens(tmp_path / "t").ids.tolist() == [1, 2, 3, 4, 5, 6]


HEADERS = {
    "no metadata": (lambda h, a: h.pop("__metadata__"), "no metadata"),
    "other metadata": (lambda h, a: h.update(__metadata__={"x": "y"}), "no metadata"),
    "other format": (lambda h, a: a.update(format="quantkit-tokens-9"), "not of the format"),
    "extra key": (lambda h, a: a.update(x=1), "one too many"),
    "missing key": (lambda h, a: a.pop("corpus"), "lacks a key"),
    "vocabulary as text": (lambda h, a: a.update(n_vocab="9"), "another type"),
    "vocabulary as truth": (lambda h, a: a.update(n_vocab=True), "another type"),
    "no vocabulary": (lambda h, a: a.update(n_vocab=0), "n_vocab is 0"),
    "endless vocabulary": (lambda h, a: a.update(n_vocab=10**30), "n_vocab is 1000"),
    "small vocabulary": (lambda h, a: a.update(n_vocab=6), "ids go from 1 to 6"),
    "sources do not sum": (lambda h, a: a.update(sources={"a": 5}), "its sources have 5"),
    "negative source": (lambda h, a: a.update(sources={"a": -1, "b": 7}), "not a whole number"),
    "broken source": (lambda h, a: a.update(sources={"a": 6.0}), "not a whole number"),
    "broken refusals": (lambda h, a: a.update(refused={"a": "1"}), "not a whole number"),
    "other digest": (lambda h, a: a.update(digest="0" * 64), "the digest"),
    "other tokenizer": (lambda h, a: a.update(tokenizer="x"), "the digest"),
    "renamed tensor": (lambda h, a: h.update(x=h.pop("ids")), "holds"),
    "ids as floats": (lambda h, a: h["ids"].update(dtype="F32"), "expected I32"),
    "ids in two axes": (lambda h, a: h["ids"].update(shape=[2, 3]), "expected I32"),
    "huge shape": (lambda h, a: h["ids"].update(shape=[2**61]), "give another size"),
    "offsets outside": (lambda h, a: h["ids"].update(data_offsets=[16, 2**60]), "another size"),
    "overlap": (lambda h, a: h["ids"].update(data_offsets=[0, 24]), "overlaps"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_not_a_token_sets_are_refused(tmp_path: Path, name: str) -> None:
    change, message = HEADERS[name]
    (tmp_path / "t").write_bytes(rebuilt(saved(tmp_path), change))
    with pytest.raises(SourceError, match=message) as caught:
        load_tokens(tmp_path / "t")
    assert str(tmp_path / "t") in caught.value.where


BYTES = {
    "empty": lambda good: b"",
    "cut": lambda good: good[:-1],
    "longer": lambda good: good + b"x",
    "header beyond the file": lambda good: (2**40).to_bytes(8, "little") + good[8:],
    "a flipped id": lambda good: good[:-1] + b"\x01",
    "a pickle": lambda good: b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
    "a zip": lambda good: b"PK\x03\x04" + bytes(100),
    "deep metadata": lambda good: rebuilt(
        good, lambda h, a: h.update(__metadata__={"quantkit ": "[" * 99999})
    ).replace(b"quantkit ", b"quantkit"),
}


@pytest.mark.parametrize("name", BYTES)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "t").write_bytes(BYTES[name](saved(tmp_path)))
    with pytest.raises(SourceError):
        load_tokens(tmp_path / "t")


@pytest.mark.parametrize("starts", [[1, 4], [0, 0], [0, 4, 2], [0, 6], [0, -1]])
def test_starts_that_are_no_documents_are_refused(tmp_path: Path, starts: list[int]) -> None:
    token_set([1, 2, 3, 4, 5, 6], starts=np.array(starts)).save(tmp_path / "t")
    with pytest.raises(SourceError, match="starts"):
        load_tokens(tmp_path / "t")


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no-such"):
        load_tokens(tmp_path / "no-such")


def test_chunks_drop_the_rest() -> None:
    cut = chunks(token_set(range(23)), 5)
    assert cut.tolist() == [[5 * i + k for k in range(5)] for i in range(4)]


@pytest.mark.parametrize(("n", "n_ctx", "message"), [(4, 5, "has 4 tokens"), (4, 0, "context")])
def test_less_than_a_chunk_is_refused(n: int, n_ctx: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chunks(token_set(range(n)), n_ctx)
