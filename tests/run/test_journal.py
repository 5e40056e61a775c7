"""The journal: what counts after which kind of death."""

from __future__ import annotations

import json
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import OutputError
from quantkit.run import journal as journal_module
from quantkit.run.journal import Done, Journal

D1, D2, D3, D4 = (bytes([n]) * 32 for n in (1, 2, 3, 4))
TILES = [4, 0, 1, 4, 4, 4]  # of each tensor


@pytest.fixture
def boot(monkeypatch):
    def set_boot(name: str) -> None:
        monkeypatch.setattr(journal_module, "_boot_id", lambda: name)

    set_boot("monday")
    return set_boot


def reopened(path, plan="p", tiles=TILES):
    again = Journal(path, plan, tiles)
    again.close()
    return again


def test_tiles_survive_the_death_of_the_process(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.record(5, 2, D2)
    first.close()
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (5, 2): D2}


def test_after_a_reboot_only_synced_tiles_count(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.mark()
    first.sync()
    first.record(0, 1, D2)
    first.close()
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {(0, 0): D1}


def test_what_is_recorded_during_a_flush_waits_for_the_next(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.mark()
    first.record(0, 1, D2)
    first.sync()
    copy = (tmp_path / "j").read_bytes()
    first.mark()
    first.record(3, 0, D3)
    first.sync()
    first.close()
    (tmp_path / "copy").write_bytes(copy)
    assert reopened(tmp_path / "copy").done == {(0, 0): D1, (0, 1): D2}
    boot("tuesday")
    (tmp_path / "copy").write_bytes(copy)
    assert reopened(tmp_path / "copy").done == {(0, 0): D1}
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 1): D2}


def test_a_flush_that_was_not_seen_to_end_makes_nothing_durable(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.mark()
    first.close()
    second = Journal(tmp_path / "j", "p", TILES)
    assert second.done == {(0, 0): D1}
    second.close()
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {}


def test_a_flush_also_counts_for_what_was_marked_before_and_not_synced(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.mark()
    first.close()
    second = Journal(tmp_path / "j", "p", TILES)
    second.record(0, 1, D2)
    second.mark()
    second.record(0, 2, D3)
    second.sync()
    second.close()
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 1): D2}


def test_a_doubt_takes_what_was_being_flushed_and_what_came_after(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.mark()
    first.sync()
    first.record(0, 1, D2)
    first.mark()
    first.record(0, 2, D3)
    first.doubt()
    first.close()
    second = Journal(tmp_path / "j", "p", TILES)
    assert second.done == {(0, 0): D1}
    second.record(0, 3, D4)
    second.mark()
    second.sync()
    second.close()
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 3): D4}


def test_a_journal_of_an_earlier_version_means_everything_by_sync(tmp_path, boot):
    lines = ["boot monday", tile(0, 0, D1), "sync", tile(0, 1, D2), "sync", tile(0, 2, D3)]
    write_journal(tmp_path / "j", lines)
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 1): D2, (0, 2): D3}
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 1): D2}


def test_a_tile_that_is_made_again_counts_as_new(tmp_path, boot):
    """Its bytes have been written again, and how much of that is durable is unknown."""
    write_journal(tmp_path / "j", ["boot monday", tile(0, 0, D1), "sync", tile(0, 0, D2)])
    assert reopened(tmp_path / "j").done == {(0, 0): D2}
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {}


def tile(tensor: int, number: int, digest: bytes) -> str:
    return f"tile {tensor} {number} {digest.hex()}"


def write_journal(path, lines):
    header = json.dumps({"journal": 1, "plan": "p"})
    path.write_text("".join(f"{line}\n" for line in [header, *lines]))


def test_a_process_death_before_a_reboot_does_not_promote_unsynced_tiles(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.close()
    second = Journal(tmp_path / "j", "p", TILES)
    second.record(0, 1, D2)
    second.close()
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {}


def test_resuming_twice_in_a_row_keeps_everything(tmp_path, boot):
    for tile, digest in enumerate((D1, D2, D3)):
        run = Journal(tmp_path / "j", "p", TILES)
        assert len(run.done) == tile
        run.record(0, tile, digest)
        run.close()
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 1): D2, (0, 2): D3}


@pytest.mark.parametrize("n_cut", range(1, 75))
def test_a_torn_last_line_counts_as_none(tmp_path, boot, n_cut):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.record(0, 1, D2)
    first.close()
    raw = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(raw[:-n_cut])
    again = Journal(tmp_path / "j", "p", TILES)
    assert again.done == {(0, 0): D1}
    again.record(0, 2, D3)
    again.close()
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 2): D3}


def test_another_plan_is_refused_unless_restarted(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    first.record(0, 0, D1)
    first.close()
    with pytest.raises(OutputError, match="another source, recipe or layout"):
        Journal(tmp_path / "j", "q", TILES)
    fresh = Journal(tmp_path / "j", "q", TILES, restart=True)
    assert fresh.done == {}
    fresh.close()


def test_a_second_process_is_refused(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    with pytest.raises(OutputError, match="another run"):
        Journal(tmp_path / "j", "p", TILES)
    first.close()


def test_sealing_is_remembered(tmp_path, boot):
    first = Journal(tmp_path / "j", "p", TILES)
    assert not first.sealed
    first.seal()
    first.close()
    assert reopened(tmp_path / "j").sealed


def test_tiles_are_known_as_soon_as_they_are_recorded(tmp_path, boot):
    journal = Journal(tmp_path / "j", "p", TILES)
    journal.record(3, 1, D1)
    assert (3, 1) in journal.done
    assert (3, 0) not in journal.done
    with pytest.raises(KeyError):
        journal.done[3, 0]
    assert journal.done.count(3) == 1
    journal.close()


@pytest.mark.parametrize("key", [(1, 0), (0, 4), (6, 0), (-1, 0), (0, -1)])
def test_a_tile_that_no_tensor_has_is_no_key_and_cannot_be_added(key):
    done = Done(TILES)
    assert key not in done
    with pytest.raises(IndexError):
        done.add(*key, D1)
    assert len(done) == 0


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("tile"), st.integers(0, 2), st.integers(0, 3)),
        st.tuples(st.just("lost"), st.integers(0, 3)),
        st.tuples(st.just("boot"), st.sampled_from(["monday", "tuesday"])),
        st.sampled_from([("flush",), ("sync",), ("doubt",), ("nonsense",)]),
    ),
    max_size=40,
)


@given(events=EVENTS)
def test_a_journal_means_what_its_description_says(events, tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "j"
    lines = [
        tile(*event[1:], bytes([n]) * 32) if event[0] == "tile" else " ".join(map(str, event))
        for n, event in enumerate(events)
    ]
    write_journal(path, lines)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal_module, "_boot_id", lambda: "monday")
        assert reopened(path, tiles=[4, 4, 4]).done == meant(events)


def meant(events) -> dict[tuple[int, int], bytes]:
    """The same with a dictionary for each degree of trust."""
    fresh, flushed, durable = {}, {}, {}
    boot, marked = None, False
    for n, event in enumerate(events):
        match event:
            case ("tile", *key):
                for tiles in (fresh, flushed, durable):
                    tiles.pop(tuple(key), None)
                fresh[tuple(key)] = bytes([n]) * 32
            case ("lost", tensor):
                for tiles in (fresh, flushed, durable):
                    for key in [key for key in tiles if key[0] == tensor]:
                        del tiles[key]
            case ("flush",):
                flushed, fresh, marked = flushed | fresh, {}, True
            case ("sync",) if marked:
                durable, flushed, marked = durable | flushed, {}, False
            case ("sync",):
                durable, fresh = durable | fresh, {}
            case ("doubt",):
                fresh, flushed, marked = {}, {}, False
            case ("boot", name):
                if name != boot:
                    fresh, flushed, marked = {}, {}, False
                boot = name
    if boot != "monday":
        fresh, flushed = {}, {}
    return dict(chain(fresh.items(), flushed.items(), durable.items()))
