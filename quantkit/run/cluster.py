"""Hands tasks to workers on other machines, through Ray, and what was lost with a worker to others.

    with connected(Cluster(...)) as cluster:
        for index, result in Crew(cluster, open_worker, heard).results(tasks, named): ...

A task may be done twice: by the worker after the one that was lost, and by an idle one where
another is slow. So its effect has to be the same however often it happens; the first result counts.
Before a worker gets its first task it gives a proof, and those of all workers have to be alike.

Ray moves objects between processes with pickle. Whoever can reach the cluster can run code there
anyway; nothing that comes from a model or from the Hub is ever sent so.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, Protocol, TypeVar

from quantkit.errors import ClusterError, QuantkitError, UsageError

Task = TypeVar("Task")
Result = TypeVar("Result")
Task_contra = TypeVar("Task_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

_TICK = 1.0  # seconds between looks at the clock while nothing is finished
_PATIENCE = 30.0  # until somebody is told that the cluster has no room
_MOST_LOSSES = 3  # of workers on one task, or of workers that never began
_SLOW = 2.0  # times the median, from which on an idle worker does a task as well
_OBJECT_STORE = 128 << 20  # of a cluster of our own: tasks and results are small


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the workers are, and how many.

    `address` is `ray://HOST:PORT`; None means the cluster that the variable RAY_ADDRESS names, or
    else one on this machine for as long as it is needed. Without `n_workers` there is one on each
    machine, or for each GPU; without `n_threads` they share its cores.
    """

    address: str | None = None
    n_workers: int | None = None
    n_threads: int | None = None
    gpus: bool = False


@dataclass(frozen=True, slots=True)
class Seat:
    """What one worker occupies."""

    n_cpus: int
    n_gpus: int = 0


class Worker(Protocol[Task_contra, Result_co]):
    """What does tasks. `proof` is equal for workers that would do them alike."""

    @property
    def proof(self) -> str:
        """See `Worker`."""

    def run(self, task: Task_contra) -> Result_co:
        """Do one task."""


@dataclass(frozen=True, slots=True)
class _Ready:
    host: str
    pid: int
    proof: str


@dataclass(frozen=True, slots=True)
class _Failed:
    host: str
    error: QuantkitError


class _Lost:
    """Instead of a result."""


class _Desk:
    """The actor: lives in a process of the cluster and holds a worker."""

    def __init__(self, open_worker: Callable[[], Worker[Any, Any]]) -> None:
        self._open_worker = open_worker
        self._worker: Worker[Any, Any] | None = None

    def begin(self) -> _Ready | _Failed:
        """Open the worker."""
        try:
            self._worker = self._open_worker()
        except QuantkitError as error:
            return _Failed(socket.gethostname(), error)
        return _Ready(socket.gethostname(), os.getpid(), self._worker.proof)

    def run(self, task: Any) -> Any:
        """Do a task."""
        assert self._worker is not None  # noqa: S101 - `begin` comes first
        try:
            return self._worker.run(task)
        except QuantkitError as error:
            return _Failed(socket.gethostname(), error)


@dataclass(frozen=True, slots=True)
class Connected:
    """A cluster that answers: the module `ray`, and the places for its workers."""

    ray: Any
    seats: tuple[Seat, ...]

    def __str__(self) -> str:
        n, seat = len(self.seats), self.seats[0]
        cores = f"{seat.n_cpus} core" + ("s" if seat.n_cpus > 1 else "")
        gpu = " and a GPU" if seat.n_gpus else ""
        return f"{n} worker{'s' if n > 1 else ''} of {cores}{gpu}, Ray {self.ray.__version__}"


@contextmanager
def connected(cluster: Cluster) -> Iterator[Connected]:
    """Connected to the cluster inside the block; left as it was found.

    Raises `UsageError` where Ray is not installed, `ClusterError` where nobody answers.
    """
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise UsageError(
            f"the package ray is missing or broken: {error}",
            hint="pip install 'quantkit[cluster]'",
        ) from None
    if ray.is_initialized():
        yield Connected(ray, _seats(ray, cluster))
        return
    with _own_signals():
        _connect(ray, cluster)
    try:
        yield Connected(ray, _seats(ray, cluster))
    finally:
        ray.shutdown()


def _connect(ray: Any, cluster: Cluster) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _require_listener(address)
            ray.init(address=address, **quiet)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        n_cores = len(os.sched_getaffinity(0))
        n_workers = cluster.n_workers or 2
        n_threads = cluster.n_threads or max(1, n_cores // n_workers)
        ray.init(
            address="local",
            num_cpus=max(n_cores, n_workers * n_threads),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE,
            **quiet,
        )
    except (OSError, ImportError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"cannot be reached: {_first_line(error)}",
            where=address or "a Ray cluster on this machine",
            hint="`ray status` on its head tells whether it runs; Ray and Python must be of the "
            "same version everywhere; a cluster with a token wants RAY_AUTH_MODE=token here, too",
        ) from None


def _require_listener(address: str) -> None:
    """Raise `OSError` where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE / 3).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself; whoever called this keeps its handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _seats(ray: Any, cluster: Cluster) -> tuple[Seat, ...]:
    """What the workers of a cluster occupy; `ClusterError` where there is no room for any."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in alive]
    if cluster.gpus:
        cards = [int(node.get("GPU", 0)) for node in alive]
        found = [
            Seat(cluster.n_threads or max(1, n_cpus // n_gpus), 1)
            for n_cpus, n_gpus in zip(cores, cards, strict=True)
            for _ in range(n_gpus)
        ][: cluster.n_workers]
    elif cluster.n_workers:
        each = max(1, min(sum(cores) // cluster.n_workers, max(cores, default=0)))
        found = [Seat(cluster.n_threads or each)] * cluster.n_workers
    else:
        found = [
            Seat(cluster.n_threads or n_cpus)
            for n_cpus in cores
            for _ in range(n_cpus // (cluster.n_threads or max(1, n_cpus)))
        ]
    if not found:
        wanted = "a GPU" if cluster.gpus else f"{cluster.n_threads or 1} cores"
        raise ClusterError(f"no machine of the cluster has {wanted} for a worker")
    return tuple(found)


class _Hand:
    """A worker as it is seen from here: the actor, where it is, and what it is at."""

    def __init__(self, seat: Seat, actor: Any) -> None:
        self.seat, self.actor = seat, actor
        self.host = ""
        self.task: int | None = None
        self.since = time.monotonic()


class Crew(Generic[Task, Result]):
    """Workers, one in each seat; `heard` is told what goes wrong.

    What `open_worker` gives for a seat is called on the machine of the worker that sits there,
    where quantkit has to be installed too.
    """

    def __init__(
        self,
        cluster: Connected,
        open_worker: Callable[[Seat], Callable[[], Worker[Task, Result]]],
        heard: Callable[[str], None],
    ) -> None:
        ray = cluster.ray
        self._ray, self._heard, self._seats = ray, heard, cluster.seats
        self._desk = ray.remote(_Desk)
        self._openers = {seat: ray.put(open_worker(seat)) for seat in set(cluster.seats)}
        self._waited_for: dict[Any, _Hand] = {}  # by what will come of it
        self._idle: list[_Hand] = []
        self._proof: tuple[str, str] | None = None  # and whose it was
        self._never_began = 0
        self._durations: list[float] = []
        self._alone_until = time.monotonic() + _PATIENCE

    def results(
        self, tasks: Sequence[Task], named: Callable[[Task], str]
    ) -> Generator[tuple[int, Result], None, None]:
        """(index, result) of every task as they come in.

        Raises the error of a task, and `ClusterError` where three workers were lost on one task,
        or no worker can begin. All workers are dismissed in the end.
        """
        losses = [0] * len(tasks)
        todo, undone = deque(range(len(tasks))), set(range(len(tasks)))
        try:
            for seat in self._seats[: len(tasks)]:
                self._hire(seat)
            while undone:
                self._assign(tasks, todo, undone)
                done, _ = self._ray.wait(list(self._waited_for), num_returns=1, timeout=_TICK)
                self._say_if_alone()
                for ref in done:
                    hand = self._waited_for.pop(ref)
                    index, hand.task = hand.task, None
                    outcome = self._outcome(ref, hand, index)
                    if isinstance(outcome, _Lost) and index is not None:
                        losses[index] += 1
                        if losses[index] == _MOST_LOSSES:
                            raise _given_up(named(tasks[index]))
                        if index in undone and not self._at_work(index):
                            todo.appendleft(index)
                    elif index in undone:
                        undone.remove(index)
                        self._durations.append(time.monotonic() - hand.since)
                        yield index, outcome
        finally:
            for hand in [*self._idle, *self._waited_for.values()]:
                self._dismiss(hand)
            self._idle, self._waited_for = [], {}

    def _hire(self, seat: Seat) -> None:
        room = {"num_cpus": seat.n_cpus, "num_gpus": seat.n_gpus}
        actor = self._desk.options(**room, scheduling_strategy="SPREAD").remote(self._openers[seat])
        self._waited_for[actor.begin.remote()] = _Hand(seat, actor)

    def _dismiss(self, hand: _Hand) -> None:
        with suppress(Exception):  # of who is gone already
            self._ray.kill(hand.actor)

    def _assign(self, tasks: Sequence[Task], todo: deque[int], undone: set[int]) -> None:
        while self._idle:
            index = todo.popleft() if todo else self._slow_one(undone)
            if index is None:
                return
            hand = self._idle.pop()
            hand.task, hand.since = index, time.monotonic()
            self._waited_for[hand.actor.run.remote(tasks[index])] = hand

    def _slow_one(self, undone: set[int]) -> int | None:
        """The task that has taken longest, if only one is at it and it is far above the median."""
        at_work = [hand for hand in self._waited_for.values() if hand.task in undone]
        at_work.sort(key=lambda hand: hand.since)
        for hand in at_work:
            alone = self._at_work(hand.task) == 1
            usual = statistics.median(self._durations) if self._durations else _PATIENCE
            if alone and time.monotonic() - hand.since > max(_SLOW * usual, _TICK):
                return hand.task
        return None

    def _at_work(self, index: int | None) -> int:
        return sum(hand.task == index for hand in self._waited_for.values())

    def _outcome(self, ref: Any, hand: _Hand, index: int | None) -> Any:
        """What a worker sent, after which it is idle; `_Lost` where there is none any more."""
        try:
            outcome = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError:
            raise  # a bug, with the traceback of the worker
        except self._ray.exceptions.RayError as error:
            self._replace(hand, index, error)
            return _Lost()
        if isinstance(outcome, _Failed):
            outcome.error.where = ": ".join(filter(None, (outcome.host, outcome.error.where)))
            raise outcome.error
        if isinstance(outcome, _Ready):
            self._compare(outcome)
            hand.host = f"{outcome.host}, process {outcome.pid}"
            self._never_began = 0
        self._idle.append(hand)
        return outcome

    def _replace(self, hand: _Hand, index: int | None, error: Exception) -> None:
        self._dismiss(hand)
        if index is not None:
            self._heard(f"lost the worker on {hand.host}; what it was at is done again")
        else:
            self._never_began += 1
            if self._never_began == _MOST_LOSSES:
                raise ClusterError(
                    f"workers cannot begin: {_first_line(error)}",
                    hint="quantkit and Ray must be installed, in the same versions, everywhere",
                )
        self._hire(hand.seat)

    def _compare(self, ready: _Ready) -> None:
        who = f"{ready.host}, process {ready.pid}"
        if self._proof is None:
            self._proof = ready.proof, who
        elif self._proof[0] != ready.proof:
            raise ClusterError(
                f"would not do the same as the worker on {self._proof[1]}",
                where=who,
                hint="versions of quantkit or numba, or processors, differ: use machines alike",
            )

    def _say_if_alone(self) -> None:
        """Say once that no worker has found room for a while."""
        if self._proof is None and time.monotonic() > self._alone_until:
            self._alone_until = float("inf")
            seat = self._seats[0]
            wanted = f"{seat.n_cpus} cores" + (" and a GPU" if seat.n_gpus else "")
            self._heard(f"no worker yet: waiting for a machine with {wanted} free")


def _given_up(task: str) -> ClusterError:
    return ClusterError(
        f"{_MOST_LOSSES} workers were lost on it",
        where=task,
        hint="the system may have killed them for their memory: give --memory, or fewer --threads "
        "to each; the same command goes on",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return (named or lines or [type(error).__name__])[-1]
