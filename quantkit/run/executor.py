"""Runs many small tasks on threads with a bounded number, and bounded bytes, in flight."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_threaded(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    n_threads: int,
    *,
    n_bytes: Callable[[Task], int] = lambda task: 0,
    budget: int | None = None,
) -> Generator[Result, None, None]:
    """Yield `work(task)` for every task as results come in, in any order.

    At most `n_threads + 1` tasks are in flight: one waits so that no thread does. With a `budget`,
    so many as fit into it by what `n_bytes` says of each, but always one; a task is in flight until
    the consumer asks for more after its result. The first failure, or the consumer leaving, stops
    the supply and waits for what is in flight.
    """
    finished: SimpleQueue[Future[Result]] = SimpleQueue()
    sizes: dict[Future[Result], int] = {}
    supply = ((task, n_bytes(task)) for task in tasks)
    upcoming = next(supply, None)
    with ThreadPoolExecutor(n_threads, thread_name_prefix="quantkit") as pool:
        try:
            while sizes or upcoming:
                while upcoming and len(sizes) <= n_threads:
                    task, size = upcoming
                    if sizes and budget is not None and sum(sizes.values()) + size > budget:
                        break
                    future = pool.submit(work, task)
                    sizes[future] = size
                    future.add_done_callback(finished.put)
                    upcoming = next(supply, None)
                future = finished.get()
                yield future.result()
                del sizes[future], future
        finally:
            for future in sizes:
                future.cancel()
