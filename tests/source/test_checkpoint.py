"""An open checkpoint: what it holds, reads that notice trouble, and its fingerprint."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from quantkit.errors import SourceError
from quantkit.source import files as files_module
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.files import ShardFiles
from quantkit.source.folder import Folder
from quantkit.types import WeightFormat
from tests.builders.safetensors import f32, write_checkpoint, write_safetensors

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
VALUES = np.arange(1000, dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    folder = write_checkpoint(
        tmp_path / "model", {"model.safetensors": {"w": f32(VALUES)}}, {"a": 1}
    )
    os.utime(folder / "model.safetensors", ns=(1, 1))  # so that a write shows within a clock tick
    return folder


def test_the_fixture_opens_with_every_tensor_and_weight():
    with open_checkpoint(FIXTURE) as checkpoint:
        assert checkpoint.root == FIXTURE
        assert checkpoint.config["model_type"] == "kimi_k25"
        # 3 MoE layers x 8 experts x 3 projections, each of them three tensors
        assert Counter(weight.format for weight in checkpoint.weights.values()) == {
            WeightFormat.INT4_G32: 72,
            WeightFormat.BF16: 89,
            WeightFormat.F32: 3,
        }
        assert len(checkpoint.tensors) == 164 + 2 * 72
        assert checkpoint.read_json("generation_config.json")["eos_token_id"] == 4034
        assert checkpoint.n_bytes == sum(f.stat().st_size for f in FIXTURE.glob("*.safetensors"))


def test_pread_gives_the_bytes_asked_for(folder):
    with open_checkpoint(folder) as checkpoint:
        ref = checkpoint.tensors["w"]
        data = checkpoint.pread(ref, 4 * 10, 4 * 5)
        assert data.dtype == np.uint8
        assert data.view(np.float32).tolist() == [10, 11, 12, 13, 14]
        assert checkpoint.pread(ref, ref.n_bytes, 0).size == 0


@pytest.mark.parametrize(("offset", "n_bytes"), [(-1, 4), (0, -1), (0, 4001), (4000, 1), (9999, 0)])
def test_pread_stays_inside_the_tensor(offset, n_bytes, folder):
    with open_checkpoint(folder) as checkpoint, pytest.raises(ValueError, match="of w, which has"):
        checkpoint.pread(checkpoint.tensors["w"], offset, n_bytes)


def test_short_reads_are_continued(folder, monkeypatch):
    really_preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: really_preadv(fd, [b[0][:7]], at))
    with open_checkpoint(folder) as checkpoint:
        data = checkpoint.pread(checkpoint.tensors["w"], 0, 4000)
    assert (data.view(np.float32) == VALUES).all()


def test_a_file_that_was_cut_is_noticed(folder):
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 2000)
        with pytest.raises(SourceError, match=r"model\.safetensors: ends at byte 2,000"):
            checkpoint.pread(checkpoint.tensors["w"], 0, 4000)


def test_a_file_that_was_written_to_is_noticed(folder):
    with open_checkpoint(folder) as checkpoint:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"evil")
        with pytest.raises(SourceError, match="has changed since"):
            checkpoint.pread(checkpoint.tensors["w"], 0, 4)


def test_a_file_that_was_replaced_is_noticed_when_it_is_opened_again(tmp_path):
    names = ["a.safetensors", "b.safetensors"]
    for name in names:
        write_safetensors(tmp_path / name, {"w": f32(VALUES)})
    files = ShardFiles(Folder(tmp_path), max_open=1)
    for name in names:
        files.read(name, 0, 8)
    write_safetensors(tmp_path / "new", {"w": f32(VALUES[:500])})
    (tmp_path / "new").rename(tmp_path / "a.safetensors")
    with pytest.raises(SourceError, match="has changed since"):
        files.read("a.safetensors", 0, 8)


class FailingReads:
    """os.preadv that fails `n_failures` times before it works."""

    def __init__(self, n_failures, code):
        self.n_calls, self.n_failures, self.code = 0, n_failures, code
        self.really = os.preadv

    def __call__(self, fd, buffers, offset):
        self.n_calls += 1
        if self.n_calls <= self.n_failures:
            raise OSError(self.code, os.strerror(self.code))
        return self.really(fd, buffers, offset)


@pytest.mark.parametrize(
    ("n_failures", "code", "n_calls", "works"),
    [
        (1, errno.EIO, 2, True),
        (3, errno.EIO, 4, True),
        (4, errno.EIO, 4, False),
        (1, errno.EACCES, 1, False),
    ],
)
def test_an_io_error_is_tried_again_three_times(
    n_failures, code, n_calls, works, folder, monkeypatch
):
    monkeypatch.setattr(files_module.time, "sleep", lambda seconds: None)
    with open_checkpoint(folder) as checkpoint:
        reads = FailingReads(n_failures, code)
        monkeypatch.setattr(os, "preadv", reads)
        if works:
            assert checkpoint.pread(checkpoint.tensors["w"], 4, 4).view(np.float32) == [1.0]
        else:
            with pytest.raises(SourceError, match="cannot be read at byte"):
                checkpoint.pread(checkpoint.tensors["w"], 4, 4)
    assert reads.n_calls == n_calls


def n_open_descriptors(folder):
    n_open = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed since it was listed
            n_open += os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder))
    return n_open


def test_descriptors_are_bounded_and_reads_from_many_threads_agree(tmp_path):
    shards = {f"s{k}.safetensors": {f"w{k}": f32(VALUES + k)} for k in range(20)}
    folder = write_checkpoint(tmp_path, shards, {})
    most, lock = 0, threading.Lock()
    files = ShardFiles(Folder(folder), max_open=5)

    def read(k):
        nonlocal most
        name = f"s{k % 20}.safetensors"
        n_header = int.from_bytes(files.read(name, 0, 8), "little")
        data = files.read(name, 8 + n_header, VALUES.nbytes)
        with lock:
            most = max(most, n_open_descriptors(folder))
        return (data.view(np.float32) == VALUES + k % 20).all()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))
    assert 5 <= most <= 5 + 4
    files.close()
    assert n_open_descriptors(folder) == 0


def test_a_checkpoint_opens_with_more_shards_than_descriptors_kept(tmp_path):
    shards = {f"s{k}.safetensors": {f"w{k}": f32([k])} for k in range(files_module.MAX_OPEN + 6)}
    folder = write_checkpoint(tmp_path, shards, {})
    with open_checkpoint(folder) as checkpoint:
        assert n_open_descriptors(folder) == files_module.MAX_OPEN
        for ref in checkpoint.tensors.values():
            value = checkpoint.pread(ref, 0, 4).view(np.float32)
            assert f"w{int(value[0])}" == ref.name


def test_the_descriptor_used_longest_ago_is_closed_first(tmp_path):
    for name in "abc":
        write_safetensors(tmp_path / f"{name}.safetensors", {"w": f32([0])})
    files = ShardFiles(Folder(tmp_path), max_open=2)
    for name in "abac":
        files.read(f"{name}.safetensors", 0, 8)
    fds = Path("/proc/self/fd")
    links = {fd.readlink().name for fd in fds.iterdir() if fd.is_symlink() and fd.exists()}
    assert links >= {"a.safetensors", "c.safetensors"}
    assert "b.safetensors" not in links
    files.close()


def test_closing_waits_for_readers_and_refuses_new_ones(folder):
    files = ShardFiles(Folder(folder))
    with files.use("model.safetensors") as fd:
        files.close()
        assert os.fstat(fd).st_size
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ValueError, match="closed"):
        files.read("model.safetensors", 0, 8)


def test_a_checkpoint_that_does_not_open_leaves_no_descriptor(folder):
    write_safetensors(folder / "model.safetensors", {"other": f32(VALUES)})
    with pytest.raises(SourceError):
        open_checkpoint(folder)
    assert n_open_descriptors(folder) == 0


@pytest.mark.parametrize("drops", [True, False])
def test_giving_pages_back_to_the_system_does_not_change_what_is_read(drops, folder, monkeypatch):
    calls = []
    n_pages = 1 if drops else 2**40
    monkeypatch.setattr(os, "sysconf", lambda key: n_pages if key == "SC_PHYS_PAGES" else 4096)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: calls.append(arguments))
    with open_checkpoint(folder) as checkpoint:
        ref = checkpoint.tensors["w"]
        data = checkpoint.pread(ref, 0, ref.n_bytes)
    assert (data.view(np.float32) == VALUES).all()
    assert bool(calls) is drops
    assert ((ref.begin, 4000, os.POSIX_FADV_DONTNEED) in [call[1:] for call in calls]) is drops


def test_side_files_are_read_within_their_caps(folder):
    (folder / "chat_template.jinja").write_bytes("{{ ü }}\r\n".encode())
    (folder / "latin.txt").write_bytes(b"\xfc")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.read_text("chat_template.jinja", 100) == "{{ ü }}\r\n"
        assert checkpoint.read_bytes("chat_template.jinja", 10) == "{{ ü }}\r\n".encode()
        assert checkpoint.read_bytes("absent", 10) is None
        assert checkpoint.read_text("absent", 10) is None
        assert checkpoint.read_json("absent") is None
        with pytest.raises(SourceError, match="larger than the 9 bytes"):
            checkpoint.read_bytes("chat_template.jinja", 9)
        with pytest.raises(SourceError, match="not UTF-8 at byte 0"):
            checkpoint.read_text("latin.txt", 10)


def fingerprint(folder):
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.fingerprint()


def config_changes(folder):
    (folder / "config.json").write_text('{"a":2}')


def time_changes(folder):
    os.utime(folder / "model.safetensors", ns=(0, 0))


def header_changes(folder):
    path = folder / "model.safetensors"
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"w"', b'"v"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def file_name_changes(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")


@pytest.mark.parametrize(
    "change", [config_changes, time_changes, header_changes, file_name_changes]
)
def test_the_fingerprint_changes_when(change, folder):
    (folder / "model.safetensors.index.json").unlink()
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    change(folder)
    assert fingerprint(folder) != before
    assert len(before) == 64


def test_the_fingerprint_does_not_depend_on_the_place_or_the_order_of_the_index(tmp_path):
    shards = {"b.safetensors": {"b": f32([1])}, "a.safetensors": {"a": f32([2])}}
    one = write_checkpoint(tmp_path / "one", shards, {})
    two = write_checkpoint(tmp_path / "two", dict(sorted(shards.items())), {})
    for folder in (one, two):
        for name in shards:
            os.utime(folder / name, ns=(5, 5))
    assert fingerprint(one) == fingerprint(two)
