"""Names and special tokens that go by the model, and GPT-2's two files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from quantkit.arch.tokenizer import tokenizer_file, tokenizer_kvs
from quantkit.errors import SourceError, UnsupportedError
from tests.arch.tokenizer.support import TEXTS, Folder, values, write_vocab_gguf
from tests.arch.tokenizer.test_bpe_json import SPLITTERS, small, trained, vocab_size
from tests.oracles import llamacpp


@pytest.mark.parametrize(
    ("model_type", "splitter", "ignore_merges", "name"),
    [
        ("glm4_moe", "llama-bpe", True, "glm4"),
        ("glm4_moe", "llama-bpe", False, "chatglm-bpe"),
        ("minimax_m2", "gpt-4o", False, "minimax-m2"),
        ("gpt_oss", "gpt-4o", True, "gpt-4o"),
        ("qwen3_moe", "qwen2", False, "qwen2"),
        ("mistral", "tekken", True, "tekken"),
    ],
)
def test_models_have_their_own_names_of_splitters_that_others_have_too(
    model_type: str, splitter: str, ignore_merges: bool, name: str, tmp_path: Path
) -> None:
    raw = trained(SPLITTERS[splitter], ignore_merges=ignore_merges)
    kvs = tokenizer_kvs(Folder(tokenizer__json=raw), vocab_size(raw), {"model_type": model_type})
    assert values(kvs)["pre"] == name
    texts = [text for text in TEXTS if text.isascii()]
    original = tokenizers.Tokenizer.from_str(Folder(t=raw).read_text("t", 1 << 24) or "")
    theirs = [original.encode(text, add_special_tokens=False).ids for text in texts]
    assert llamacpp.tokenize(write_vocab_gguf(tmp_path / "vocab.gguf", kvs), texts) == theirs


def test_glm_begins_with_gmask_and_ends_a_turn_where_the_next_begins() -> None:
    names = ["<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>"]
    added = [{"id": 5 + i, "content": n, "special": True} for i, n in enumerate(names)]
    raw = small(pre_tokenizer=SPLITTERS["llama-bpe"], added_tokens=added)
    source = Folder(tokenizer__json=raw, tokenizer_config__json={"eos_token": "<|endoftext|>"})
    found = values(tokenizer_kvs(source, 9, {"model_type": "glm4_moe"}))
    ids = {role: found[f"{role}_token_id"] for role in ("bos", "eos", "eot", "eom", "unknown")}
    assert ids == {"bos": 6, "eos": 5, "eot": 7, "eom": 8, "unknown": 5}
    assert "eot_token_id" not in values(tokenizer_kvs(source, 9, {"model_type": "llama"}))


def two_files(tokenizer_class: str | None = "GPT2Tokenizer", **changes: Any) -> Folder:
    files: dict[str, Any] = {
        "vocab__json": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4},
        "merges__txt": "#version: 0.2\na b\nab c\n",
        "tokenizer_config__json": {
            "tokenizer_class": tokenizer_class,
            "added_tokens_decoder": {"6": {"content": "<|end|>", "special": True}},
            "eos_token": "<|end|>",
        },
    }
    return Folder(**files | changes)


@pytest.mark.parametrize(
    ("tokenizer_class", "splitter"),
    [
        ("GPT2Tokenizer", "gpt-2"),
        ("GPT2TokenizerFast", "gpt-2"),
        ("Qwen2Tokenizer", "qwen2"),
    ],
)
def test_vocab_and_merges_are_the_tokenizer_json_that_they_stand_for(
    tokenizer_class: str, splitter: str
) -> None:
    whole = small(pre_tokenizer=SPLITTERS[splitter])
    settings = {"eos_token": "<|end|>"}
    expected = Folder(tokenizer__json=whole, tokenizer_config__json=settings)
    kvs = tokenizer_kvs(two_files(tokenizer_class), 7, {})
    wanted = tokenizer_kvs(expected, 7, {})
    assert kvs == wanted
    assert values(kvs)["merges"] == ["a b", "ab c"]


def test_tokenizer_json_goes_before_the_two_files() -> None:
    whole = small(pre_tokenizer=SPLITTERS["qwen2"])
    assert values(tokenizer_kvs(two_files(tokenizer__json=whole), 7, {}))["pre"] == "qwen2"


@pytest.mark.parametrize("tokenizer_class", [None, "CLIPTokenizer", 5])
def test_two_files_of_a_class_that_splits_otherwise_are_refused(tokenizer_class: Any) -> None:
    with pytest.raises(UnsupportedError, match="how text is split"):
        tokenizer_kvs(two_files(tokenizer_class), 7, {})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab__json": b"{"}, "not JSON"),
        ({"vocab__json": ["a"]}, "not a table"),
        ({"merges__txt": b"\xff"}, "not UTF-8"),
        ({"merges__txt": "a b c\n"}, "not two tokens"),
        ({"merges__txt": "a z\n"}, "not a token"),
    ],
)
def test_damaged_files_are_one_clear_error(files: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        tokenizer_kvs(two_files(**files), 7, {})


def test_tekken_alone_is_refused_with_what_works() -> None:
    with pytest.raises(UnsupportedError) as caught:
        tokenizer_file(Folder(tekken__json={"vocab": []}))
    assert "tokenizer.json" in caught.value.hint
