"""A shard set is found from any of its files, and everything wrong with it is told."""

from __future__ import annotations

import pytest

from quantkit.container.kv import i32, string, u16, u32
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.container.shardset import open_shards, survey
from quantkit.errors import GgufError
from quantkit.types import GgmlType
from tests.builders.gguf import I32, U16, U32, gguf_bytes, info, kv, write_shards

KVS = {"general.architecture": string("deepseek2"), "deepseek2.block_count": u32(1)}
TENSORS = [TensorEntry(f"t{i}", (2, 32), GgmlType.Q8_0) for i in range(6)]


@pytest.fixture
def folder(tmp_path):
    """Three shards of two tensors each, called m."""
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=None, max_shard_tensors=2)
    write_shards(tmp_path, layouts)
    return tmp_path


def shard(folder, no: int, count: int = 3):
    return folder / f"m-{no:05d}-of-{count:05d}.gguf"


def messages(path) -> str:
    return "\n".join(str(problem) for problem in survey(path)[1])


@pytest.mark.parametrize("no", [1, 2, 3])
def test_the_set_is_found_from_any_shard(folder, no):
    shards = open_shards(shard(folder, no))
    assert shards.stem == "m"
    assert shards.kvs == KVS
    assert [file.path for file in shards.files] == [shard(folder, n) for n in (1, 2, 3)]
    assert [(file.path, t.name) for file, t in shards.tensors()] == [
        (shard(folder, 1 + i // 2), f"t{i}") for i in range(6)
    ]
    assert shards.n_tensors == 6
    assert shards.n_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_a_file_that_is_no_shard_is_a_set_of_one(tmp_path):
    write_shards(tmp_path, lay_out("whole", KVS, TENSORS, max_shard_bytes=None))
    shards = open_shards(tmp_path / "whole.gguf")
    assert (shards.stem, len(shards.files), shards.kvs) == ("whole", 1, KVS)


@pytest.mark.parametrize("name", ["m-00001-of-00001.gguf", "m.gguf"])
def test_a_set_of_one_may_say_so(tmp_path, name):
    split = {"split.no": (U16, b"\0\0"), "split.count": (U16, b"\1\0")}
    entries = [kv(key, *value) for key, value in split.items()]
    (tmp_path / name).write_bytes(gguf_bytes(entries, [info("a")], b"\0" * 128))
    assert open_shards(tmp_path / name).n_tensors == 1


def test_symbolic_links_are_followed(folder, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for no in (1, 2, 3):
        shard(links, no).symlink_to(shard(folder, no))
    assert open_shards(shard(links, 2)).n_tensors == 6


@pytest.mark.parametrize("no", [1, 2, 3])
def test_a_missing_shard_is_told(folder, no):
    shard(folder, no).unlink()
    other = shard(folder, 3 if no == 1 else 1)
    with pytest.raises(GgufError, match=f"1 of 3 shards are missing: m-0000{no}"):
        open_shards(other)


def test_of_many_missing_shards_a_few_are_named(folder):
    shard(folder, 1).rename(shard(folder, 1, 65535))
    assert "65534 of 65535 shards are missing: m-00002-of-65535.gguf, " in messages(
        shard(folder, 1, 65535)
    )


def test_two_shards_in_each_others_place_are_told(folder):
    shard(folder, 2).rename(folder / "x")
    shard(folder, 3).rename(shard(folder, 2))
    (folder / "x").rename(shard(folder, 3))
    text = messages(shard(folder, 1))
    assert "split.no is U16 2, expected U16 1" in text
    assert "split.no is U16 1, expected U16 2" in text


def test_a_shard_that_lost_its_number_is_told(folder):
    shard(folder, 2).rename(folder / "alone.gguf")
    assert "split.count is U16 3, expected U16 1" in messages(folder / "alone.gguf")


def test_a_shard_of_a_set_of_another_size_is_told(folder):
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=None, max_shard_tensors=3)
    write_shards(folder, layouts)
    shard(folder, 2, 2).replace(shard(folder, 2))
    text = messages(shard(folder, 1))
    assert "split.count is U16 2, expected U16 3" in text
    assert "also in m-00002-of-00003.gguf" in text


def test_every_damaged_shard_is_told(folder):
    shard(folder, 1).write_bytes(b"GGUF")
    shard(folder, 3).write_bytes(b"")
    shards, problems = survey(shard(folder, 2))
    assert [file.path for file in shards.files] == [shard(folder, 2)]
    assert [problem.where for problem in problems] == [str(shard(folder, n)) for n in (1, 3)]


SPLIT = {"split.no": (U16, b"\1\0"), "split.count": (U16, b"\3\0")}
TOTAL = {"split.tensors.count": (I32, b"\6\0\0\0")}


@pytest.mark.parametrize(
    ("kvs", "message"),
    [
        ({}, "split.no is missing"),
        ({"split.no": (U16, b"\1\0")} | TOTAL, "split.count is missing"),
        (SPLIT, "split.tensors.count is missing"),
        (SPLIT | {"split.tensors.count": (I32, b"\7\0\0\0")}, "count is I32 7, expected I32 6"),
        (SPLIT | {"split.tensors.count": (U32, b"\6\0\0\0")}, "count is U32 6, expected I32 6"),
        (SPLIT | TOTAL | {"split.no": (U32, b"\1\0\0\0")}, "split.no is U32 1, expected U16 1"),
        (SPLIT | TOTAL | {"general.name": (U32, b"\0" * 4)}, "belong into the first shard, such"),
    ],
)
def test_a_second_shard_with_wrong_keys_is_told(folder, kvs, message):
    entries = [kv(key, *value) for key, value in kvs.items()]
    infos = [info("t2"), info("t3", offset=128)]
    shard(folder, 2).write_bytes(gguf_bytes(entries, infos, b"\0" * 256))
    assert message in messages(shard(folder, 1))


def test_a_correct_second_shard_of_another_maker_is_accepted(folder):
    entries = [kv(key, *value) for key, value in (SPLIT | TOTAL).items()]
    infos = [info("t2"), info("t3", offset=128)]
    shard(folder, 2).write_bytes(gguf_bytes(entries, infos, b"\0" * 256))
    assert open_shards(shard(folder, 1)).n_tensors == 6


def test_a_tensor_in_two_shards_is_told(folder):
    entries = [kv(key, *value) for key, value in (SPLIT | TOTAL).items()]
    infos = [info("t0"), info("t3", offset=128)]
    shard(folder, 2).write_bytes(gguf_bytes(entries, infos, b"\0" * 256))
    text = messages(shard(folder, 1))
    assert "m-00002-of-00003.gguf, tensor t0: also in m-00001-of-00003.gguf" in text


def test_bookkeeping_is_no_metadata_of_the_model(folder):
    assert open_shards(shard(folder, 1)).files[0].kvs == KVS | {
        "split.no": u16(0),
        "split.count": u16(3),
        "split.tensors.count": i32(6),
    }
