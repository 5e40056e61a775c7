"""Hostile recipes, corpora, token sets, sensitivities, tokenizers and config.json."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.builders.safetensors import file_bytes
from tests.faults.guarded import assert_refused, command
from tests.faults.jobs import tokenizer_json, write_model


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside") / "home"
    write_model(folder / "model")
    return folder


@pytest.fixture
def model(home) -> Path:
    folder = home / "model"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for path in folder.iterdir():
        path.unlink()
    for name, content in before.items():
        (folder / name).write_bytes(content)


def plan(model: Path, recipe: object = "q4_0"):
    return command("plan", model, "-r", recipe)


RULE = "name: r\ndefault: Q8_0\nrules:\n"
RECIPES: dict[str, str | bytes] = {
    "empty": "",
    "a list": "[1, 2]",
    "a text": "hello",
    "not UTF-8": b"name: \xff",
    "UTF-16": "name: r".encode("utf-16"),
    "NUL": "name: a\0b",
    "a tab": "name:\tr\n\tdefault: Q8_0",
    "an alias bomb": "a: &a [x,x]\nb: &b [*a,*a]\nname: *b",
    "a Python object": "name: !!python/object/apply:os.system ['touch canary']",
    "a Python name": "name: !!python/name:os.system",
    "a tag": "name: !include /etc/passwd",
    "nested 100,000 deep": "[" * 100_000,
    "nested deep in braces": "{a: " * 50_000,
    "a number of 5,000 digits": f"name: r\ndefault: {'9' * 5000}",
    "a date that is none": "name: 2026-99-99",
    "a sexagesimal number": f"name: r\ndefault: {':'.join(['59'] * 3000)}",
    "a key twice": "name: r\nname: s\ndefault: Q8_0",
    "a key that is a list": "? [a]\n: b\nname: r",
    "100,000 keys": "\n".join(f"k{n}: 1" for n in range(100_000)),
    "a key of 100,000 letters": "k" * 100_000 + ": 1",
    "infinity": "name: r\ndefault: Q8_0\nsampling: {temp: .inf}",
    "an unknown key": "name: r\ndefault: Q8_0\nexec: rm",
    "an unknown type": "name: r\ndefault: Q99",
    "a type that holds no weights": "name: r\ndefault: I32",
    "a name that leads out": "name: ../../x\ndefault: Q8_0",
    "an absolute name": "name: /tmp/x\ndefault: Q8_0",
    "a name with an escape sequence": 'name: "\\e[2J"\ndefault: Q8_0',
    "a name of 10,000 letters": f"name: {'n' * 10_000}\ndefault: Q8_0",
    "an empty name": "name: ''\ndefault: Q8_0",
    "a pattern that is none": RULE + "  - {tensor: '(', type: F16}",
    "a pattern that takes for ever": RULE
    + "  - {tensor: '^((\\w|\\w\\w|\\.)+)+(?!t)\\W\\w$', type: F16}",
    "a pattern nested deep": RULE + f"  - {{tensor: '{'(' * 5000}a{')' * 5000}', type: F16}}",
    "a pattern of 100,000 letters": RULE + f"  - {{tensor: '{'a?' * 50_000}', type: F16}}",
    "layers that are none": RULE + "  - {layers: x, type: F16}",
    "a division by zero": RULE + "  - {layers: 0-1/0, type: F16}",
    "100,000 rules": RULE + "  - {layers: '0-999999', type: F16}\n" * 100_000,
    "a rule without a type": RULE + "  - {role: x}",
    "a bool for a count": RULE + "  - {experts: true, type: F16}",
    "4 MiB of dashes": "- " * (2 << 20),
    "4 MiB of brackets": "[]," * (4 << 20) + "[]",
    "5 MiB": "#" * (5 << 20),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe_is_refused(model, home, case):
    content = RECIPES[case]
    (home / "r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(plan(model, home / "r.yaml"), [2], home)
    assert not (home / "canary").exists()


LONG = {
    "layers by the thousand": RULE + f"  - {{layers: '{'0-99999,' * 10_000}0', type: F16}}",
    "a pattern that repeats": RULE + "  - {tensor: '((a{1,999}){1,999}){1,999}#', type: F16}",
    "4,000 rules": RULE + "  - {layers: '0-999999', role: '*a*b*c*d*', type: F16}\n" * 4_000,
}


@pytest.mark.parametrize("case", LONG)
def test_a_recipe_that_only_looks_like_much_work_is_little(model, home, case):
    (home / "r.yaml").write_text(LONG[case])
    ended = plan(model, home / "r.yaml")
    assert ended.code == 0, ended.err
    assert ended.seconds < 5
    assert ended.growth < 256 << 20


CORPORA: dict[str, str] = {
    "empty": "",
    "a file that leads out": "name: c\nsources: [{file: ../../canary.txt}]",
    "an absolute file": "name: c\nsources: [{file: /etc/passwd}]",
    "a file on a drive": "name: c\nsources: [{file: 'C:x.txt'}]",
    "a glob over the system": "name: c\nsources: [{file: '/**/*'}]",
    "a link that leads out": "name: c\nsources: [{file: link.txt}]",
    "no such file": "name: c\nsources: [{file: gone.txt}]",
    "a folder": "name: c\nsources: [{file: model}]",
    "a pipe": "name: c\nsources: [{file: pipe.txt}]",
    "no sources": "name: c\nsources: []",
    "an infinite weight": "name: c\nsources: [{file: t.txt, weight: .inf}]",
    "a negative weight": "name: c\nsources: [{file: t.txt, weight: -1}]",
    "a data set without a commit": "name: c\nsources: [{dataset: a/b, split: train}]",
    "a data set with a path": "name: c\nsources: [{dataset: ../../x, split: train}]",
    "an alias": "name: &a c\nsources: [{file: *a}]",
    "nested deep": "[" * 100_000,
}
TEXTS: dict[str, tuple[str, bytes]] = {
    "an empty text": ("x.txt", b""),
    "not UTF-8": ("x.txt", b"\xff\xfe\x00"),
    "too short": ("x.txt", b"a"),
    "lines that are no JSON": ("x.jsonl", b"{"),
    "lines nested deep": ("x.jsonl", b"[" * 100_000),
    "a line of 17 MiB": ("x.jsonl", b'{"text":"' + b"x" * (17 << 20) + b'"}'),
    "a number of 5,000 digits": ("x.jsonl", b'{"text":' + b"9" * 5000 + b"}"),
    "a line that is a list": ("x.jsonl", b"[]"),
    "a line without text": ("x.jsonl", b'{"prompt":"x"}'),
    "half a surrogate": ("x.jsonl", b'{"text":"\\ud800"}'),
    "a chat without roles": ("x.jsonl", b'{"messages":[{}]}'),
    "tokens: empty": ("x.safetensors", b""),
    "tokens: no header": ("x.safetensors", b"\0" * 8),
    "tokens: a header of 2^60": ("x.safetensors", (1 << 60).to_bytes(8, "little")),
    "tokens: a model": (
        "x.safetensors",
        file_bytes('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"a"),
    ),
    "tokens: no metadata": (
        "x.safetensors",
        file_bytes(
            '{"ids":{"dtype":"I32","shape":[1],"data_offsets":[8,12]},'
            '"starts":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
            b"\0" * 12,
        ),
    ),
    "tokens: metadata nested deep": (
        "x.safetensors",
        file_bytes(
            '{"__metadata__":{"quantkit":"' + "[" * 100_000 + '"},'
            '"ids":{"dtype":"I32","shape":[1],"data_offsets":[8,12]},'
            '"starts":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
            b"\0" * 12,
        ),
    ),
}


def calibrate(model: Path, corpus: object):
    out = model.parent / "i.gguf"
    return command("calibrate", model, "--corpus", corpus, "--budget", 512, "-t", 1, "-o", out)


@pytest.fixture(scope="module")
def with_torch(home) -> None:
    """What is imported on the first call takes its time and memory."""
    calibrate(home / "model", home / "gone.txt")


@pytest.fixture
def beside(home):
    (home.parent / "canary.txt").write_text("private " * 1000)
    for name in ("t.txt", "link.txt", "pipe.txt"):
        (home / name).unlink(missing_ok=True)
    (home / "t.txt").write_text("Moss grew. " * 200)
    (home / "link.txt").symlink_to("../canary.txt")
    os.mkfifo(home / "pipe.txt")


@pytest.mark.parametrize("case", CORPORA)
def test_a_hostile_corpus_is_refused(model, home, beside, with_torch, case):
    (home / "c.yaml").write_text(CORPORA[case])
    ended = calibrate(model, home / "c.yaml")
    assert_refused(ended, [2, 3], home)
    assert not (home / "i.gguf").exists()


@pytest.mark.parametrize("case", TEXTS)
def test_hostile_text_or_tokens_are_refused(model, home, with_torch, case):
    name, content = TEXTS[case]
    (home / name).write_bytes(content)
    try:
        corpus = home / name
        out = home / "i.gguf"
        budget = () if name.endswith(".safetensors") else ("--budget", 512)
        ended = command("calibrate", model, "--corpus", corpus, *budget, "-t", 1, "-o", out)
        assert_refused(ended, [2, 3], home)
        assert not out.exists()
    finally:
        (home / name).unlink()


SENSITIVITIES: dict[str, bytes] = {
    "empty": b"",
    "cut short": b'{"digest":"',
    "a list": b"[]",
    "not UTF-8": b'{"digest":"\xff"}',
    "nested deep": b"[" * 100_000,
    "NaN": b'{"digest":"d","text":"t","errors":{"a":{"Q4_0":NaN}},"groups":[],"joint":[]}',
    "infinity": b'{"digest":"d","text":"t","errors":{"a":{"Q4_0":1e999}},"groups":[],"joint":[]}',
    "negative": b'{"digest":"d","text":"t","errors":{"a":{"Q4_0":-1}},"groups":[],"joint":[]}',
    "a key too many": b'{"digest":"d","text":"t","errors":{},"groups":[],"joint":[],"x":1}',
    "a group of nothing": (
        b'{"digest":"d","text":"t","errors":{},"joint":[],'
        b'"groups":[{"name":"g","tensors":[],"error":1,"kld":1}]}'
    ),
    "a number of 5,000 digits": b'{"digest":"d","text":"t","errors":{"a":{"b":' + b"9" * 5000,
}


@pytest.fixture(scope="module")
def sensitivity(home, with_torch) -> Path:
    """Where `allocate` keeps what it measured of the model."""
    ended = allocate(home)
    assert ended.code == 0, ended.err
    (path,) = (home / "allocated").glob("*.sensitivity.json")
    return path


def allocate(home: Path):
    (home / "t.txt").write_text("Moss grew. " * 200)
    (home / "allocated").mkdir(exist_ok=True)
    return command(
        *("allocate", home / "model", "--target-bpw", 5, "-o", home / "allocated" / "r.yaml"),
        *("--corpus", home / "t.txt", "--calibration-tokens", 512, "--rounding", "nearest"),
        *("--types", "Q4_0,Q8_0", "-t", 1),
    )


@pytest.mark.parametrize("case", SENSITIVITIES)
def test_a_hostile_sensitivity_file_is_refused(home, sensitivity, case):
    sensitivity.write_bytes(SENSITIVITIES[case])
    assert_refused(allocate(home), [2], home)


def _tokenizer(**changes) -> bytes:
    raw = tokenizer_json()
    for key, value in changes.items():
        raw["model"][key] = value
    return json.dumps(raw).encode()


def _with(**changes) -> bytes:
    return json.dumps(tokenizer_json() | changes).encode()


TOKENIZERS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "cut short": b'{"model":',
    "not UTF-8": b'{"model":"\xff"}',
    "nested deep": b"[" * 100_000,
    "a number of 5,000 digits": b'{"model":' + b"9" * 5000 + b"}",
    "no model": b"{}",
    "model null": b'{"model":null}',
    "model a list": b'{"model":[]}',
    "another algorithm": _tokenizer(type="Unigram"),
    "vocab a list": _tokenizer(vocab=[]),
    "ids that are texts": _tokenizer(vocab={"a": "1"}),
    "ids beyond the vocabulary": _tokenizer(vocab={"a": 1 << 40}),
    "negative ids": _tokenizer(vocab={"a": -1}),
    "two tokens of one id": _tokenizer(vocab={"a": 0, "b": 0}),
    "half a surrogate": json.dumps(
        tokenizer_json() | {"added_tokens": [{"id": 256, "content": "\ud800", "special": True}]}
    ).encode(),
    "a token of a million letters": _tokenizer(vocab={"a" * 1_000_000: 0}),
    "merges a text": _tokenizer(merges="a b"),
    "merges of one": _tokenizer(merges=["a"]),
    "merges of numbers": _tokenizer(merges=[[1, 2]]),
    "merges of what is no token": _tokenizer(merges=[["zz", "zzz"]]),
    "added tokens a text": _with(added_tokens="x"),
    "an added token without an id": _with(added_tokens=[{"content": "x"}]),
    "an added token of a huge id": _with(
        added_tokens=[{"id": 1 << 62, "content": "x", "special": True}]
    ),
    "an unknown splitter": _with(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}}),
    "a splitter that is a number": _with(pre_tokenizer=7),
    "splitters nested deep": _with(
        pre_tokenizer=json.loads(
            '{"type":"Sequence","pretokenizers":[' * 200 + '{"type":"x"}' + "]}" * 200
        )
    ),
    "lists without end": b'{"model":[' + b",".join([b"[]"] * 20_000_000) + b"]}",
    "keys without end": (
        b'{"model":{"vocab":{' + b",".join(b'"%x":1' % n for n in range(5_000_000)) + b"}}}"
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(model, home, case):
    (model / "tokenizer.json").write_bytes(TOKENIZERS[case])
    assert_refused(plan(model), [3, 4], home)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, object] = {
    "no layers named": {"num_hidden_layers": None},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "10^30 layers": {"num_hidden_layers": 10**30},
    "-1 layers": {"num_hidden_layers": -1},
    "half a layer": {"num_hidden_layers": 1.5},
    "true layers": {"num_hidden_layers": True},
    "layers as a list": {"num_hidden_layers": [2]},
    "a vocabulary of 10^9": {"vocab_size": 10**9},
    "a vocabulary of 0": {"vocab_size": 0},
    "no width": {"hidden_size": 0},
    "10^9 heads": {"num_attention_heads": 10**9},
    "no heads": {"num_attention_heads": 0},
    "more key heads than heads": {"num_key_value_heads": 3},
    "no key heads": {"num_key_value_heads": 0},
    "head_dim 0": {"head_dim": 0},
    "an infinite epsilon": {"rms_norm_eps": float("inf")},
    "NaN for epsilon": {"rms_norm_eps": float("nan")},
    "a huge theta": {"rope_theta": 1e308},
    "10^400 for theta": {"rope_theta": 10**400},
    "a theta that is a text": {"rope_theta": "10000"},
    "an unknown rope": {"rope_scaling": {"rope_type": "wormhole", "factor": 2.0}},
    "a rope without numbers": {"rope_scaling": {"rope_type": "yarn"}},
    "a rope of factor 0": {"rope_scaling": {**LLAMA3, "factor": 0.0}},
    "a rope whose ends are one": {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
    "a rope without a low end": {"rope_scaling": {**LLAMA3, "low_freq_factor": 0.0}},
    "a rope of no length": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}},
    "a rope of negative theta": {"rope_scaling": LLAMA3, "rope_theta": -1.0},
    "architectures a text": {"architectures": "LlamaForCausalLM"},
    "architectures empty": {"architectures": []},
    "architectures of numbers": {"architectures": [1]},
    "architectures of a path": {"architectures": ["../../x"]},
    "architectures with an escape sequence": {"architectures": ["\x1b[2J"]},
    "text_config a list": {"text_config": {"num_hidden_layers": {}}},
    "a format that is a list": {"quantization_config": []},
    "an unknown format": {"quantization_config": {"quant_method": "exec"}},
    "a format of numbers": {"quantization_config": {"quant_method": 7}},
    "groups that are texts": {
        "quantization_config": {"quant_method": "compressed-tensors", "config_groups": "x"}
    },
    "a cosh activation": {"hidden_act": "cosh"},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_config_is_refused(model, home, case):
    config = json.loads((model / "config.json").read_text()) | CONFIGS[case]
    (model / "config.json").write_text(json.dumps(config))
    assert_refused(plan(model), [3, 4], home)
