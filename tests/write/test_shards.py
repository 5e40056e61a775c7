"""Partial files that anybody may write to, with a journal or without."""

from __future__ import annotations

import os
import threading

import pytest

from quantkit.errors import OutputError
from quantkit.run import fs
from quantkit.write.shards import PartialShards, tile_span
from tests.write.plans import HEADER, content, keys, small_plan

PLAN = small_plan()


@pytest.fixture
def folder(tmp_path):
    """Laid out, nothing written."""
    for shard in PLAN.shards:
        os.close(fs.open_sized(tmp_path / f"{shard.file}.partial", shard.n_bytes))
    return tmp_path


def test_tiles_written_from_many_threads_and_openings_come_together(folder):
    todo = keys(PLAN)
    with PartialShards(folder, PLAN) as ours, PartialShards(folder, PLAN) as theirs:
        ours.write_headers()

        def work(shards, number):
            for key in todo[number::4]:
                shards.write(*key, memoryview(content(PLAN, *key)))

        threads = [threading.Thread(target=work, args=((ours, theirs)[n % 2], n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, shard in enumerate(PLAN.shards):
        whole = HEADER + b"".join(
            content(PLAN, *key) for key in todo if PLAN.tensors[key[0]].shard == number
        )
        assert (folder / f"{shard.file}.partial").read_bytes() == whole


def test_tiles_are_behind_one_another_and_fill_their_tensor():
    for tensor in PLAN.tensors:
        at = tensor.begin
        for tile in range(tensor.n_tiles):
            begin, n_bytes = tile_span(tensor, tile)
            assert begin == at
            at += n_bytes
        assert at == tensor.begin + tensor.n_bytes


@pytest.mark.parametrize("change", ["gone", "cut", "longer"])
def test_a_file_that_is_not_as_it_was_laid_out_is_named(folder, change):
    path = folder / f"{PLAN.shards[1].file}.partial"
    if change == "gone":
        path.unlink()
    else:
        os.truncate(path, PLAN.shards[1].n_bytes + (1 if change == "longer" else -1))
    n_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OutputError, match="the same command") as caught:
        PartialShards(folder, PLAN)
    assert PLAN.shards[1].file in caught.value.where
    assert len(os.listdir("/proc/self/fd")) == n_open


@pytest.mark.parametrize("more", [-4, 4])
def test_a_tile_of_another_length_is_refused_and_nothing_of_it_written(folder, more):
    n_bytes = tile_span(PLAN.tensors[0], 0)[1] + more
    with PartialShards(folder, PLAN) as shards, pytest.raises(ValueError, match="tile of"):
        shards.write(0, 0, memoryview(b"\xa5" * n_bytes))
    assert b"\xa5" not in (folder / f"{PLAN.shards[0].file}.partial").read_bytes()


def test_only_the_shards_that_are_asked_for_are_flushed(folder, monkeypatch):
    flushed, real = [], os.fsync

    def note(fd):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    with PartialShards(folder, PLAN) as shards:
        shards.flush([1])
        assert flushed == ["m-1.gguf.partial"]
        shards.flush()
    assert flushed[1:] == ["m-0.gguf.partial", "m-1.gguf.partial"]
