"""Which shards make up a checkpoint, and what happens where index and headers disagree."""

# ruff: noqa: UP031  (JSON is full of braces)

from __future__ import annotations

import json

import pytest

from quantkit.errors import SourceError, UnsupportedError
from quantkit.source import index as index_module
from quantkit.source.checkpoint import open_checkpoint
from tests.builders.safetensors import f32, write_checkpoint, write_index, write_safetensors

A, B, C = f32([1.0]), f32([2.0]), f32([3.0])
ONE, TWO = "model-1-of-2.safetensors", "model-2-of-2.safetensors"


def two_shards(tmp_path, index=True):
    return write_checkpoint(tmp_path, {ONE: {"a": A}, TWO: {"b": B, "c": C}}, {}, index)


def names_of(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: ref.file for name, ref in checkpoint.tensors.items()}


def test_an_index_leads_to_all_shards(tmp_path):
    assert names_of(two_shards(tmp_path)) == {"a": ONE, "b": TWO, "c": TWO}


def test_shard_names_are_not_sorted(tmp_path):
    shards = {f"model-{k}-of-11.safetensors": {f"layers.{k}": A} for k in range(1, 12)}
    assert list(names_of(write_checkpoint(tmp_path, shards, {}))) == [
        f"layers.{k}" for k in range(1, 12)
    ]


def test_files_beside_the_index_are_ignored(tmp_path):
    folder = two_shards(tmp_path)
    (folder / "consolidated.safetensors").write_bytes(b"broken")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert set(names_of(folder)) == {"a", "b", "c"}


def test_without_an_index_every_shard_is_read(tmp_path):
    assert set(names_of(two_shards(tmp_path, index=False))) == {"a", "b", "c"}


def test_without_an_index_model_safetensors_is_the_checkpoint(tmp_path):
    folder = two_shards(tmp_path, index=False)
    write_safetensors(folder / "model.safetensors", {"alone": A})
    assert set(names_of(folder)) == {"alone"}


def test_numbering_may_begin_at_zero(tmp_path):
    shards = {f"model-0000{k}-of-00002.safetensors": {f"layers.{k}": A} for k in range(2)}
    folder = write_checkpoint(tmp_path, shards, {}, index=False)
    assert set(names_of(folder)) == {"layers.0", "layers.1"}


def missing_shard(folder):
    (folder / TWO).unlink()


def tensor_missing_in_its_shard(folder):
    write_safetensors(folder / TWO, {"b": B})


def tensor_that_the_index_does_not_know(folder):
    write_safetensors(folder / TWO, {"b": B, "c": C, "d": A})


def tensor_in_the_wrong_shard(folder):
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO})


def tensor_in_two_shards(folder):
    write_safetensors(folder / ONE, {"a": A, "b": B})


def tensor_in_two_shards_without_an_index(folder):
    (folder / index_module.INDEX_NAME).unlink()
    write_safetensors(folder / ONE, {"a": A, "b": B})


def shard_missing_without_an_index(folder):
    (folder / index_module.INDEX_NAME).unlink()
    (folder / ONE).unlink()


def empty_weight_map(folder):
    write_index(folder, {})


def weight_map_is_a_list(folder):
    (folder / index_module.INDEX_NAME).write_text('{"weight_map":["a"]}')


def no_weight_map(folder):
    (folder / index_module.INDEX_NAME).write_text('{"metadata":{}}')


def tensor_twice_in_the_index(folder):
    text = '{"weight_map":{"a":"%s","b":"%s","c":"%s","b":"%s"}}' % (ONE, TWO, TWO, ONE)
    (folder / index_module.INDEX_NAME).write_text(text)


def damaged_index(folder):
    path = folder / index_module.INDEX_NAME
    path.write_bytes(path.read_bytes()[:-3])


def damaged_header(folder):
    path = folder / TWO
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "named", "message"),
    [
        (missing_shard, TWO, "cannot be opened: No such file"),
        (tensor_missing_in_its_shard, f"{TWO}: c", "in the index but not in the shard"),
        (tensor_that_the_index_does_not_know, f"{TWO}: d", "the index does not place it"),
        (tensor_in_the_wrong_shard, f"{ONE}: b", "in the index but not in the shard"),
        (tensor_in_two_shards, f"{ONE}: b", "the index does not place it"),
        (tensor_in_two_shards_without_an_index, f"{TWO}: b", f"is also in {ONE}"),
        (shard_missing_without_an_index, "", "1 of the 2 shards 'model-*-of-*' are missing"),
        (empty_weight_map, index_module.INDEX_NAME, "holds no weight_map"),
        (weight_map_is_a_list, index_module.INDEX_NAME, "holds no weight_map"),
        (no_weight_map, index_module.INDEX_NAME, "holds no weight_map"),
        (tensor_twice_in_the_index, index_module.INDEX_NAME, "'b' occurs twice"),
        (damaged_index, index_module.INDEX_NAME, "not sound JSON"),
        (damaged_header, TWO, "tensors end at byte"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(spoil, named, message, tmp_path):
    folder = two_shards(tmp_path)
    spoil(folder)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    assert named in caught.value.where
    assert message in caught.value.message


def test_an_error_of_many_tensors_counts_them(tmp_path):
    folder = write_checkpoint(tmp_path, {ONE: {"a": A}}, {}, index=False)
    write_index(folder, dict.fromkeys("abcdefg", ONE))
    with pytest.raises(SourceError, match=r"not in the shard \(and 5 more\)"):
        open_checkpoint(folder)


def test_an_index_over_the_cap_is_refused(tmp_path, monkeypatch):
    folder = two_shards(tmp_path)
    assert index_module.MAX_INDEX_BYTES == 64 * 2**20
    monkeypatch.setattr(index_module, "MAX_INDEX_BYTES", 100)
    with pytest.raises(SourceError, match="larger than the 100 bytes"):
        open_checkpoint(folder)


def test_a_billion_promised_shards_cost_nothing(tmp_path):
    name = "model-1-of-999999999.safetensors"
    folder = write_checkpoint(tmp_path, {name: {"a": A}}, {}, index=False)
    with pytest.raises(SourceError, match="999999998 of the 999999999 shards"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(name, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, {}, {}, index=False)
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedError, match="convert the checkpoint to safetensors"):
        open_checkpoint(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"holds no \.safetensors file"):
        open_checkpoint(write_checkpoint(tmp_path, {}, {}, index=False))


def test_a_folder_without_config_is_refused(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": A})
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        open_checkpoint(tmp_path)


def test_a_missing_folder_and_a_file_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        open_checkpoint(tmp_path / "gone")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="name the checkpoint's folder"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_the_index_may_hold_other_things(tmp_path):
    folder = two_shards(tmp_path)
    path = folder / index_module.INDEX_NAME
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "metadata": {"total_size": -1}, "more": [1, 2]}))
    assert set(names_of(folder)) == {"a", "b", "c"}
