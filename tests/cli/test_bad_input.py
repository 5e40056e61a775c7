"""Damaged, hostile and unsupported input: one clear message, an exit code, no file."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantkit.cli import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
SHARD = "model-00002-of-000007.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "language_model.model.layers.1.mlp.experts.3.up_proj"


@dataclass
class Ended:
    returncode: int
    stderr: str


@pytest.fixture
def convert(monkeypatch, capfd):
    """Run `quantkit convert` as its entry point does, in this process."""

    def run(model: Path, out: Path, recipe: str = "q4_x") -> Ended:
        arguments = ["quantkit", "convert", str(model), "-r", recipe, "-o", str(out), "-t", "2"]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest has its own
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code, capfd.readouterr().err)

    return run


@pytest.fixture
def model(tmp_path):
    """A copy of the fixture whose files may be spoiled."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for path in FIXTURE.iterdir():
        shutil.copy(path, folder / path.name)
        os.chmod(folder / path.name, 0o644)
    return folder


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(model: Path, change) -> None:
    header, data = header_of(model / SHARD)
    change(header)
    rewrite(model / SHARD, header, data)


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def truncate(model):
    os.truncate(model / SHARD, os.path.getsize(model / SHARD) - 1000)


def header_length_of_2_to_60(model):
    raw = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(struct.pack("<Q", 1 << 60) + raw[8:])


def overlapping_tensors(model):
    def change(header):
        entry = header[f"{EXPERT}.weight_packed"]
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin - 64, end - 64]

    edit_header(model, change)


def missing_shard(model):
    (model / SHARD).unlink()


def parent_folder_in_the_index(model):
    edit_json(
        model / INDEX,
        lambda data: data["weight_map"].update({f"{EXPERT}.weight_packed": f"../{SHARD}"}),
    )


def wrong_shape_of_packed_weights(model):
    def change(header):
        entry = header[f"{EXPERT}.weight_packed"]
        rows, columns = entry["shape"]
        entry["shape"] = [rows * 2, columns // 2]

    edit_header(model, change)


def wrong_weight_shape_values(model):
    header, data = header_of(model / SHARD)
    begin, _ = header[f"{EXPERT}.weight_shape"]["data_offsets"]
    rewrite(model / SHARD, header, data[:begin] + struct.pack("<i", 999) + data[begin + 4 :])


def nan_scale(model):
    header, data = header_of(model / SHARD)
    begin, _ = header[f"{EXPERT}.weight_scale"]["data_offsets"]
    rewrite(model / SHARD, header, data[: begin + 20] + b"\xc0\x7f" + data[begin + 22 :])


def infinite_norm(model):
    name = "language_model.model.layers.1.input_layernorm.weight"
    header, data = header_of(model / SHARD)
    begin, _ = header[name]["data_offsets"]
    rewrite(model / SHARD, header, data[:begin] + b"\x80\x7f" + data[begin + 2 :])


def unknown_architecture(model):
    edit_json(model / "config.json", lambda data: data.update(architectures=["GalaxyBrainLM"]))


def a_tensor_too_many(model):
    def change(header):
        header["language_model.model.layers.1.extra.weight"] = header.pop(
            "language_model.model.layers.1.input_layernorm.weight"
        )

    edit_header(model, change)
    edit_json(
        model / INDEX,
        lambda data: data["weight_map"].update(
            {"language_model.model.layers.1.extra.weight": data["weight_map"].pop(
                "language_model.model.layers.1.input_layernorm.weight"
            )}
        ),
    )  # fmt: skip


def more_layers_than_there_are(model):
    edit_json(model / "config.json", lambda data: data["text_config"].update(num_hidden_layers=5))


def a_count_that_is_a_string(model):
    edit_json(model / "config.json", lambda data: data["text_config"].update(hidden_size="512"))


def config_is_not_json(model):
    (model / "config.json").write_text("{")


def no_config(model):
    (model / "config.json").unlink()


def no_tokenizer(model):
    (model / "tiktoken.model").unlink()


def broken_tokenizer(model):
    (model / "tiktoken.model").write_text("!!! 0\n")


def only_pickles(model):
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


CASES = [
    (truncate, 3, [SHARD]),
    (header_length_of_2_to_60, 3, [SHARD]),
    (overlapping_tensors, 3, [SHARD, EXPERT]),
    (missing_shard, 3, [SHARD]),
    (parent_folder_in_the_index, 3, [INDEX, "../"]),
    (wrong_shape_of_packed_weights, 3, [SHARD, EXPERT]),
    (wrong_weight_shape_values, 3, [SHARD, EXPERT]),
    (nan_scale, 7, [SHARD, EXPERT]),
    (infinite_norm, 7, [SHARD, "layers.1.input_layernorm"]),
    (unknown_architecture, 4, ["GalaxyBrainLM"]),
    (a_tensor_too_many, 3, ["layers.1.input_layernorm.weight"]),
    (more_layers_than_there_are, 3, ["layers.4"]),
    (a_count_that_is_a_string, 3, ["config.json", "hidden_size"]),
    (config_is_not_json, 3, ["config.json"]),
    (no_config, 3, ["config.json"]),
    (no_tokenizer, 4, ["tok"]),
    (broken_tokenizer, 3, ["tiktoken.model"]),
    (only_pickles, 4, ["safetensors"]),
]


@pytest.mark.parametrize(
    ("spoil", "code", "named"), CASES, ids=lambda v: getattr(v, "__name__", "")
)
def test_bad_input_is_one_message_and_no_file(convert, model, tmp_path, spoil, code, named):
    spoil(model)
    done = convert(model, tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    for part in named:
        assert part in done.stderr
    text_files = [p.name for p in tmp_path.glob("out/*.gguf") if not p.name.startswith("mmproj")]
    assert text_files == []


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("nope", "nope"),
        ("name: r\ndefault: Q8_0\ncolor: red", "unknown key color"),
        ("name: r\ndefault: Q9_9", "Q9_9"),
        ("name: r\ndefault: I32", "I32"),
    ],
)
def test_a_bad_recipe_is_wrong_use(convert, tmp_path, recipe, named):
    if "\n" in recipe:
        (tmp_path / "r.yaml").write_text(recipe)
        recipe = str(tmp_path / "r.yaml")
    done = convert(FIXTURE, tmp_path / "out", recipe)
    assert done.returncode == 2
    assert named in done.stderr
    assert not (tmp_path / "out").exists()


def test_code_in_the_repository_is_never_run(convert, model, tmp_path):
    canary = tmp_path / "canary"
    for name in ("tokenization_kimi.py", "configuration_kimi_k25.py", "modeling_kimi_k25.py"):
        (model / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    edit_json(
        model / "config.json",
        lambda data: data.update(auto_map={"AutoConfig": "configuration_kimi_k25.KimiConfig"}),
    )
    (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    done = convert(model, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not canary.exists()


def test_finished_files_of_another_recipe_are_not_replaced_silently(convert, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: X\ndefault: Q8_0")
    assert convert(FIXTURE, tmp_path / "out", str(recipe)).returncode == 0
    before = (tmp_path / "out" / "Tiny-Kimi-K2.5-X.gguf").read_bytes()
    recipe.write_text("name: X\ndefault: F16")
    done = convert(FIXTURE, tmp_path / "out", str(recipe))
    assert done.returncode == 5
    assert "--force" in done.stderr
    assert (tmp_path / "out" / "Tiny-Kimi-K2.5-X.gguf").read_bytes() == before
