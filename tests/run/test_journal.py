"""The journal: what counts after which kind of death."""

from __future__ import annotations

import pytest

from quantkit.errors import OutputError
from quantkit.run import journal as journal_module
from quantkit.run.journal import Journal

D1, D2, D3 = (bytes([n]) * 32 for n in (1, 2, 3))


@pytest.fixture
def boot(monkeypatch):
    def set_boot(name: str) -> None:
        monkeypatch.setattr(journal_module, "_boot_id", lambda: name)

    set_boot("monday")
    return set_boot


def reopened(path, plan="p"):
    again = Journal(path, plan)
    again.close()
    return again


def test_tiles_survive_the_death_of_the_process(tmp_path, boot):
    first = Journal(tmp_path / "j", "p")
    first.record(0, 0, D1)
    first.record(5, 2, D2)
    first.close()
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (5, 2): D2}


def test_after_a_reboot_only_synced_tiles_count(tmp_path, boot):
    first = Journal(tmp_path / "j", "p")
    first.record(0, 0, D1)
    first.sync()
    first.record(0, 1, D2)
    first.close()
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {(0, 0): D1}


def test_a_process_death_before_a_reboot_does_not_promote_unsynced_tiles(tmp_path, boot):
    first = Journal(tmp_path / "j", "p")
    first.record(0, 0, D1)
    first.close()
    second = Journal(tmp_path / "j", "p")
    second.record(0, 1, D2)
    second.close()
    boot("tuesday")
    assert reopened(tmp_path / "j").done == {}


def test_resuming_twice_in_a_row_keeps_everything(tmp_path, boot):
    for tile, digest in enumerate((D1, D2, D3)):
        run = Journal(tmp_path / "j", "p")
        assert len(run.done) == tile
        run.record(0, tile, digest)
        run.close()
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 1): D2, (0, 2): D3}


@pytest.mark.parametrize("n_cut", range(1, 75))
def test_a_torn_last_line_counts_as_none(tmp_path, boot, n_cut):
    first = Journal(tmp_path / "j", "p")
    first.record(0, 0, D1)
    first.record(0, 1, D2)
    first.close()
    raw = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(raw[:-n_cut])
    again = Journal(tmp_path / "j", "p")
    assert again.done == {(0, 0): D1}
    again.record(0, 2, D3)
    again.close()
    assert reopened(tmp_path / "j").done == {(0, 0): D1, (0, 2): D3}


def test_another_plan_is_refused_unless_restarted(tmp_path, boot):
    first = Journal(tmp_path / "j", "p")
    first.record(0, 0, D1)
    first.close()
    with pytest.raises(OutputError, match="another source, recipe or layout"):
        Journal(tmp_path / "j", "q")
    fresh = Journal(tmp_path / "j", "q", restart=True)
    assert fresh.done == {}
    fresh.close()


def test_a_second_process_is_refused(tmp_path, boot):
    first = Journal(tmp_path / "j", "p")
    with pytest.raises(OutputError, match="another run"):
        Journal(tmp_path / "j", "p")
    first.close()


def test_sealing_is_remembered(tmp_path, boot):
    first = Journal(tmp_path / "j", "p")
    assert not first.sealed
    first.sync(seal=True)
    first.close()
    assert reopened(tmp_path / "j").sealed
