"""The spool: never above its limit, never wrong, whole again after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.hub.spool import DATA, HEAD, Spool, piece_name
from tests.hub.conftest import size_of

LIMIT = 1000
PIECE = 100 - 32  # bytes of content in a hundred on disk


@pytest.fixture(autouse=True)
def here() -> None:
    """No Hub is needed."""


def name(number: int, kind: str = DATA) -> str:
    return piece_name(kind, "etag", number, number + 1)


def content(number: int) -> bytes:
    return bytes([number]) * PIECE


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "read", "reopen"]), st.integers(0, 30)), max_size=60)
)
def test_what_is_read_is_what_was_put_and_the_limit_holds(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder, LIMIT)
    for verb, number in steps:
        if verb == "put" and name(number) not in spool:
            spool.put(name(number), content(number))
            assert name(number) in spool
        elif verb == "read":
            assert spool.read(name(number), 3, 9) in (None, content(number)[3:9])
        elif verb == "reopen":
            spool = Spool(folder, LIMIT)
        assert size_of(folder) == spool.n_bytes <= LIMIT
    spool.clear()
    assert not folder.exists()


def test_pieces_that_were_read_whole_go_first_and_headers_last(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LIMIT)
    spool.put(name(0, HEAD), content(0))
    for number in range(1, 10):
        spool.put(name(number), content(number))
    assert spool.read(name(7), 0, PIECE) is not None
    spool.put(name(10), content(10))
    assert name(7) not in spool
    assert spool.read(name(1), 0, 1) is not None  # begun, and used most recently
    spool.put(name(11), content(11))
    assert name(2) not in spool
    for number in range(12, 40):
        spool.put(name(number), content(number))
    assert name(1) not in spool
    assert name(0, HEAD) in spool


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer"])
def test_a_damaged_piece_of_an_earlier_run_is_forgotten(tmp_path: Path, damage: str) -> None:
    Spool(tmp_path, LIMIT).put(name(5), content(5))
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    path.write_bytes(
        {"cut": raw[:-1], "flip": b"x" + raw[1:], "empty": b"", "longer": raw + b"x"}[damage]
    )
    spool = Spool(tmp_path, LIMIT)
    assert spool.read(name(5), 0, 1) is None
    assert name(5) not in spool
    assert spool.n_bytes == 0


def test_scraps_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    Spool(tmp_path, LIMIT).put(name(5), content(5))
    (tmp_path / f"{name(6)}.piece.partial").write_bytes(bytes(400))
    spool = Spool(tmp_path, LIMIT)
    assert spool.read(name(5), 0, PIECE) == content(5)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name(5)}.piece"]


def test_a_smaller_limit_than_before_is_kept_from_the_start(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LIMIT)
    for number in range(9):
        spool.put(name(number), content(number))
    assert Spool(tmp_path, 250).n_bytes == size_of(tmp_path) == 200


def test_what_cannot_fit_is_not_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 99)
    spool.put(name(1), content(1))
    assert name(1) not in spool
    assert size_of(tmp_path) == 0
