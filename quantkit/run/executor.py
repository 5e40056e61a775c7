"""Runs many small tasks on threads with a bounded number, and bounded bytes, in flight."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

# mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: arrays up to 16 MiB come from the heap, of which
# up to 64 MiB that are free stay. glibc starts with 128 KiB and adapts, to 32 and 64 MiB at most.
_HEAP = ((-3, 16 << 20), (-1, 64 << 20))


@cache
def keep_freed_memory() -> None:
    """Have glibc keep what a task frees for the next one, in this process from now on.

    It would give a tile's arrays back to the system and get other pages for the next tile, which
    are cleared one by one: half of the CPU time of a tile whose codes are only copied.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _HEAP:
            mallopt(parameter, value)


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
    keep_freed_memory()
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
