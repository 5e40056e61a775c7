"""The same tensor bytes, however the work is cut, shared out and interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.container.shardset import open_shards
from quantkit.errors import OutputError
from tests.faults.jobs import calls_of, digests, killed

THREADS = (1, 2, 8)
TILES = (None, 1024, 3_000)  # weights of a tile; None as it comes
SHARDS = (None, 12_000, 7_000)  # most bytes of a file
STRIPS = (None, 700, 128)  # weights of a tile that are in memory at once; None for all
MEMORY = 1_200_000  # bytes that one tile fits, and no two


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a set."""
    content = {path.name: path.read_bytes() for path in folder.glob("*.gguf")}
    shards = open_shards(folder / min(content))
    return {
        tensor.name: content[file.path.name][tensor.begin : tensor.end]
        for file, tensor in shards.tensors()
    }


@pytest.fixture
def tiles_of(monkeypatch):
    """tiles_of(n): from now on a tile has at most n weights, or as many as it comes."""

    def cut(n_weights: int | None) -> None:
        if n_weights is not None:
            monkeypatch.setattr("quantkit.plan.tiles.TILE_WEIGHTS", n_weights)

    return cut


@pytest.fixture
def strips_of(monkeypatch):
    """strips_of(n): the budget that has tiles made in strips of at most n weights."""

    def bound(n_weights: int | None) -> int | None:
        if n_weights is None:
            return None
        monkeypatch.setattr("quantkit.plan.memory.TILE_WEIGHTS", 2 * n_weights)
        monkeypatch.setattr("quantkit.plan.memory._SMALLEST_STRIP", n_weights)
        return MEMORY

    return bound


@pytest.fixture(scope="module")
def whole(nearest, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    replace(nearest, max_shard_bytes=None).run(folder)
    return tensors(folder)


@pytest.mark.parametrize("strip", STRIPS)
@pytest.mark.parametrize("max_shard_bytes", SHARDS)
@pytest.mark.parametrize("n_weights", TILES)
@pytest.mark.parametrize("n_threads", THREADS)
def test_threads_tiles_strips_and_shards_make_no_difference(
    nearest,
    expected,
    whole,
    tiles_of,
    strips_of,
    tmp_path,
    n_threads,
    n_weights,
    max_shard_bytes,
    strip,
):
    undisturbed = expected(nearest)
    tiles_of(n_weights)
    memory = strips_of(strip)
    work = replace(nearest, n_threads=n_threads, max_shard_bytes=max_shard_bytes, memory=memory)
    done = work.run(tmp_path)
    assert done.memory(n_threads, memory).strip_weights == strip
    assert tensors(tmp_path) == whole
    if max_shard_bytes == nearest.max_shard_bytes:
        assert digests(tmp_path) == undisturbed


# (threads, calls until the kill) of the runs before the last.
HISTORIES = (
    ((1, 40), (8, 20)),
    ((8, 60), (1, 10), (2, 12)),
    ((2, 5), (2, 30), (2, 30), (2, 30)),
)


@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize("n_weights", TILES)
def test_neither_do_kills_and_what_ran_before_them(
    nearest, expected, tiles_of, tmp_path, history, n_weights
):
    undisturbed = expected(nearest)
    tiles_of(n_weights)
    for n_threads, at in history:
        assert killed(replace(nearest, n_threads=n_threads), tmp_path, at)
    replace(nearest, n_threads=3).run(tmp_path)
    assert digests(tmp_path) == undisturbed


def test_a_run_with_other_tiles_does_not_take_over_what_is_there(
    nearest, expected, tiles_of, tmp_path
):
    undisturbed = expected(nearest)
    assert killed(nearest, tmp_path, 60)
    tiles_of(1024)
    with pytest.raises(OutputError, match="--restart"):
        nearest.run(tmp_path)
    nearest.run(tmp_path, restart=True)
    assert digests(tmp_path) == undisturbed


@pytest.mark.parametrize("n_weights", TILES[:2])
@pytest.mark.parametrize("n_threads", THREADS[:2])
def test_rounding_with_feedback_makes_the_same_bytes_too(
    feedback, expected, tiles_of, tmp_path, n_threads, n_weights
):
    undisturbed = expected(feedback)
    tiles_of(n_weights)
    replace(feedback, n_threads=n_threads).run(tmp_path)
    assert digests(tmp_path) == undisturbed


@pytest.mark.parametrize("share", [2, 5])
def test_and_so_it_does_when_it_is_killed_in_between(
    feedback, expected, tmp_path, always_saved, share
):
    n_calls = len(calls_of(feedback, tmp_path / "first"))
    assert killed(feedback, tmp_path / "out", n_calls // share)
    assert killed(feedback, tmp_path / "out", n_calls // 6)
    replace(feedback, n_threads=2).run(tmp_path / "out")
    assert digests(tmp_path / "out") == expected(feedback)
