"""A disk that is full, fails, lies or takes half; files that vanish between two runs."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.run import journal as journal_module
from quantkit.run.journal import Done, Journal
from tests.faults.jobs import calls_of, digests, killed, leftovers, watched, write_model

FAILING = {"pwrite", "write", "fsync", "ftruncate", "open", "replace", "mkdir"}


def run_failing(work, folder: Path, at: int, number: int) -> str:
    """The message of a run whose `at`-th call fails with this errno; empty if none came of it."""

    def before(n: int, name: str, arguments: tuple) -> None:
        if n == at and name in FAILING:
            raise OSError(number, os.strerror(number))

    try:
        with watched(folder, before):
            work.run(folder)
    except OutputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "no space left"), (errno.EIO, "Input/output error")]
)
def test_any_call_that_fails_is_one_message_and_costs_nothing_finished(
    nearest, expected, tmp_path, number, said
):
    calls = calls_of(nearest, tmp_path / "first")
    for at, call in enumerate(calls, 1):
        if call.name not in FAILING:
            continue
        folder = tmp_path / str(at)
        message = run_failing(nearest, folder, at, number)
        assert said in message, (at, call)
        assert "the same command" in message, (at, call)
        for name, digest in digests(folder).items():
            assert digest == expected(nearest)[name], (at, call)
        nearest.run(folder)
        assert digests(folder) == expected(nearest), (at, call)
        assert leftovers(folder) == [], (at, call)


def test_what_a_failed_flush_may_have_dropped_is_made_again(nearest, expected, tmp_path):
    """Linux takes pages for clean once their writing has failed: the next fsync is well."""
    calls = calls_of(nearest, tmp_path / "first")
    flushes = [at for at, c in enumerate(calls, 1) if c.name == "fsync" and ".gguf" in c.path.name]
    assert len(flushes) == 3
    for at in flushes:
        folder = tmp_path / str(at)
        dirty: dict[str, set[tuple[int, int]]] = {}

        def before(n: int, name: str, arguments: tuple, dirty=dirty, at=at) -> None:
            if not isinstance(arguments[0], int):
                return
            path = os.readlink(f"/proc/self/fd/{arguments[0]}")
            if name == "pwrite":
                dirty.setdefault(path, set()).add((arguments[2], len(arguments[1])))
            elif name == "fsync" and n == at:
                raise OSError(errno.EIO, "Input/output error")
            elif name == "fsync":
                dirty.pop(path, None)

        with watched(folder, before), pytest.raises(OutputError, match="Input/output"):
            nearest.run(folder)
        assert dirty
        for path, places in dirty.items():
            with open(path, "r+b") as file:
                for offset, n_bytes in places:
                    file.seek(offset)
                    file.write(b"\xa5" * n_bytes)
        nearest.run(folder)
        assert digests(folder) == expected(nearest)


def test_a_file_that_vanished_is_made_again_however_often_runs_die_meanwhile(
    nearest, expected, tmp_path
):
    """What the first run recorded of it must not come back to life in the third."""
    calls = calls_of(nearest, tmp_path / "first")
    late = max(at for at, call in enumerate(calls, 1) if call.name == "write") - 3
    for vanished in range(3):
        for at in range(6, 30, 4):
            folder = tmp_path / f"{vanished}-{at}"
            killed(nearest, folder, late)
            partials = sorted(folder.glob("*.gguf.partial"))
            partials[vanished].unlink()
            killed(nearest, folder, at)
            nearest.run(folder)
            assert digests(folder) == expected(nearest), (vanished, at)


def test_what_is_left_of_another_layout_does_not_shine_through(nearest, expected, tmp_path):
    """A partial file without a journal: bytes between tensors are nobody's to write again."""
    killed(nearest, tmp_path, 30)
    (tmp_path / ".m-Q4_0.journal").unlink()
    for path in tmp_path.glob("*.partial"):
        path.write_bytes(b"\xa5" * path.stat().st_size)
    (tmp_path / "m-Q4_0-00009-of-00009.gguf.partial").write_bytes(b"\xa5")
    nearest.run(tmp_path)
    assert digests(tmp_path) == expected(nearest)
    assert leftovers(tmp_path) == []


def test_replacing_finished_files_never_leaves_two_models_side_by_side(nearest, expected, tmp_path):
    other = replace(nearest, model=write_model(tmp_path / "other", seed=2))
    calls = calls_of(nearest, tmp_path / "first")
    ours = expected(nearest)
    named = next(at for at, call in enumerate(calls, 1) if call.name == "replace")
    for at in range(named - 10, len(calls) + 12):
        folder = tmp_path / str(at)
        other.run(folder)
        theirs = digests(folder)
        assert theirs.keys() == ours.keys()
        assert not set(theirs.items()) & set(ours.items())
        killed(nearest, folder, at, force=True)
        there = set(digests(folder).items())
        assert there <= set(theirs.items()) or there <= set(ours.items()), at
        nearest.run(folder, force=True)
        assert digests(folder) == ours, at
        assert leftovers(folder) == [], at


def test_a_run_started_anew_with_other_settings_leaves_no_state_of_the_first(
    feedback, nearest, expected, tmp_path, always_saved
):
    calls = calls_of(feedback, tmp_path / "first")
    saved = next(at for at, c in enumerate(calls, 1) if "sweep.state" in c.path.name) + 3
    killed(feedback, tmp_path / "out", saved)
    assert list((tmp_path / "out").glob(".*.work/*"))
    nearest.run(tmp_path / "out", restart=True)
    assert digests(tmp_path / "out") == expected(nearest)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_writes_and_reads_that_stop_short_are_gone_on_with(
    nearest, expected, tmp_path, monkeypatch, most
):
    pwrite, write, preadv, read = os.pwrite, os.write, os.preadv, os.read
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:most], at))
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:most]))
    monkeypatch.setattr(os, "read", lambda fd, n: read(fd, min(n, most)))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:most]], at))
    nearest.run(tmp_path)
    assert digests(tmp_path) == expected(nearest)


def test_a_device_that_takes_nothing_at_all_is_an_error_and_no_loop(nearest, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(OutputError, match="takes no more bytes"):
        nearest.run(tmp_path)


D1, D2 = (bytes([n]) * 32 for n in (1, 2))


TILES = [4, 4]  # of each tensor


def done(path: Path) -> Done:
    journal = Journal(path, "p", TILES)
    journal.close()
    return journal.done


def test_what_is_forgotten_stays_forgotten_and_can_be_recorded_again(tmp_path):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.record(1, 0, D1)
    first.sync()
    first.record(1, 1, D1)
    first.forget({1})
    assert first.done == {(0, 0): D1}
    first.record(1, 1, D2)
    first.close()
    assert done(tmp_path / "j") == {(0, 0): D1, (1, 1): D2}


def test_after_doubt_only_what_was_durable_before_counts(tmp_path):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.sync()
    first.record(0, 1, D1)
    first.doubt()
    first.close()
    assert done(tmp_path / "j") == {(0, 0): D1}


@pytest.mark.parametrize(
    "torn",
    [
        b"tile 7 7 " + b"\0" * 64,
        b"tile 7 7 " + b"0" * 63,
        b"tile 7",
        b"tile -1 0 " + b"0" * 64,
        b"\0" * 4096,
        b"\0" * 4096 + b"lost 0",
        b"tile 999999999 999999999 " + b"0" * 64,
        b"tile 0 4 " + b"0" * 64,
        b"lost 999999999",
        b"\xff\xfe tile",
        b"lost x",
        b"boot",
        b"",
    ],
)
def test_a_line_that_a_power_cut_left_half_is_passed_over(tmp_path, torn):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.close()
    with (tmp_path / "j").open("ab") as file:
        file.write(torn + b"\n")
    assert done(tmp_path / "j") == {(0, 0): D1}


def test_a_journal_that_was_removed_as_its_lock_was_handed_over_is_not_taken(tmp_path, monkeypatch):
    path = tmp_path / "j"
    flock = journal_module.fcntl.flock

    def late(fd: int, how: int) -> None:
        path.unlink()  # the other run is done just now
        flock(fd, how)

    monkeypatch.setattr(journal_module.fcntl, "flock", late)
    with pytest.raises(OutputError, match="another run"):
        Journal(path, "p", TILES)
