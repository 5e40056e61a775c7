"""The front of sizes and costs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.allocate.choices import build_groups
from quantkit.allocate.frontier import corners, frontier
from quantkit.allocate.solve import solve
from tests.allocate.models import ceiling, floor, group, kimi, made_up_costs

exact_costs = st.integers(0, 1000).map(lambda n: n / 64)  # sums of these are not rounded
options = st.lists(st.tuples(st.integers(1, 50), exact_costs), min_size=1, max_size=4)


@st.composite
def groups(draw):
    made = draw(st.lists(options, min_size=1, max_size=5))
    return [group(f"g{i}", *found) for i, found in enumerate(made)]


@given(groups())
@settings(deadline=None)
def test_a_corner_is_the_cheapest_assignment_of_its_size(some):
    for corner in corners(some):
        assert solve(some, corner.n_bytes).cost == pytest.approx(corner.cost, abs=1e-9)


@given(groups(), st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_the_front_falls_from_the_smallest_to_the_cheapest(some, n_fill):
    front = frontier(some, n_fill)
    assert front[0].n_bytes == floor(some)
    assert front[-1].cost == pytest.approx(solve(some, ceiling(some)).cost, abs=1e-9)
    assert all(a.n_bytes < b.n_bytes and a.cost > b.cost for a, b in pairwise(front))
    assert set(corners(some)) <= set(front)


@given(groups())
@settings(deadline=None)
def test_gain_per_byte_falls_from_corner_to_corner(some):
    slopes = [(b.cost - a.cost) / (b.n_bytes - a.n_bytes) for a, b in pairwise(corners(some))]
    assert all(a <= b + 1e-9 for a, b in pairwise(slopes))


def test_filling_adds_optimal_points_off_the_hull():
    some = [group("a", (0, 100.0), (400, 80.0), (1000, 0.0))]
    assert [p.n_bytes for p in corners(some)] == [0, 1000]
    inside = [p for p in frontier(some, 50) if not p.corner]
    assert [(p.n_bytes, p.cost) for p in inside] == [(400, 80.0)]


def test_kimi_k2_5_has_thousands_of_corners():
    some = build_groups(kimi().tensors, made_up_costs(2))
    front = corners(some)
    assert len(front) > 2000
    assert (front[0].n_bytes, front[-1].n_bytes) == (floor(some), ceiling(some))
