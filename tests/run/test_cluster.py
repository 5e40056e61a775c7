"""Workers in other processes: what becomes of a task whose worker dies, fails, dawdles or differs.

Real workers of a real Ray on this machine.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from quantkit.errors import ClusterError, NonFiniteError
from quantkit.run.cluster import Cluster, Connected, Crew, Seat, connected

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Connected]:
    with connected(Cluster(n_workers=2, n_threads=1)) as found:
        yield found


@dataclass
class Scribe:
    """Does what a task says; `folder` is where it leaves word of it."""

    folder: Path
    proof: str = "alike"

    def run(self, task: str) -> str:
        does, _, name = task.partition(" ")
        mark = self.folder / f"{name}.{os.getpid()}"
        first = not list(self.folder.glob(f"{name}.*"))
        mark.touch()
        if (does == "die-once" and first) or does == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if does == "dawdle-once" and first:
            time.sleep(120)
        while does == "meet" and len({path.suffix for path in self.folder.iterdir()}) < 2:
            time.sleep(0.05)
        if does == "fail":
            raise NonFiniteError("nan in column 3", where=name, hint="mend it")
        if does == "bug":
            raise KeyError(name)
        return f"{name} done"


def crew(
    cluster: Connected, folder: Path, open_worker: Callable[[], Scribe] | None = None
) -> tuple[Crew[str, str], list[str]]:
    heard: list[str] = []
    return Crew(cluster, lambda seat: open_worker or partial(Scribe, folder), heard.append), heard


def all_of(crew: Crew[str, str], tasks: list[str]) -> dict[str, str]:
    return {tasks[index]: result for index, result in crew.results(tasks, str)}


def test_every_task_is_done_once_and_its_result_comes_with_its_index(
    cluster: Connected, tmp_path: Path
) -> None:
    workers, heard = crew(cluster, tmp_path)
    tasks = [f"do task{n}" for n in range(20)]
    results = list(workers.results(tasks, str))
    assert sorted(results) == [(n, f"task{n} done") for n in range(20)]
    assert len(list(tmp_path.iterdir())) == 20
    assert heard == []


def test_workers_are_at_different_tasks_at_a_time(cluster: Connected, tmp_path: Path) -> None:
    workers, _ = crew(cluster, tmp_path)
    assert len(all_of(workers, ["meet a", "meet b"])) == 2


def test_what_a_killed_worker_was_at_is_done_by_another(cluster: Connected, tmp_path: Path) -> None:
    workers, heard = crew(cluster, tmp_path)
    tasks = ["do a", "die-once b", "do c", "do d"]
    assert all_of(workers, tasks) == {task: f"{task[-1]} done" for task in tasks}
    assert len(list(tmp_path.glob("b.*"))) == 2
    assert len(heard) == 1 and "lost the worker" in heard[0]


def test_a_task_that_kills_three_workers_is_given_up_by_name(
    cluster: Connected, tmp_path: Path
) -> None:
    workers, _ = crew(cluster, tmp_path)
    with pytest.raises(ClusterError, match="die b: 3 workers were lost"):
        all_of(workers, ["do a", "die b"])
    assert len(list(tmp_path.glob("b.*"))) == 3


def test_an_error_of_a_task_comes_back_as_it_is_with_the_machine(
    cluster: Connected, tmp_path: Path
) -> None:
    workers, _ = crew(cluster, tmp_path)
    with pytest.raises(NonFiniteError, match="nan in column 3") as caught:
        all_of(workers, ["do a", "fail blk.3", "do c"])
    assert caught.value.where == f"{os.uname().nodename}: blk.3"
    assert caught.value.hint == "mend it"


def test_a_bug_in_a_worker_keeps_its_traceback(cluster: Connected, tmp_path: Path) -> None:
    workers, _ = crew(cluster, tmp_path)
    with pytest.raises(KeyError, match=r"raise KeyError\(name\)"):
        all_of(workers, ["bug a"])


def test_an_idle_worker_does_what_another_is_slow_at(cluster: Connected, tmp_path: Path) -> None:
    workers, _ = crew(cluster, tmp_path)
    begun = time.monotonic()
    tasks = ["dawdle-once a", *[f"do task{n}" for n in range(5)]]
    assert len(all_of(workers, tasks)) == len(tasks)
    assert time.monotonic() - begun < 60
    assert len(list(tmp_path.glob("a.*"))) == 2


def test_workers_that_would_not_do_the_same_are_refused(cluster: Connected, tmp_path: Path) -> None:
    def unlike() -> Scribe:
        return Scribe(tmp_path, proof=str(os.getpid()))

    workers, _ = crew(cluster, tmp_path, unlike)
    with pytest.raises(ClusterError, match="would not do the same"):
        all_of(workers, [f"dawdle-once task{n}" for n in range(2)])


def test_workers_that_cannot_begin_are_not_hired_for_ever(
    cluster: Connected, tmp_path: Path
) -> None:
    def dying() -> Scribe:
        os._exit(1)

    workers, _ = crew(cluster, tmp_path, dying)
    with pytest.raises(ClusterError, match="workers cannot begin"):
        all_of(workers, ["do a"])


def test_an_error_at_the_opening_of_a_worker_is_told(cluster: Connected, tmp_path: Path) -> None:
    def refusing() -> Scribe:
        raise NonFiniteError("no such source", where="model")

    workers, _ = crew(cluster, tmp_path, refusing)
    with pytest.raises(NonFiniteError, match="no such source"):
        all_of(workers, ["do a"])


def test_whoever_leaves_early_dismisses_all_workers(cluster: Connected, tmp_path: Path) -> None:
    workers, _ = crew(cluster, tmp_path)
    results = workers.results(["do a", "dawdle-once b"], str)
    assert next(results) == (0, "a done")
    results.close()
    pids = {int(path.suffix[1:]) for path in tmp_path.iterdir()}
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:9", "127.0.0.1:9"])
def test_a_cluster_that_is_not_there_is_told_at_once(address: str, monkeypatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    begun = time.monotonic()
    with pytest.raises(ClusterError, match="cannot be reached"), connected(Cluster(address)):
        pass
    assert time.monotonic() - begun < 15


def nodes(*resources: dict[str, float]) -> Connected:
    class Ray:
        __version__ = "2"

        @staticmethod
        def nodes() -> list[dict[str, object]]:
            return [{"Alive": True, "Resources": one} for one in resources]

    return Ray


@pytest.mark.parametrize(
    ("cluster", "machines", "expected"),
    [
        (Cluster(), [{"CPU": 8}, {"CPU": 4}], [Seat(8), Seat(4)]),
        (Cluster(n_threads=4), [{"CPU": 8}, {"CPU": 4}], [Seat(4)] * 3),
        (Cluster(n_workers=3), [{"CPU": 8}, {"CPU": 4}], [Seat(4)] * 3),
        (Cluster(n_workers=1), [{"CPU": 8}, {"CPU": 4}], [Seat(8)]),
        (Cluster(n_workers=2, n_threads=3), [{"CPU": 8}], [Seat(3)] * 2),
        (Cluster(gpus=True), [{"CPU": 16, "GPU": 4}, {"CPU": 8}], [Seat(4, 1)] * 4),
        (Cluster(n_workers=2, gpus=True), [{"CPU": 16, "GPU": 4}], [Seat(4, 1)] * 2),
    ],
)
def test_workers_share_the_cores_and_cards_of_all_machines(
    cluster: Cluster, machines: list[dict[str, float]], expected: list[Seat]
) -> None:
    from quantkit.run.cluster import _seats

    assert list(_seats(nodes(*machines), cluster)) == expected


def test_a_cluster_without_room_is_refused() -> None:
    from quantkit.run.cluster import _seats

    with pytest.raises(ClusterError, match="no machine of the cluster has a GPU"):
        _seats(nodes({"CPU": 8}), Cluster(gpus=True))
    with pytest.raises(ClusterError, match="has 16 cores"):
        _seats(nodes({"CPU": 8}), Cluster(n_threads=16))
