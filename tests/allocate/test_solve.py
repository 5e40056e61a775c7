"""The solver: as cheap as can be, never above the budget."""

from __future__ import annotations

import random
from itertools import product
from math import fsum
from statistics import median
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.allocate.choices import Group, Option, build_groups
from quantkit.allocate.solve import solve
from quantkit.errors import UsageError
from quantkit.types import GgmlType
from tests.allocate.models import ceiling, floor, group, kimi, made_up_costs

KIMI_SOURCE_BYTES = 595_000_000_000  # as published; nobody wants it larger

sizes = st.integers(0, 60)
any_costs = st.floats(-10, 10, allow_nan=False)
# Few distinct values, so that equal costs, equal sizes and straight hulls come up.
round_costs = st.integers(-4, 4).map(float)


@st.composite
def instances(draw, costs, max_groups=5):
    options = st.lists(st.tuples(sizes, costs), min_size=1, max_size=4)
    groups = [
        group(f"g{i}", *made)
        for i, made in enumerate(draw(st.lists(options, min_size=1, max_size=max_groups)))
    ]
    return groups, draw(st.integers(floor(groups), ceiling(groups) + 5))


def brute_force(groups, budget):
    """Least cost over all assignments, by looking at each."""
    return min(
        fsum(option.cost for option in chosen)
        for chosen in product(*(g.options for g in groups))
        if sum(option.n_bytes for option in chosen) <= budget
    )


def table_dp(groups, budget):
    """Least cost in integer costs and few bytes: the textbook table over all budgets."""
    best = [0] * (budget + 1)
    for g in groups:
        best = [
            min(
                (best[b - o.n_bytes] + int(o.cost) for o in g.options if o.n_bytes <= b),
                default=10**9,
            )
            for b in range(budget + 1)
        ]
    return best[budget]


@given(st.one_of(instances(any_costs), instances(round_costs)))
@settings(max_examples=300, deadline=None)
def test_nothing_within_the_budget_costs_less(instance):
    groups, budget = instance
    found = solve(groups, budget)
    assert found.n_bytes <= budget
    assert found.cost == pytest.approx(brute_force(groups, budget), abs=1e-9)
    assert found.gap == 0


@pytest.mark.parametrize("seed", range(12))
def test_hundreds_of_groups_are_solved_as_a_table_over_all_budgets_solves_them(seed):
    rng = random.Random(seed)
    groups = [
        group(f"g{i}", *((rng.randint(1, 40), rng.randint(0, 1000)) for _ in range(6)))
        for i in range(120)
    ]
    budget = rng.randint(floor(groups), ceiling(groups) * 2 // 3)
    found = solve(groups, budget)
    assert found.n_bytes <= budget
    assert found.cost == table_dp(groups, budget)
    assert found.gap == 0


@given(st.one_of(instances(any_costs), instances(round_costs)))
@settings(deadline=None)
def test_no_upgrade_that_gains_fits_into_what_is_left(instance):
    groups, budget = instance
    found = solve(groups, budget)
    left = budget - found.n_bytes
    for g in groups:
        own = found.options[g.name]
        assert not any(
            o.cost < own.cost - 1e-9 and o.n_bytes - own.n_bytes <= left for o in g.options
        )


@given(instances(any_costs), st.integers(1, 30))
@settings(deadline=None)
def test_more_bytes_never_cost_more(instance, more):
    groups, budget = instance
    assert solve(groups, budget + more).cost <= solve(groups, budget).cost + 1e-9


@given(instances(round_costs, max_groups=8), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_groups_and_options_changes_nothing(instance, rng):
    groups, budget = instance
    shuffled = [
        Group(g.name, g.tensors, g.n_weights, tuple(rng.sample(g.options, len(g.options))))
        for g in rng.sample(groups, len(groups))
    ]
    assert solve(shuffled, budget).options == solve(groups, budget).options


def test_of_equal_options_the_smaller_then_the_first_by_name_is_taken():
    small, a, b = (
        Option(GgmlType[name], n, cost)
        for name, n, cost in (("Q2_K", 8, 2.0), ("IQ4_NL", 18, 1.0), ("Q4_0", 18, 1.0))
    )
    larger = Option(GgmlType.Q8_0, 34, 1.0)
    found = solve([Group("g", ("t",), 32, (b, larger, a, small))], 100)
    assert found.options["g"] is a


def test_a_type_that_costs_more_in_more_bytes_is_never_taken():
    odd = group("g", (10, 5.0), (20, 7.0), (30, 1.0))
    assert solve([odd], 29).options["g"].n_bytes == 10
    assert solve([odd], 30).options["g"].n_bytes == 30


def test_the_budget_is_met_where_only_an_option_off_the_hull_fits():
    groups = [group("a", (0, 10.0), (6, 9.0), (10, 0.0))]
    assert solve(groups, 9).n_bytes == 6


def test_too_small_a_budget_is_refused_with_the_smallest_possible():
    with pytest.raises(UsageError, match=r"29 bytes are too few, .* takes 30"):
        solve([group("a", (10, 1.0), (40, 0.0)), group("b", (20, 1.0))], 29)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([group("a", (1, 1.0)), group("a", (1, 1.0))], "two groups have this name"),
        ([group("a")], "no type to choose from"),
        ([group("a", (1, float("nan")))], "no number to add up"),
        ([group("a", (1, float("inf")))], "no number to add up"),
        ([group("a", (-1, 1.0))], "no number to add up"),
    ],
)
def test_groups_that_make_no_sense_are_refused(groups, message):
    with pytest.raises(UsageError, match=message):
        solve(groups, 100)


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_a_penalty_that_makes_no_sense_is_refused(penalty):
    with pytest.raises(UsageError, match="per type"):
        solve([group("a", (1, 1.0))], 100, type_penalty=penalty)


def test_no_groups_are_an_empty_assignment():
    found = solve([], 0)
    assert (found.n_bytes, found.cost, found.gap, found.types()) == (0, 0, 0, {})


def test_what_cannot_be_proven_is_reported_as_a_gap():
    """Bytes are all that counts, and no sum of them meets the budget: only trying would tell."""
    rng = random.Random(3)
    groups = []
    for i in range(40):
        options = (rng.randint(1, 10**12) for _ in range(8))
        groups.append(group(f"g{i}", *((n, -n / 1e9) for n in options)))
    budget = (floor(groups) + ceiling(groups)) // 2
    found = solve(groups, budget)
    assert found.n_bytes < budget
    assert found.gap > 0
    assert found.bound == pytest.approx(-budget / 1e9)


def test_types_that_gain_little_are_given_up_for_a_penalty():
    types = [GgmlType.Q2_K, GgmlType.Q4_K, GgmlType.Q8_0]

    def options(i):
        return tuple(
            Option(t, n, c * (1 + i))
            for t, n, c in zip(types, (84, 144, 272), (4, 2, 1.9), strict=True)
        )

    groups = [Group(f"g{i:02}", (f"t{i:02}",), 256, options(i)) for i in range(20)]
    free, mild, strict = (solve(groups, 3200, type_penalty=p) for p in (0.0, 20.0, 1000.0))
    assert max(free.n_bytes, mild.n_bytes, strict.n_bytes) <= 3200
    n_types = [len(set(found.types().values())) for found in (free, mild, strict)]
    assert n_types[0] > n_types[1] >= n_types[2] == 1
    assert free.cost < mild.cost < free.cost + 20.0 * (n_types[0] - n_types[1])
    assert free.gap == 0
    assert mild.gap == pytest.approx(mild.cost - free.cost)


def test_a_type_that_a_tensor_cannot_do_without_stays():
    only = Group("only", ("t",), 32, (Option(GgmlType.Q8_0, 34, 1.0),))
    other = Group(
        "z", ("u",), 256, (Option(GgmlType.Q2_K, 84, 1.0), Option(GgmlType.Q4_K, 144, 0.5))
    )
    found = solve([only, other], 200, type_penalty=100.0)
    assert set(found.types().values()) == {GgmlType.Q8_0, GgmlType.Q4_K}


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["layers alike", "all layers differ"])
def kimi_groups(request):
    return build_groups(kimi().tensors, made_up_costs(1, request.param))


def test_kimi_k2_5_is_solved_to_within_a_thousandth_below_any_target_in_a_second(kimi_groups):
    rng = random.Random(20)
    seconds = []
    for _ in range(20):
        budget = rng.randint(floor(kimi_groups) * 1001 // 1000, KIMI_SOURCE_BYTES)
        begin = process_time()
        found = solve(kimi_groups, budget)
        seconds.append(process_time() - begin)
        assert 0.999 * budget <= found.n_bytes <= budget
        assert found.gap == 0
    assert median(seconds) < 1
    assert len(found.types()) == 731


def test_kimi_k2_5_gives_the_same_types_whatever_the_order(kimi_groups):
    shuffled = random.Random(4).sample(kimi_groups, len(kimi_groups))
    assert solve(shuffled, int(240e9)).types() == solve(kimi_groups, int(240e9)).types()
