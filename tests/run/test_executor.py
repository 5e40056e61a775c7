"""Threads with a bounded number of tasks in flight."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

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
