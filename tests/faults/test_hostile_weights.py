"""Hostile safetensors, GGUF and imatrix files, and hostile names, through the command line."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from quantkit.container.reader import MAX_STRINGS
from tests.builders.gguf import ARRAY, STRING, U8, array, gguf_bytes, kv, text
from tests.builders.safetensors import file_bytes
from tests.calibrate.test_imatrix import DAT_LIES, GGUF_LIES, NON_FINITE
from tests.container.hostile import HOSTILE as HOSTILE_GGUF
from tests.faults.guarded import assert_inside, assert_refused, command, snapshot
from tests.faults.jobs import write_model
from tests.source.hostile import HOSTILE as HOSTILE_SAFETENSORS
from tests.source.test_folder import OUTSIDE

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model; beside it lies what no file of the model may lead to."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "canary.safetensors").write_bytes(file_bytes("{}"))
    (outside / "canary.txt").write_text("private")
    write_model(outside / "home" / "model")
    return outside / "home"


@pytest.fixture
def model(home, tmp_path_factory) -> Path:
    """The model, whose files may be spoiled; all is as before afterwards."""
    folder = home / "model"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in before.items():
        (folder / name).write_bytes(content)


def convert(model: Path, *more: object):
    return command("convert", model, "-r", "q4_0", "-o", model.parent / "out", "-t", 1, *more)


def assert_nothing_made(model: Path) -> None:
    assert not (model.parent / "out").exists()


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_a_hostile_shard_is_refused(model, home, case):
    (model / INDEX).unlink()
    (model / "model.safetensors").write_bytes(HOSTILE_SAFETENSORS[case][0])
    assert_refused(convert(model), [3], home)
    assert_nothing_made(model)


def _million_names() -> bytes:
    one = '"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return file_bytes("{" + ",".join(one % n for n in range(400_000)) + "}")


# As large as files of this kind may be, of whatever makes most of its bytes in memory.
BOMBS = {
    "empty lists": lambda: file_bytes('{"a":[' + ",".join(["[]"] * 8_000_000) + "]}"),
    "nothing but keys": lambda: file_bytes(
        "{" + ",".join(f'"{n:x}":0' for n in range(2_500_000)) + "}"
    ),
    "400,000 tensors": _million_names,
    "a long string": lambda: file_bytes('{"__metadata__":{"a":"' + "é" * 10_000_000 + '"}}'),
    "a long name": lambda: file_bytes('{"' + "n" * 20_000_000 + '":{}}'),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_header_that_swells_in_memory_is_refused_before_it_does(model, home, case):
    (model / INDEX).unlink()
    (model / "model.safetensors").write_bytes(BOMBS[case]())
    assert_refused(convert(model), [3], home)


INDEX_BOMBS = {
    "empty lists": lambda: '{"weight_map":[' + ",".join(["[]"] * 10_000_000) + "]}",
    "nothing but keys": lambda: (
        '{"weight_map":{' + ",".join(f'"{n:x}":0' for n in range(3_000_000)) + "}}"
    ),
    "a shard per tensor": lambda: json.dumps(
        {"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(300_000)}}
    ),
}


@pytest.mark.parametrize("case", INDEX_BOMBS)
def test_an_index_that_swells_in_memory_is_refused_before_it_does(model, home, case):
    (model / INDEX).write_text(INDEX_BOMBS[case]())
    assert_refused(convert(model), [3], home)


@pytest.mark.parametrize("case", HOSTILE_GGUF)
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_hostile_gguf_file_is_refused(home, verb, case):
    path = home / "file.gguf"
    path.write_bytes(HOSTILE_GGUF[case][0])
    ended = command(verb, path)
    if verb == "verify":  # which lists problems, and is no error itself
        assert ended.code == 6
        assert "Traceback" not in ended.err
        assert ended.seconds < 5
        assert_inside(ended, home)
    else:
        assert_refused(ended, [6], home)


GGUF_BOMBS = {
    "four million short strings": lambda: gguf_bytes(
        [kv("a", ARRAY, array(STRING, 1 << 22, (struct.pack("<Q", 2) + b"ab") * (1 << 22)))]
    ),
    "as many short strings as are read": lambda: gguf_bytes(
        [kv("a", ARRAY, array(STRING, MAX_STRINGS, text("ab") * MAX_STRINGS))]
    ),
    "a string of 250 MB": lambda: gguf_bytes([kv("a", STRING, text(b"e" * 250_000_000))]),
    "a string of 20 MB with one wide letter": lambda: gguf_bytes(
        [kv("a", STRING, text(b"e" * 20_900_000 + "\U0001f600".encode()))]
    ),
    "sixty thousand long keys": lambda: gguf_bytes(
        [kv(f"{n:05d}" + "k" * 500, U8, b"\0") for n in range(60_000)]
    ),
}


@pytest.mark.parametrize("case", GGUF_BOMBS)
def test_a_gguf_header_that_swells_in_memory_is_refused_or_read_within_bounds(home, case):
    path = home / "file.gguf"
    path.write_bytes(GGUF_BOMBS[case]())
    ended = command("verify", path)
    assert ended.code in (0, 6)
    assert "Traceback" not in ended.err
    assert ended.seconds < 5
    assert ended.growth < 256 << 20, ended.growth


@pytest.mark.parametrize("case", [*GGUF_LIES, *DAT_LIES, *NON_FINITE])
def test_a_hostile_imatrix_is_refused(model, home, case):
    lies = {**GGUF_LIES, **DAT_LIES, **{name: (data, "") for name, data in NON_FINITE.items()}}
    path = home / "lies.gguf"
    path.write_bytes(lies[case][0])
    codes = [7] if case in NON_FINITE else [6]
    assert_refused(convert(model, "--imatrix", path), codes, home)
    assert_nothing_made(model)


@pytest.mark.parametrize("case", OUTSIDE)
def test_no_name_in_an_index_leads_out_of_the_folder(model, home, case):
    before = snapshot(home.parent)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = OUTSIDE[case]
    (model / INDEX).write_text(json.dumps(index))
    ended = convert(model)
    assert_refused(ended, [3], home)
    assert not any("canary" in path for path in ended.read | ended.written)
    after = snapshot(home.parent)
    assert after.keys() == before.keys()


def _link(target: str):
    return lambda path: path.symlink_to(target)


PLACES = {
    "link to a private file": _link("../../canary.txt"),
    "absolute link": _link("/etc/passwd"),
    "link to a device": _link("/dev/zero"),
    "link to the terminal": _link("/dev/tty"),
    "link to memory": _link("/proc/self/mem"),
    "link to a process' environment": _link("/proc/self/environ"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to the folder": _link("."),
    "dangling link": _link("gone"),
    "named pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
}
FILES = ["model.safetensors", "config.json", INDEX, "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_model_is_a_way_out_or_a_trap(model, home, name, case):
    (model / name).unlink()
    PLACES[case](model / name)
    ended = convert(model)
    # Shards may lie on another disk; what is not sound safetensors is not shown.
    assert_refused(ended, [3, 4], home, links=name == "model.safetensors")
    assert not any("canary" in path or path.startswith("/dev") for path in ended.read)
    for secret in ("private", "root:", "PATH="):
        assert secret not in ended.err + ended.out
    assert_nothing_made(model)


HOSTILE_NAMES = ["../../canary", "/canary", "..", "a/b", "a\\b", "C:x", "\x1b[2Jx", "重" * 200]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_name_that_a_model_gives_itself_leads_out_of_the_output_folder(model, home, name):
    (model / "README.md").write_text(f"---\nmodel_name: {json.dumps(name)}\n---\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": name, "name": name}))
    ended = convert(model)
    out = home / "out"
    try:
        assert ended.code == 0, ended.err
        assert_inside(ended, home)
        made = sorted(path.name for path in out.iterdir())
        assert len(made) == 2, made
        assert all(each.isprintable() and not each.startswith(".") for each in made)
    finally:
        for path in out.glob("*"):
            path.unlink()
        if out.exists():
            out.rmdir()


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a/b", "a\0b", "", "x" * 300, "a\nb"])
def test_no_name_that_is_asked_for_leads_out_of_the_output_folder(model, home, name):
    assert_refused(convert(model, "--name", name), [2], home)
    assert_nothing_made(model)


@pytest.mark.parametrize("name", ["../x.gguf", "/x.gguf", "a/b.gguf", ".x.gguf", "x\0.gguf"])
def test_no_name_in_a_manifest_leads_out_of_its_folder(home, name):
    (home / "canary.gguf").write_bytes(gguf_bytes())
    shard = {"file": name, "n_bytes": 24, "header_sha256": "0" * 64, "tensors": []}
    record = {
        "format_version": 1,
        "quantkit_version": "0",
        "created": "2026-01-01T00:00:00Z",
        "plan": "0" * 64,
        "source": {"name": "", "fingerprint": ""},
        "recipe": {"name": "", "digest": "", "text": ""},
        "shards": [shard],
    }
    (home / "canary.manifest.json").write_text(json.dumps(record))
    try:
        ended = command("verify", home / "canary.gguf")
        assert ended.code == 6
        assert "Traceback" not in ended.err
        assert_inside(ended, home)
    finally:
        (home / "canary.manifest.json").unlink()
        (home / "canary.gguf").unlink()
