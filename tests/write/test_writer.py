"""Tiles are written from many threads while others are flushed; what counts is what is durable."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.recipe import load_recipe
from quantkit.run import journal as journal_module
from quantkit.run.journal import Journal
from quantkit.write import writer as writer_module
from quantkit.write.record import Provenance
from quantkit.write.shards import PartialShards, tile_span
from quantkit.write.writer import ShardWriter
from tests.write.plans import content, digest_of, keys, small_plan

PLAN = small_plan()
TILE = tile_span(PLAN.tensors[0], 0)[1]
PATIENCE = 60


@pytest.fixture
def flush_every(monkeypatch):
    """flush_every(n): a flush begins when n tiles wait for one."""
    return lambda n: monkeypatch.setattr(writer_module, "_SYNC_BYTES", int(n * TILE))


@pytest.fixture
def on_fsync(monkeypatch):
    """on_fsync(act): act(path) comes ahead of every fsync of a partial file."""
    real = os.fsync

    def arrange(act: Callable[[str], None]) -> None:
        def fsync(fd: int) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.endswith(".gguf.partial"):
                act(path)
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)

    return arrange


def write(writer: ShardWriter, *key: int) -> None:
    data = content(writer.plan, *key)
    writer.write(*key, memoryview(data), digest_of(data))


def provenance() -> Provenance:
    return Provenance("model", "fingerprint", load_recipe("q4_0"))


def journal_lines(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / ".m.journal").read_text().splitlines()[1:]]


def believed(path: Path, *, after_reboot: bool) -> set[tuple[int, int]]:
    """Tiles that a run would take as done which found this journal."""
    with pytest.MonkeyPatch.context() as patched:
        if after_reboot:
            patched.setattr(journal_module, "_boot_id", lambda: "another")
        journal = Journal(path, PLAN.digest, [t.n_tiles for t in PLAN.tensors])
        journal.close()
    return set(journal.done)


class Gate:
    """Holds those who pass until it is opened, and says that somebody is there."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, path: str) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE)


def test_tiles_go_on_while_others_are_flushed_and_wait_for_the_next(
    tmp_path, flush_every, on_fsync
):
    flush_every(2)
    gate = Gate()
    on_fsync(gate)
    with ShardWriter(tmp_path, PLAN) as writer:
        write(writer, 0, 0)
        write(writer, 0, 1)
        assert gate.reached.wait(PATIENCE)
        write(writer, 0, 2)  # not held
        gate.opened.set()
    assert journal_lines(tmp_path) == ["boot", "tile", "tile", "flush", "tile", "sync"]
    assert believed(tmp_path / ".m.journal", after_reboot=True) == {(0, 0), (0, 1)}


def test_writers_wait_when_too_much_is_not_durable(tmp_path, flush_every, on_fsync):
    flush_every(1)
    gate = Gate()
    on_fsync(gate)
    most = writer_module._MOST_SYNCS
    with ShardWriter(tmp_path, PLAN) as writer, ThreadPoolExecutor(1) as pool:
        todo = keys(PLAN)
        for key in todo[:most]:
            write(writer, *key)
        late = pool.submit(write, writer, *todo[most])
        with pytest.raises(TimeoutError):
            late.result(timeout=0.3)
        assert next(writer.missing()) == todo[most]
        gate.opened.set()
        late.result(timeout=PATIENCE)


def fail_once(gate: Gate) -> Callable[[str], None]:
    """The first flush fails once the gate is open."""
    left = [1]

    def act(path: str) -> None:
        if left[0]:
            gate(path)
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")

    return act


@pytest.mark.parametrize("then", ["write", "record", "sync", "commit"])
def test_a_flush_that_failed_is_told_whatever_comes_next(tmp_path, flush_every, on_fsync, then):
    """The next flush would seem to be well, though pages may be gone."""
    flush_every(sum(tensor.n_bytes for tensor in PLAN.tensors) / TILE)
    gate = Gate()
    on_fsync(fail_once(gate))
    with ShardWriter(tmp_path, PLAN) as writer:
        todo = keys(PLAN)
        for key in todo:
            write(writer, *key)
        gate.opened.set()
        _await(lambda: "doubt" in journal_lines(tmp_path))
        act = {
            "write": lambda: write(writer, *todo[0]),
            "record": lambda: writer.record(*todo[0], bytes(32)),
            "sync": writer.sync,
            "commit": lambda: writer.commit(provenance()),
        }[then]
        for _ in range(2):
            with pytest.raises(OutputError, match="Input/output error"):
                act()
    assert journal_lines(tmp_path)[-1] == "doubt"
    assert believed(tmp_path / ".m.journal", after_reboot=False) == set()
    assert not list(tmp_path.glob("*.gguf"))


def test_a_tile_that_was_written_before_a_flush_failed_is_not_recorded_after(
    tmp_path, flush_every, on_fsync, monkeypatch
):
    """Its line would stand behind the doubt, and its pages may be among those that were dropped."""
    flush_every(1)
    gate, written, real = Gate(), threading.Event(), PartialShards.write
    on_fsync(fail_once(gate))

    def slow(shards: PartialShards, tensor: int, tile: int, data: memoryview) -> None:
        real(shards, tensor, tile, data)
        if tile == 1:
            written.set()
            _await(lambda: "doubt" in journal_lines(tmp_path))

    monkeypatch.setattr(PartialShards, "write", slow)
    with ShardWriter(tmp_path, PLAN) as writer, ThreadPoolExecutor(1) as pool:
        write(writer, 0, 0)
        assert gate.reached.wait(PATIENCE)
        late = pool.submit(write, writer, 0, 1)
        assert written.wait(PATIENCE)
        gate.opened.set()
        with pytest.raises(OutputError, match="Input/output error"):
            late.result(PATIENCE)
    assert journal_lines(tmp_path) == ["boot", "tile", "flush", "doubt"]


def test_those_who_wait_for_room_hear_of_a_failure(tmp_path, flush_every, on_fsync):
    flush_every(1)
    gate = Gate()
    on_fsync(fail_once(gate))
    with ShardWriter(tmp_path, PLAN) as writer, ThreadPoolExecutor(2) as pool:
        todo = keys(PLAN)
        for key in todo[: writer_module._MOST_SYNCS]:
            write(writer, *key)
        waiting = [pool.submit(write, writer, *key) for key in todo[-2:]]
        gate.opened.set()
        for future in waiting:
            with pytest.raises(OutputError, match="Input/output error"):
                future.result(PATIENCE)


def test_after_a_failed_flush_everything_is_made_again(tmp_path, flush_every, on_fsync):
    flush_every(len(keys(PLAN)) + 1)
    gate = Gate()
    gate.opened.set()
    on_fsync(fail_once(gate))
    with ShardWriter(tmp_path, PLAN) as writer:
        for key in keys(PLAN):
            write(writer, *key)
        with pytest.raises(OutputError):
            writer.commit(provenance())
    with ShardWriter(tmp_path, PLAN) as writer:
        assert list(writer.missing()) == keys(PLAN)
        for key in keys(PLAN):
            write(writer, *key)
        writer.commit(provenance())
    assert_finished(tmp_path)


def test_closing_waits_for_the_flush_that_is_under_way(tmp_path, flush_every, on_fsync):
    flush_every(1)
    gate = Gate()
    on_fsync(gate)
    writer = ShardWriter(tmp_path, PLAN)
    write(writer, 0, 0)
    assert gate.reached.wait(PATIENCE)
    threading.Timer(0.1, gate.opened.set).start()
    writer.close()
    assert journal_lines(tmp_path)[-1] == "sync"
    assert not [t for t in threading.enumerate() if t.name.startswith("quantkit")]


def test_what_another_process_wrote_is_only_recorded(tmp_path, flush_every):
    flush_every(3)
    with ShardWriter(tmp_path, PLAN) as writer:
        with PartialShards(tmp_path, PLAN) as worker:
            for key in keys(PLAN):
                worker.write(*key, memoryview(content(PLAN, *key)))
            worker.flush()
        for key in keys(PLAN):
            writer.record(*key, digest_of(content(PLAN, *key)))
        assert not list(writer.missing())
        _await(lambda: "sync" in journal_lines(tmp_path))  # they count towards the next flush
        writer.commit(provenance())
    assert_finished(tmp_path)


@pytest.mark.parametrize("seed", range(10))
def test_at_no_moment_does_the_journal_vouch_for_what_a_power_cut_could_take(
    tmp_path, flush_every, monkeypatch, seed
):
    """Of a disk that keeps of a file exactly what was written before its last flush began."""
    flush_every(3)
    disk = Disk(random.Random(seed))
    disk.watch(monkeypatch, tmp_path)
    with ShardWriter(tmp_path, PLAN) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: write(writer, *key), keys(PLAN)))
        writer.commit(provenance())
    monkeypatch.undo()
    assert_finished(tmp_path)
    assert len(disk.journals) > len(keys(PLAN))
    n_kept = []
    for n, (text, durable) in enumerate(disk.journals):
        path = tmp_path / f"journal-{n}"
        path.write_bytes(text)
        kept = believed(path, after_reboot=True)
        assert kept <= durable, n
        n_kept.append(len(kept))
    assert n_kept[-1] == len(keys(PLAN))
    assert len(set(n_kept)) > 3  # flushed now and then, not only at the end


class Disk:
    """Remembers which tiles were written before the last flush of their file began, and what the
    journal said at any time.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._lock = threading.Lock()
        self._written: dict[str, set[tuple[int, int]]] = {}
        self._durable: dict[str, set[tuple[int, int]]] = {}
        self._text = b""
        self.journals: list[tuple[bytes, set[tuple[int, int]]]] = []
        self._place = {
            (f"{PLAN.shards[t.shard].file}.partial", tile_span(t, k)[0]): (n, k)
            for n, t in enumerate(PLAN.tensors)
            for k in range(t.n_tiles)
        }

    def watch(self, monkeypatch, folder: Path) -> None:
        pwrite, write, fsync = os.pwrite, os.write, os.fsync

        def watched_pwrite(fd, data, offset):
            self._pause()
            n = pwrite(fd, data, offset)
            self._pause()
            name = _name(fd)
            if key := self._place.get((name, offset)):
                with self._lock:
                    self._written.setdefault(name, set()).add(key)
            return n

        def watched_fsync(fd):
            name = _name(fd)
            with self._lock:
                written = set(self._written.get(name, ()))
            self._pause()
            fsync(fd)
            self._pause()
            with self._lock:
                self._durable[name] = self._durable.get(name, set()) | written

        def watched_write(fd, data):
            with self._lock:
                n = write(fd, data)
                if _name(fd).endswith(".journal"):
                    self._text += data[:n]
                    self.journals.append((self._text, set().union(*self._durable.values())))
            return n

        monkeypatch.setattr(os, "pwrite", watched_pwrite)
        monkeypatch.setattr(os, "write", watched_write)
        monkeypatch.setattr(os, "fsync", watched_fsync)

    def _pause(self) -> None:
        with self._lock:
            seconds = self._rng.uniform(0, 0.002)
        threading.Event().wait(seconds)


def _name(fd: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))


def _await(condition: Callable[[], bool]) -> None:
    for _ in range(PATIENCE * 100):
        if condition():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


def assert_finished(folder: Path) -> None:
    """Every shard under its final name holds its tiles, and nothing is left over."""
    for number, shard in enumerate(PLAN.shards):
        here = [key for key in keys(PLAN) if PLAN.tensors[key[0]].shard == number]
        tiles = b"".join(content(PLAN, *key) for key in here)
        assert (folder / shard.file).read_bytes() == shard.header + tiles
    names = {path.name for path in folder.iterdir()}
    assert names == {*(shard.file for shard in PLAN.shards), "m.manifest.json"}
