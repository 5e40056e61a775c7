"""Ids against llama.cpp on converted and published files, and against the original libraries."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import gguf
import make_smollm2_checkpoint
import pytest
import sentencepiece
import tokenizers

from quantkit.arch.tokenizer import tokenizer_kvs
from quantkit.errors import SourceError, UnsupportedError, UsageError
from quantkit.pipeline import Job, Output, convert
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from quantkit.text.tokenizer import Tokenizer, open_tokenizer
from tests.arch.tokenizer.support import (
    FIXTURE,
    KIMI_DIFFERENCES,
    TEXTS,
    Folder,
    write_vocab_gguf,
)
from tests.arch.tokenizer.test_bpe_json import SPLITTERS, trained, vocab_size
from tests.arch.tokenizer.test_spm import trained as trained_spm
from tests.oracles import llamacpp
from tests.text.support import CONFIG, fixture_tokenizer

# With specials of the fixture, of SmolLM2, and some that are none.
MARKED = [
    "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a<think>b</think> c [EOS]d[PAD]",
    "<|im_end|><|im_end|>",
    "<|im_end",
    "<|reserved_token_4100|> <|no_such_token|>",
]


@pytest.fixture(scope="module")
def kimi_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi")
    convert(Job(FIXTURE, "q8_0", Limits(None), name="m", mmproj=None), Output(folder, 1), Silent())
    return folder / "m-Q8_0.gguf"


@pytest.fixture(scope="module")
def smollm2_fields(smollm2_gguf: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(smollm2_gguf).fields.items()}


@pytest.fixture(scope="module")
def smollm2(smollm2_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("smollm2")
    make_smollm2_checkpoint._write_tokenizer(folder, smollm2_fields)
    config = make_smollm2_checkpoint._config(smollm2_fields, "float32")
    return open_tokenizer(Folder(folder), config)


def ids_of(tokenizer: Tokenizer, texts: list[str], *, parse_special: bool) -> list[list[int]]:
    return [tokenizer.encode(text, parse_special=parse_special) for text in texts]


@pytest.mark.parametrize("parse_special", [True, False])
def test_kimis_ids_are_llamacpps_on_the_converted_file(
    kimi_gguf: Path, parse_special: bool
) -> None:
    texts = [text for text in TEXTS if text not in KIMI_DIFFERENCES] + MARKED
    ours = ids_of(fixture_tokenizer(), texts, parse_special=parse_special)
    assert ours == llamacpp.tokenize(kimi_gguf, texts, special=parse_special)


def test_a_whole_file_is_encoded_in_one_call_as_llamacpp_does(kimi_gguf: Path) -> None:
    plain = "\n\n".join(text for text in TEXTS if text not in KIMI_DIFFERENCES) * 350
    assert len(plain) > 400_000  # where the published tokenizer begins to cut
    (theirs,) = llamacpp.tokenize(kimi_gguf, [plain], special=False)
    assert fixture_tokenizer().encode(plain, parse_special=False) == theirs


@pytest.mark.parametrize("parse_special", [True, False])
def test_smollm2s_ids_are_llamacpps_on_the_published_file(
    smollm2: Tokenizer, smollm2_gguf: Path, parse_special: bool
) -> None:
    ours = ids_of(smollm2, TEXTS + MARKED, parse_special=parse_special)
    assert ours == llamacpp.tokenize(smollm2_gguf, TEXTS + MARKED, special=parse_special)


def test_size_and_bos_are_those_of_the_published_file(
    smollm2: Tokenizer, smollm2_fields: dict[str, Any]
) -> None:
    assert smollm2.n_vocab == len(smollm2_fields["tokenizer.ggml.tokens"])
    assert smollm2.bos == smollm2_fields["tokenizer.ggml.bos_token_id"]
    assert not smollm2.add_bos


def sentencepiece_folder(**settings: Any) -> tuple[Folder, dict[str, Any]]:
    model = trained_spm(user_defined_symbols="<sep>")
    n = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    names = {str(n): {"content": "<|im_end|>", "special": True}}
    folder = Folder(
        tokenizer__model=model,
        tokenizer_config__json={"added_tokens_decoder": names} | settings,
    )
    return folder, {"vocab_size": n + 2}


@pytest.mark.parametrize("parse_special", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_llamacpps(tmp_path: Path, prefix: bool, parse_special: bool) -> None:
    folder, config = sentencepiece_folder(add_prefix_space=prefix)
    path = write_vocab_gguf(tmp_path / "v.gguf", tokenizer_kvs(folder, config["vocab_size"], {}))
    texts = [*TEXTS, *MARKED, "a<sep>b <sep><sep> c", "<s>text</s>", "<unk> x"]
    ours = ids_of(open_tokenizer(folder, config), texts, parse_special=parse_special)
    assert ours == llamacpp.tokenize(path, texts, special=parse_special)


def llama_json() -> tuple[dict[str, Any], int]:
    """A tokenizer.json of Llama 2's kind: byte fallback, a space put before the text."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    normalizer = tokenizers.normalizers
    model.normalizer = normalizer.Sequence([normalizer.Prepend("▁"), normalizer.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials[:3], show_progress=False, max_token_length=2
    )
    model.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    raw = json.loads(model.to_str())
    vocab = raw["model"]["vocab"]
    for piece in specials[3:]:
        vocab.setdefault(piece, len(vocab))
    return raw, len(vocab)


def test_byte_fallback_ids_are_llamacpps_and_those_of_tokenizers(tmp_path: Path) -> None:
    raw, n = llama_json()
    folder = Folder(tokenizer__json=raw)
    path = write_vocab_gguf(tmp_path / "v.gguf", tokenizer_kvs(folder, n, {}))
    texts = ["the cat", "a  mat on 北京 é", " sat"]
    ours = ids_of(open_tokenizer(folder, {"vocab_size": n}), texts, parse_special=True)
    original = tokenizers.Tokenizer.from_str(json.dumps(raw))
    assert ours == llamacpp.tokenize(path, texts)
    assert ours == [original.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "deepseek-v3"])
def test_byte_level_ids_are_those_of_tokenizers(name: str) -> None:
    raw = trained(SPLITTERS[name], ignore_merges=name == "llama-bpe")
    ours = open_tokenizer(Folder(tokenizer__json=raw), {"vocab_size": vocab_size(raw)})
    original = tokenizers.Tokenizer.from_str(json.dumps(raw))
    theirs = [original.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert ids_of(ours, TEXTS, parse_special=True) == theirs


def test_truncation_and_padding_of_the_file_are_not_followed() -> None:
    raw = trained(SPLITTERS["gpt-2"])
    plain = open_tokenizer(Folder(tokenizer__json=raw), {"vocab_size": vocab_size(raw)})
    raw |= {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst"}
        | {"stride": 0},
        "padding": {"strategy": {"Fixed": 512}, "direction": "Right", "pad_id": 0}
        | {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "x"},
    }
    cut = open_tokenizer(Folder(tokenizer__json=raw), {"vocab_size": vocab_size(raw)})
    text = "The quick brown fox jumps over the lazy dog."
    assert len(plain.encode(text, parse_special=False)) > 4
    assert cut.encode(text, parse_special=False) == plain.encode(text, parse_special=False)


@pytest.mark.parametrize(
    ("files", "bos", "add_bos"),
    [
        (lambda: (Folder(FIXTURE), CONFIG), 4032, False),
        (sentencepiece_folder, 1, True),
        (lambda: sentencepiece_folder(add_bos_token=False), 1, False),
    ],
)
def test_bos_is_told_and_never_added(files: Any, bos: int, add_bos: bool) -> None:
    folder, config = files()
    tokenizer = open_tokenizer(folder, config)
    assert (tokenizer.bos, tokenizer.add_bos) == (bos, add_bos)
    assert bos not in tokenizer.encode("Hello", parse_special=True)


def test_llamacpp_adds_a_bos_where_the_tokenizer_says_so(tmp_path: Path, kimi_gguf: Path) -> None:
    folder, config = sentencepiece_folder()
    path = write_vocab_gguf(tmp_path / "v.gguf", tokenizer_kvs(folder, config["vocab_size"], {}))
    for gguf_path, tokenizer in (
        (path, open_tokenizer(folder, config)),
        (kimi_gguf, fixture_tokenizer()),
    ):
        (ids,) = llamacpp.tokenize(gguf_path, ["Hello"], add_special=True)
        assert (ids[0] == tokenizer.bos) == tokenizer.add_bos


def test_the_digest_follows_what_decides_about_ids_and_nothing_else() -> None:
    def digest(**settings: Any) -> str:
        return open_tokenizer(*sentencepiece_folder(**settings)).digest

    assert digest() == digest() == digest(chat_template="{{ x }}")
    assert len({digest(), digest(add_prefix_space=False), digest(add_bos_token=False)}) == 3
    assert digest() != fixture_tokenizer().digest


def test_the_ranks_of_kimi_come_before_a_tokenizer_json() -> None:
    both = Folder(FIXTURE, tokenizer__json=trained(SPLITTERS["gpt-2"]))
    ours = open_tokenizer(both, CONFIG).encode("Hello world", parse_special=True)
    assert ours == fixture_tokenizer().encode("Hello world", parse_special=True)


def test_runs_of_blanks_that_tiktoken_cannot_split_are_refused() -> None:
    tokenizer = fixture_tokenizer()
    assert tokenizer.encode(" " * 300_000 + "x", parse_special=False)
    with pytest.raises(SourceError, match="more than 400,000 blanks"):
        tokenizer.encode("a" + " " * 1_000_000 + "x", parse_special=False)


def test_a_missing_library_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "tiktoken":
            raise ModuleNotFoundError("No module named 'tiktoken'")
        return real(name, package)

    monkeypatch.setattr("quantkit.text.extras.import_module", absent)
    with pytest.raises(UsageError, match="tiktoken") as caught:
        fixture_tokenizer()
    assert "quantkit[calibrate]" in caught.value.hint


def test_no_tokenizer_at_all_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        open_tokenizer(Folder(), {"vocab_size": 7})
