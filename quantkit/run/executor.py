"""Runs many small tasks on threads with a bounded number in flight."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_threaded(
    work: Callable[[Task], Result], tasks: Iterable[Task], n_threads: int
) -> Generator[Result, None, None]:
    """Yield `work(task)` for every task as results come in, in any order.

    At most `n_threads + 1` tasks are in flight: one waits so that no thread does. The first
    failure, or the consumer leaving, stops the supply and waits for what is in flight.
    """
    supply = iter(tasks)
    pending: set[Future[Result]] = set()
    with ThreadPoolExecutor(n_threads, thread_name_prefix="quantkit") as pool:
        try:
            exhausted = False
            while pending or not exhausted:
                while not exhausted and len(pending) <= n_threads:
                    try:
                        task = next(supply)
                    except StopIteration:
                        exhausted = True
                    else:
                        pending.add(pool.submit(work, task))
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            for future in pending:
                future.cancel()
