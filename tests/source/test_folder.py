"""A checkpoint's folder is a stranger's: which names and which files are opened."""

from __future__ import annotations

import os

import pytest

from quantkit.errors import SourceError
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.folder import MAX_JSON_DEPTH, Folder, check_name
from tests.builders.safetensors import f32, write_checkpoint, write_index, write_safetensors

TENSORS = {"norm.weight": f32([1.0, 2.0])}

OUTSIDE = {
    "parent": "../x.safetensors",
    "parent in the middle": "a/../../x.safetensors",
    "absolute": "/etc/x.safetensors",
    "subfolder": "sub/x.safetensors",
    "backslash": "..\\x.safetensors",
    "drive": "C:x.safetensors",
    "drive and path": "C:\\x.safetensors",
    "UNC": "\\\\host\\share\\x.safetensors",
    "URL": "file:///x.safetensors",
    "stream": "x.safetensors:y.safetensors",
    "NUL": "x\0.safetensors",
    "newline": "x\n.safetensors",
    "escape sequence": "\x1b[2Jx.safetensors",
    "bidi mark": "x\u202e.safetensors",
    "half a surrogate": "x\ud800.safetensors",
    "dot": ".",
    "two dots": "..",
    "empty": "",
    "suffix alone": ".safetensors",
    "pickle": "pytorch_model.bin",
    "suffix and more": "x.safetensors.bin",
    "suffix in upper case": "x.SAFETENSORS",
    "300 characters": "x" * 300 + ".safetensors",
    "256 bytes in 90 characters": "重" * 82 + ".safetensors",
    "a number": 7,
    "a list": ["x.safetensors"],
    "null": None,
}


def record_opened(monkeypatch):
    opened = []
    really_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *a: opened.append(path) or really_open(path, *a))
    return opened


@pytest.mark.parametrize("case", OUTSIDE)
def test_an_index_cannot_name_a_file(case, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", {}, {}, index=False)
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    write_index(folder, {"norm.weight": OUTSIDE[case]})
    opened = record_opened(monkeypatch)
    with pytest.raises(SourceError, match=r"norm\.weight"):
        open_checkpoint(folder)
    assert {os.path.dirname(path) for path in opened} == {str(folder)}


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-1-of-61.safetensors", "..a.safetensors", "ü 重.safetensors"],
)
def test_a_plain_name_is_taken(name):
    assert check_name(name, where="", suffix=".safetensors") == name


def test_names_that_differ_only_in_case_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, {}, {}, index=False)
    write_index(folder, {"a": "x.safetensors", "b": "X.safetensors"})
    with pytest.raises(SourceError, match="differ only in case"):
        open_checkpoint(folder)


def replaced_by_fifo(path):
    os.mkfifo(path)


def replaced_by_folder(path):
    path.mkdir()


def replaced_by_device_link(path):
    path.symlink_to("/dev/zero")


def replaced_by_dangling_link(path):
    path.symlink_to("gone")


def replaced_by_link_to_itself(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    "replace",
    [
        replaced_by_fifo,
        replaced_by_folder,
        replaced_by_device_link,
        replaced_by_dangling_link,
        replaced_by_link_to_itself,
    ],
)
def test_only_regular_files_are_opened(name, replace, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, {"model.safetensors": TENSORS}, {})
    (folder / "chat_template.jinja").touch()
    (folder / name).unlink()
    replace(folder / name)
    opened = record_opened(monkeypatch)
    with pytest.raises(SourceError, match=name), open_checkpoint(folder) as checkpoint:
        checkpoint.read_text(name, 100)
    assert folder / name not in opened


def hub_cache(tmp_path, kind="snapshots"):
    """The layout of the Hub's cache: every file of the snapshot is a link to a blob."""
    snapshot = tmp_path / "models--a--b" / kind / "0123abc"
    write_checkpoint(snapshot, {"model.safetensors": TENSORS}, {"model_type": "x"})
    (snapshot / "chat_template.jinja").write_text("{{ text }}")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_hub_cache_opens_through_its_links(tmp_path):
    with open_checkpoint(hub_cache(tmp_path)) as checkpoint:
        assert checkpoint.config == {"model_type": "x"}
        assert checkpoint.read_text("chat_template.jinja", 100) == "{{ text }}"
        assert list(checkpoint.weights) == ["norm.weight"]


def test_a_link_to_the_folder_itself_is_no_matter(tmp_path):
    snapshot = hub_cache(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    with open_checkpoint(link) as checkpoint:
        assert checkpoint.root == snapshot
        assert checkpoint.read_text("chat_template.jinja", 100) == "{{ text }}"


def test_a_side_file_cannot_be_a_link_to_a_file_of_the_user(tmp_path):
    secret = tmp_path / "id_ed25519"
    secret.write_text("private")
    folder = write_checkpoint(tmp_path / "model", {"model.safetensors": TENSORS}, {})
    (folder / "chat_template.jinja").symlink_to(secret)
    with open_checkpoint(folder) as checkpoint, pytest.raises(SourceError, match="leads out"):
        checkpoint.read_text("chat_template.jinja", 100)


def test_a_folder_named_blobs_is_nothing_special_outside_the_hub_cache(tmp_path):
    with pytest.raises(SourceError, match="leads out of the checkpoint"):
        open_checkpoint(hub_cache(tmp_path, "checkpoints"))


def test_a_blob_of_another_model_is_outside_the_cache_entry(tmp_path):
    snapshot = hub_cache(tmp_path)
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("private")
    (snapshot / "extra.json").symlink_to(other / "0")
    with open_checkpoint(snapshot) as checkpoint, pytest.raises(SourceError, match="leads out"):
        checkpoint.read_json("extra.json")


def test_a_link_to_a_file_that_is_no_safetensors_does_not_show_its_content(tmp_path):
    secret = tmp_path / "id_ed25519"
    secret.write_text("-----BEGIN PRIVATE KEY-----")
    folder = write_checkpoint(tmp_path / "model", {}, {}, index=False)
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    assert "BEGIN" not in str(caught.value)


def test_shards_may_be_links_to_another_disk_and_hard_links(tmp_path):
    folder = write_checkpoint(
        tmp_path / "model", {"a.safetensors": TENSORS, "b.safetensors": {"b": f32([0])}}, {}
    )
    (tmp_path / "disk").mkdir()
    (folder / "a.safetensors").rename(tmp_path / "disk" / "stored")
    (folder / "a.safetensors").symlink_to(tmp_path / "disk" / "stored")
    os.link(folder / "b.safetensors", tmp_path / "disk" / "b")
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.weights) == {"norm.weight", "b"}


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "sub/x.json", "", ".."])
def test_side_files_have_plain_names_too(name, tmp_path):
    with pytest.raises(SourceError, match="not a plain file name"):
        Folder(tmp_path).read_bytes(name, 100)


NESTED = '{"a":' * MAX_JSON_DEPTH + "%s" + "}" * MAX_JSON_DEPTH

BAD_JSON = {
    "too large": (b'{"a":"' + b"x" * 2**22 + b'"}', "larger than the 4,194,304 bytes"),
    "cut short": (b'{"a":', "not sound JSON"),
    "a list": (b"[]", "JSON object is expected, got list"),
    "not UTF-8": (b'{"a":"\xff"}', "not UTF-8 at byte 6"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
    "65 levels": ((NESTED % "{}").encode(), "deeper than 64 levels"),
    "100,000 levels": (b"[" * 100_000, "nested too deeply"),
    "a number of 5,000 digits": (b'{"a":' + b"9" * 5000 + b"}", "not sound JSON"),
    "empty": (b"", "not sound JSON"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_config_is_refused(case, tmp_path):
    content, message = BAD_JSON[case]
    folder = write_checkpoint(tmp_path, {"model.safetensors": TENSORS}, {})
    (folder / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"config\.json") as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)


def test_64_levels_of_json_are_read(tmp_path):
    folder = write_checkpoint(tmp_path, {"model.safetensors": TENSORS}, {})
    (folder / "config.json").write_text(NESTED % 1)
    open_checkpoint(folder).close()
