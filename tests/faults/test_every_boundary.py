"""A process killed ahead of, in the middle of, or behind any call that changes the disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pytest

from tests.faults.jobs import WRITES, Call, Work, calls_of, digests, killed, leftovers

_TILE = re.compile(rb"^tile \d+ \d+ [0-9a-f]{64}\n", re.MULTILINE)


def recorded(folder: Path) -> int:
    """Tiles that are in the journal."""
    return sum(len(_TILE.findall(path.read_bytes())) for path in folder.glob(".*.journal"))


def written(calls: list[Call], n: int) -> int:
    """Tiles that the first n calls wrote: what goes into a shard behind its header."""
    return sum(c.name == "pwrite" and c.offset > 0 and ".gguf" in c.path.name for c in calls[:n])


def assert_sound(folder: Path, expected: dict[str, str]) -> None:
    """Whatever stands under a final name is right."""
    for name, digest in digests(folder).items():
        assert digest == expected[name], name
    for path in folder.glob("*.manifest.json"):
        json.loads(path.read_text())


def sweep(work: Work, expected: dict[str, str], folder: Path, calls: list[Call]) -> Iterator[int]:
    """Every boundary, once with whole calls and once in the middle of a write; gives the kills."""
    for at in range(1, len(calls) + 2):
        tears = [False]
        if at <= len(calls) and calls[at - 1].name in WRITES:
            tears.append(True)
        for torn in tears:
            said = (at, calls[min(at, len(calls)) - 1], torn)
            n_kills = int(killed(work, folder, at, torn=torn))
            assert n_kills == (at <= len(calls)), said
            assert_sound(folder, expected)
            if list(folder.glob(".*.journal")):
                # No more is lost than the tile that was being written.
                assert written(calls, at - 1) - recorded(folder) in (0, 1), said
            # The same place in the run that goes on, which has fewer of them.
            n_kills += killed(work, folder, max(1, at // 2), torn=False)
            assert_sound(folder, expected)
            work.run(folder)
            assert digests(folder) == expected, said
            assert leftovers(folder) == [], said
            rmtree(folder)
            yield n_kills


def test_rounding_to_the_nearest_survives_a_kill_at_every_call(nearest, expected, tmp_path):
    calls = calls_of(nearest, tmp_path / "first")
    assert digests(tmp_path / "first") == expected(nearest)
    assert len(expected(nearest)) == 3
    assert {call.name for call in calls} >= {"ftruncate", "pwrite", "write", "fsync", "replace"}
    n_kills = sum(sweep(nearest, expected(nearest), tmp_path / "out", calls))
    print(f"{len(calls)} calls, {n_kills} kills")
    assert n_kills > 1.5 * len(calls)


def test_a_kill_while_tiles_are_written_and_flushed_side_by_side_costs_only_those_in_work(
    nearest, expected, tmp_path, monkeypatch
):
    """Three threads and a flush for every few tiles: no two runs make their calls in one order."""
    monkeypatch.setattr("quantkit.write.writer._SYNC_BYTES", 4_000)
    work = replace(nearest, n_threads=3)
    calls = calls_of(work, tmp_path / "first")
    n_files = len(expected(nearest))
    assert sum(call.name == "fsync" for call in calls) > 4 * n_files
    n_kills = 0
    for at in range(1, len(calls), 3):
        folder = tmp_path / str(at)
        n_kills += killed(work, folder, at)
        assert_sound(folder, expected(nearest))
        before = recorded(folder)
        n_kills += killed(work, folder, max(1, at // 2))
        assert recorded(folder) >= before or not list(folder.glob(".*.journal")), at
        work.run(folder)
        assert digests(folder) == expected(nearest), at
        assert leftovers(folder) == [], at
        rmtree(folder)
    assert n_kills > 0.5 * len(calls)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rounding_with_feedback_survives_a_kill_at_every_call(
    feedback, expected, tmp_path, always_saved
):
    calls = calls_of(feedback, tmp_path / "first")
    assert digests(tmp_path / "first") == expected(feedback)
    assert any(c.name == "replace" and "sweep.state" in c.path.name for c in calls)
    n_kills = sum(sweep(feedback, expected(feedback), tmp_path / "out", calls))
    print(f"{len(calls)} calls, {n_kills} kills")


def test_rounding_with_feedback_survives_a_kill_around_every_name_and_flush(
    feedback, expected, tmp_path, always_saved
):
    """The calls that change what the next run believes; the slow sweep has all of them."""
    calls = calls_of(feedback, tmp_path / "first")
    chosen = {
        near
        for at, call in enumerate(calls, 1)
        if call.name in ("replace", "unlink", "rmdir") and ".manifest" not in call.path.name
        for near in (at, at + 1)
    }
    assert len(chosen) >= 8
    for at in sorted(chosen):
        folder = tmp_path / str(at)
        killed(feedback, folder, at)
        assert_sound(folder, expected(feedback))
        feedback.run(folder)
        assert digests(folder) == expected(feedback), (at, calls[at - 1])
        assert leftovers(folder) == [], (at, calls[at - 1])


@pytest.mark.parametrize("which", ["nearest", "feedback"])
def test_a_file_is_flushed_before_it_is_named_and_its_folder_after(
    which, request, tmp_path, always_saved
):
    """Or a power cut could leave a name without its bytes."""
    work = request.getfixturevalue(which)
    dirty: set[Path] = set()
    n_named = n_unsynced = 0
    for call in calls_of(work, tmp_path):
        if call.name in ("pwrite", "ftruncate"):
            dirty.add(call.path)
        elif call.name == "fsync":
            dirty.discard(call.path)
            n_unsynced = 0 if call.path == tmp_path else n_unsynced
        elif call.name == "replace" and "sweep.state" not in call.path.name:  # which has a sum
            assert call.path not in dirty
            n_named += 1
            n_unsynced += 1
    assert n_named == 4
    assert n_unsynced == 0
