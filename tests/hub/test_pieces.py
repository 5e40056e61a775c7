"""Where files are cut: at tensors, so that nothing is fetched that nobody reads."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.hub.pieces import lay_out, piece_bytes

PIECE = 6400  # a tensor of up to 100 bytes is tiny


@pytest.fixture(autouse=True)
def here() -> None:
    """No Hub is needed."""


def tensors(*sizes: tuple[str, int], begin: int = 50) -> list[tuple[str, int, int]]:
    placed = []
    for name, n_bytes in sizes:
        placed.append((name, begin, begin + n_bytes))
        begin += n_bytes
    return placed


def test_the_parts_of_a_weight_make_one_piece_and_its_neighbours_others() -> None:
    file = tensors(
        ("a.weight_packed", 4000), ("a.weight_scale", 500), ("a.weight_shape", 16),
        ("b.weight_packed", 4000), ("b.weight_scale", 500), ("b.weight_shape", 16),
    )  # fmt: skip
    assert lay_out(file, PIECE).bounds == (50, 4566, 9082)


def test_a_run_of_tiny_tensors_is_one_piece() -> None:
    file = tensors(("a", 90), ("b", 4), ("c", 100), ("d", 101), ("e", 7))
    assert lay_out(file, PIECE).bounds == (50, 244, 345, 352)


def test_a_large_tensor_is_cut() -> None:
    assert lay_out(tensors(("a", 15_000)), PIECE).bounds == (50, 6450, 12_850, 15_050)


def test_without_tensors_a_range_is_taken_as_it_is() -> None:
    assert list(lay_out([], PIECE).spans(3, 9)) == [(3, 9)]


sizes = st.lists(
    st.tuples(st.sampled_from(["a.x", "a.y", "b.x", "c"]), st.integers(0, 20_000)), min_size=1
)


@given(sizes, st.data())
def test_pieces_tile_the_tensors_and_each_holds_whole_ones_or_part_of_one(
    sizes: list[tuple[str, int]], data: st.DataObject
) -> None:
    file = tensors(*sizes)
    layout = lay_out(file, PIECE)
    first, last = file[0][1], file[-1][2]
    if first == last:
        assert layout.bounds == ()
        return
    assert (layout.bounds[0], layout.bounds[-1]) == (first, last)
    assert all(0 < end - begin <= PIECE for begin, end in pairwise(layout.bounds))
    edges = {edge for _, begin, end in file for edge in (begin, end)}
    for begin, end in pairwise(layout.bounds):
        inside = [t for t in file if t[1] < end and begin < t[2]]
        assert len(inside) == 1 or end in edges
    begin = data.draw(st.integers(0, last - 1))
    end = data.draw(st.integers(begin + 1, last + 100))
    spans = list(layout.spans(begin, end))
    assert spans[0][0] <= begin
    assert spans[-1][1] >= end
    assert all(one[1] == two[0] for one, two in pairwise(spans))


@pytest.mark.parametrize(
    ("limit", "n_bytes"), [(30 * 10**9, 16 << 20), (16_000_000, 1_000_000), (10, 4096)]
)
def test_several_pieces_fit_into_a_spool(limit: int, n_bytes: int) -> None:
    assert piece_bytes(limit) == n_bytes
