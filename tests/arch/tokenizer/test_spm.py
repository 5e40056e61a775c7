"""SentencePiece models and their tokenizer.json twins: ids against sentencepiece and HF."""

from __future__ import annotations

import io
import json
import re
import struct
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from quantkit.arch.tokenizer import tokenizer_kvs
from quantkit.arch.tokenizer.spm import read_spm
from quantkit.errors import QuantkitError, SourceError, UnsupportedError
from tests.arch.tokenizer.support import TEXTS, Folder, values, write_vocab_gguf
from tests.oracles import llamacpp


@cache
def trained(**options: Any) -> bytes:
    """A `tokenizer.model` made the way Llama 2's and Mistral's were."""
    out = io.BytesIO()
    defaults = {
        "vocab_size": 1500,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.98,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=out, **defaults | options
    )
    return out.getvalue()


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def llama_ids(tmp_path: Path, kvs: Any, texts: list[str]) -> list[list[int]]:
    return llamacpp.tokenize(write_vocab_gguf(tmp_path / "vocab.gguf", kvs), texts)


def test_ids_are_those_of_sentencepiece(tmp_path: Path) -> None:
    original = processor(trained())
    kvs = tokenizer_kvs(Folder(tokenizer__model=trained()), original.vocab_size(), {})
    assert values(kvs)["model"] == "llama"
    assert values(kvs)["pre"] == "default"
    ours = llama_ids(tmp_path, kvs, TEXTS)
    assert ours == [original.encode(text) for text in TEXTS]
    assert any(original.is_byte(token) for ids in ours for token in ids)


def test_without_a_dummy_prefix_no_space_is_put_before_the_text(tmp_path: Path) -> None:
    model = trained(add_dummy_prefix=False)
    original = processor(model)
    kvs = tokenizer_kvs(Folder(tokenizer__model=model), original.vocab_size(), {})
    assert values(kvs)["add_space_prefix"] is False
    assert llama_ids(tmp_path, kvs, TEXTS) == [original.encode(text) for text in TEXTS]


def test_every_piece_keeps_its_text_score_and_type() -> None:
    model = trained(user_defined_symbols="<sep>", control_symbols="[INST]")
    original = processor(model)
    n = original.vocab_size()
    found = values(tokenizer_kvs(Folder(tokenizer__model=model), n, {}))
    assert found["tokens"] == [original.id_to_piece(i) for i in range(n)]
    assert found["scores"] == [original.get_score(i) for i in range(n)]
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["</s>"], kinds["[INST]"]) == (2, 3, 3, 3)
    assert (kinds["<sep>"], kinds["<0x0A>"], kinds["<0xFF>"], kinds["e"]) == (4, 6, 6, 1)


def test_added_tokens_lie_over_the_pieces_and_padding_fills_up() -> None:
    n = processor(trained()).vocab_size()
    source = Folder(
        tokenizer__model=trained(),
        added_tokens__json={"<tool>": n, "▁▁tag": n + 1, "<beyond>": n + 9},
        tokenizer_config__json={
            "added_tokens_decoder": {
                "1": {"content": "<s>", "special": True},
                str(n + 2): {"content": "<|im_end|>", "special": False},
                str(n + 3): {"content": "[eot]", "special": True},
                str(n + 8): {"content": "<beyond>", "special": True},
            }
        },
    )
    found = values(tokenizer_kvs(source, n + 5, {}))
    assert found["tokens"][n:] == ["<tool>", "  tag", "<|im_end|>", "[eot]", f"[PAD{n + 4}]"]
    assert found["token_type"][n:] == [4, 4, 3, 3, 5]
    assert found["scores"][n:] == [-1000.0] * 4 + [-10000.0]
    assert found["scores"][1] == -1000.0


def test_the_space_prefix_of_the_config_counts_before_the_models() -> None:
    n = processor(trained()).vocab_size()
    for setting in (True, False):
        source = Folder(
            tokenizer__model=trained(), tokenizer_config__json={"add_prefix_space": setting}
        )
        assert values(tokenizer_kvs(source, n, {}))["add_space_prefix"] is setting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "algorithm 1, expected 2"),
        ({"normalization_rule_name": "nmt_nfkc"}, "character map"),
        ({"byte_fallback": False}, "byte piece <0x00> is missing"),
    ],
)
def test_models_that_llama_cpp_would_read_otherwise_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        tokenizer_kvs(Folder(tokenizer__model=trained(**options)), 1 << 20, {})


def test_more_pieces_than_rows_are_refused() -> None:
    n = processor(trained()).vocab_size()
    with pytest.raises(SourceError, match="more pieces than the"):
        tokenizer_kvs(Folder(tokenizer__model=trained()), n - 1, {})


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes | int | float) -> bytes:
    """One protobuf field: bytes, a varint, or a float of 32 bits."""
    if isinstance(content, bytes):
        return varint(number << 3 | 2) + varint(len(content)) + content
    if isinstance(content, float):
        return varint(number << 3 | 5) + struct.pack("<f", content)
    return varint(number << 3) + varint(content)


def piece(text: bytes = b"a", score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text) + field(2, score) + field(3, kind))


def test_unknown_fields_are_skipped() -> None:
    data = piece() + field(4, b"self test") + varint(200 << 3 | 1) + bytes(8) + field(99, 1 << 63)
    assert [each.text for each in read_spm(data, 10).pieces] == ["a"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no pieces"),
        (field(2, field(3, 2)), "it has no pieces"),
        (b"YWI= 0\nYWM= 1\n", "it has no pieces"),
        (field(1, 5), "a number where a message goes"),
        (field(1, field(1, 5)), "a number where a message goes"),
        (piece(b"\xff"), "piece 0 is not UTF-8"),
        (piece(b""), "piece 0 is ''"),
        (piece(score=float("nan")), "with score nan"),
        (piece(score=float("inf")), "with score inf"),
        (piece(kind=0), "piece 0 has type 0"),
        (piece(kind=7), "piece 0 has type 7"),
        (piece() * 11, "more pieces than the 10"),
        (piece()[:-1], "bytes where"),
        (b"\x0a\xff\xff\xff\xff\x0f", "a field of 4294967295 bytes where 0 are left"),
        (b"\x0a", "ends inside a number"),
        (b"\x80", "ends inside a number"),
        (b"\x80" * 11, "more than 64 bits"),
        (b"\x0d\x00", "a field of 4 bytes where 1 are left"),
        (b"\x0b", "wire type 3"),
    ],
)
def test_damaged_models_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        read_spm(data, 10)
    assert caught.value.where == "tokenizer.model"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read_spm(data, 10)
    except QuantkitError as error:
        assert error.where == "tokenizer.model"


@given(st.data())
def test_a_damaged_real_model_is_read_or_refused(data: st.DataObject) -> None:
    model = bytearray(trained()[:3000])
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_spm(bytes(model), 2000)
    except QuantkitError as error:
        assert error.where == "tokenizer.model"


# The same model as a tokenizer.json, in the two spellings that are in use.
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
NORMALIZER = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def twin(model: bytes, **changes: Any) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE model, with merges as HF's converter derives them."""
    original = processor(model)
    pieces = {original.id_to_piece(i): i for i in range(original.vocab_size())}
    plain = [p for p, i in pieces.items() if not (original.is_control(i) or original.is_byte(i))]
    known = set(plain) - {"<unk>"}
    merges = []
    for text in sorted(known, key=lambda p: -original.get_score(pieces[p])):
        ways = [(text[:i], text[i:]) for i in range(1, len(text))]
        ways = [way for way in ways if way[0] in known and way[1] in known]
        merges += sorted(ways, key=lambda way: (pieces[way[0]], pieces[way[1]]))
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": text, "special": True, **options}
        for i, text in enumerate(("<unk>", "<s>", "</s>"))
    ]
    raw = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": pieces,
            "merges": [list(merge) for merge in merges],
        },
    }
    return raw | changes


@pytest.mark.parametrize(
    ("spelling", "prefix"),
    [
        ({}, None),
        ({"normalizer": SPACES}, False),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, None),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "never"}}, False),
    ],
)
def test_a_json_twin_gives_the_ids_of_hf(
    spelling: dict[str, Any], prefix: bool | None, tmp_path: Path
) -> None:
    raw = twin(trained(), **spelling)
    n = len(raw["model"]["vocab"])
    kvs = tokenizer_kvs(Folder(tokenizer__json=raw), n + 2, {})
    original = tokenizers.Tokenizer.from_str(json.dumps(raw))
    ours = llama_ids(tmp_path, kvs, TEXTS)
    theirs = [original.encode(text, add_special_tokens=False).ids for text in TEXTS]
    # Metaspace puts no second space before a text that has one; llama.cpp always does.
    known = {text for text in TEXTS if text.startswith(" ") and METASPACE in spelling.values()}
    assert {text for text, a, b in zip(TEXTS, ours, theirs, strict=True) if a != b} == known
    found = values(kvs)
    assert found["token_type"][:4] == [2, 3, 3, 6]
    assert found["token_type"][n:] == [5, 5]
    assert found.get("add_space_prefix") is prefix


def test_merges_that_scores_cannot_stand_for_are_refused() -> None:
    def refused(merges: list[list[str]]) -> str:
        raw = twin(trained())
        raw["model"]["merges"] = merges
        with pytest.raises(UnsupportedError) as caught:
            tokenizer_kvs(Folder(tokenizer__json=raw), len(raw["model"]["vocab"]), {})
        assert "tokenizer.model" in caught.value.hint
        return caught.value.message

    merges = twin(trained())["model"]["merges"]
    several = next(m for m, n in pairwise(merges) if "".join(m) == "".join(n))
    rest = [merge for merge in merges if merge != several]
    assert "again, after merges of other tokens" in refused([*rest, several])
    assert "which no merge does" in refused(rest)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": None, "pre_tokenizer": METASPACE | {"split": True}},
        {"normalizer": {"type": "Sequence", "normalizers": None}},
    ],
)
def test_other_treatments_of_spaces_are_refused(changes: dict[str, Any]) -> None:
    raw = twin(trained(), **changes)
    with pytest.raises(UnsupportedError, match="not those of a SentencePiece model"):
        tokenizer_kvs(Folder(tokenizer__json=raw), len(raw["model"]["vocab"]), {})


def test_a_twin_without_all_bytes_is_refused() -> None:
    raw = twin(trained())
    del raw["model"]["vocab"]["<0x41>"]
    with pytest.raises(UnsupportedError, match="byte token <0x41> is missing"):
        tokenizer_kvs(Folder(tokenizer__json=raw), len(raw["model"]["vocab"]) + 1, {})
