"""Threads with a bounded number of tasks in flight."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.run.executor import run_threaded


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_every_task_runs_once(n_threads):
    assert sorted(run_threaded(lambda n: n * n, range(100), n_threads)) == [
        n * n for n in range(100)
    ]


def test_no_more_tasks_are_taken_than_are_in_flight():
    taken = 0

    def supply():
        nonlocal taken
        for n in range(100):
            taken += 1
            yield n

    results = run_threaded(lambda n: n, supply(), 2)
    for n_done, _ in enumerate(results):
        assert taken <= n_done + 1 + 3
    assert taken == 100


def test_the_first_failure_stops_the_supply():
    seen = []

    def work(n):
        seen.append(n)
        if n == 5:
            raise ValueError(n)
        return n

    with pytest.raises(ValueError, match="5"):
        list(run_threaded(work, range(10_000), 2))
    assert len(seen) < 20


def test_leaving_early_waits_for_what_is_in_flight():
    running = threading.Event()

    def work(n):
        running.set()
        return n

    with closing(run_threaded(work, range(1000), 2)) as results:
        next(results)
    assert running.is_set()
    assert not [t for t in threading.enumerate() if t.name.startswith("quantkit")]


class Meter:
    """Bytes of tasks that have begun and whose results the consumer is not yet done with."""

    def __init__(self):
        self.sizes: list[int] = []
        self.worst_together = 0
        self._lock = threading.Lock()

    def begin(self, size):
        with self._lock:
            self.sizes.append(size)
            if len(self.sizes) > 1:
                self.worst_together = max(self.worst_together, sum(self.sizes))
        return size

    def end(self, size):
        with self._lock:
            self.sizes.remove(size)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=60),
    budget=st.integers(0, 250),
    n_threads=st.integers(1, 4),
)
def test_tasks_that_run_together_stay_within_the_budget(sizes, budget, n_threads):
    meter, done = Meter(), []
    for size in run_threaded(
        meter.begin, sizes, n_threads, n_bytes=lambda size: size, budget=budget
    ):
        done.append(size)
        meter.end(size)
    assert meter.worst_together <= budget
    assert sorted(done) == sorted(sizes)  # one that is larger than the budget runs alone


def test_a_failure_waits_for_what_is_in_flight_and_frees_the_budget():
    begun, go = [], threading.Event()

    def work(n):
        begun.append(n)
        if n == 0:
            raise ValueError(n)
        go.wait(10)
        return n

    threading.Timer(0.1, go.set).start()
    with pytest.raises(ValueError, match="0"):
        list(run_threaded(work, range(100), 2, n_bytes=lambda n: 1, budget=2))
    assert len(begun) <= 3
    assert not [t for t in threading.enumerate() if t.name.startswith("quantkit")]
