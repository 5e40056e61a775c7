"""Converting with workers in other processes: the bytes of one process, whatever happens to them.

Real workers of a real Ray on this machine.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.errors import DeviceError, OutputError, SourceError, UsageError
from quantkit.pipeline import Job, Output, convert, on_cluster, planned
from quantkit.pipeline.calibration import Calibration, calibrate
from quantkit.pipeline.evaluation import Evaluation, evaluate
from quantkit.pipeline.opening import Reading, Running
from quantkit.pipeline.spread import spread_over
from quantkit.plan.build import Limits
from quantkit.run.cluster import Cluster, Connected, connected
from quantkit.run.events import Silent
from quantkit.write.verify import verify
from quantkit.write.writer import ShardWriter
from tests.localhub.hub import LocalHub

pytest.importorskip("ray")
IMATRIX = Path(__file__).parents[1] / "calibrate" / "tiny-kimi-k2.5.imatrix.gguf"
LIMIT = 4_000_000
_MARK = f"QUANTKIT_TEST_CLUSTER={os.getpid()}"  # in the environment of its processes


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    """In the environment before the workers start, for they inherit it."""
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv(*_MARK.split("="))
        yield hub


@pytest.fixture(scope="module")
def cluster(hub: LocalHub) -> Iterator[Connected]:
    with connected(Cluster(n_workers=2, n_threads=1)) as found:
        yield found


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the fixture is some sixty of them."""
    monkeypatch.setattr(on_cluster, "_RANGE_WEIGHTS", 150_000)


@pytest.fixture(scope="module")
def job(fixture_model: Path) -> Job:
    return Job(fixture_model, "q2_k", Limits(LIMIT), name="m", corpus=None, rounding="nearest")


@pytest.fixture(scope="module")
def alone(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    convert(job, Output(folder, 2), Silent())
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.gguf")}


def workers() -> list[int]:
    """Processes of this cluster, and of no other test's, that hold a worker."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if name.startswith(b"ray::_Desk") and _MARK.encode() in environment:
            found.append(int(path.name))
    return found


class Assassin(Silent):
    """Kills a worker as soon as something is done, and hears what is said of it."""

    def __init__(self, at: tuple[int, ...] = (1,)) -> None:
        self.n, self.at, self.warnings, self.killed = 0, at, [], 0

    def advance(self, n: float) -> None:
        self.n += 1
        if self.n in self.at:
            os.kill(workers()[0], signal.SIGKILL)
            self.killed += 1

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_workers_write_the_bytes_of_one_process(
    cluster: Connected, job: Job, alone: dict[str, str], tmp_path: Path
) -> None:
    convert(job, Output(tmp_path, 1, cluster=cluster), Silent())
    assert digests(tmp_path) == alone
    assert len(alone) > 2, "several shards"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_worker_that_is_killed_changes_nothing(
    cluster: Connected, job: Job, alone: dict[str, str], tmp_path: Path
) -> None:
    reporter = Assassin(at=(2, 9, 20))
    convert(job, Output(tmp_path, 1, cluster=cluster), reporter)
    assert reporter.killed == 3
    assert any("lost the worker" in text for text in reporter.warnings)
    assert digests(tmp_path) == alone
    for path in tmp_path.glob("*.gguf"):
        verify(path)


def test_a_store_stands_in_for_shared_files(
    cluster: Connected, job: Job, alone: dict[str, str], tmp_path: Path
) -> None:
    staging = tmp_path / "staging"
    output = Output(tmp_path / "out", 1, cluster=cluster, staging=staging.as_uri())
    with_imatrix = replace(job, imatrix=IMATRIX)
    convert(with_imatrix, output, Assassin(at=(3,)))
    convert(with_imatrix, Output(tmp_path / "alone", 2), Silent())
    assert digests(tmp_path / "out") == digests(tmp_path / "alone") != alone
    assert not [path for path in staging.rglob("*") if path.is_file()], "nothing stays there"


def test_a_store_of_no_known_kind_is_refused_before_anything_is_laid_out(
    cluster: Connected, job: Job, tmp_path: Path
) -> None:
    output = Output(tmp_path / "out", 1, cluster=cluster, staging="foo://bucket")
    with pytest.raises(UsageError, match="foo"):
        convert(job, output, Silent())
    assert not (tmp_path / "out").exists()


def test_bytes_that_change_in_the_store_are_not_taken(
    cluster: Connected, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(store: on_cluster.Store, name: str) -> bytes:
        data = bytearray(real(store, name))
        data[len(data) // 2] ^= 1
        return bytes(data)

    real = on_cluster.Store.get
    monkeypatch.setattr(on_cluster.Store, "get", spoiled)
    output = Output(tmp_path / "out", 1, cluster=cluster, staging=(tmp_path / "s").as_uri())
    with pytest.raises(OutputError, match="holds other bytes"):
        convert(job, output, Silent())
    assert not digests(tmp_path / "out")


def test_what_threads_began_workers_finish_and_the_other_way_round(
    cluster: Connected, job: Job, alone: dict[str, str], tmp_path: Path
) -> None:
    class Enough(Silent):
        def advance(self, n: float) -> None:
            raise KeyboardInterrupt

    for output in (Output(tmp_path, 1), Output(tmp_path, 1, cluster=cluster)) * 2:
        with pytest.raises(KeyboardInterrupt):
            convert(job, output, Enough())
    convert(job, Output(tmp_path, 1), Silent())
    assert digests(tmp_path) == alone


def test_an_output_that_workers_do_not_see_is_told(
    cluster: Connected, job: Job, tmp_path: Path
) -> None:
    class Elsewhere(ShardWriter):
        """Lays its files out where the workers do not look."""

        def __init__(self, folder: Path, plan: object, *, restart: bool = False) -> None:
            super().__init__(folder / "elsewhere", plan, restart=restart)  # type: ignore[arg-type]

    output = Output(tmp_path, 1, cluster=cluster, open_writer=Elsewhere)
    with pytest.raises(OutputError, match="seen by a worker") as caught:
        convert(job, output, Silent())
    assert "--staging" in caught.value.hint


def test_a_source_that_workers_see_otherwise_is_refused(
    cluster: Connected, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = on_cluster.Errand.__init__

    def other(self: on_cluster.Errand, *arguments: object, **keywords: object) -> None:
        real(self, *arguments, **keywords)  # type: ignore[arg-type]
        object.__setattr__(self, "fingerprint", "of another")

    monkeypatch.setattr(on_cluster.Errand, "__init__", other)
    with pytest.raises(SourceError, match="not what the plan was made of"):
        convert(job, Output(tmp_path, 1, cluster=cluster), Silent())


def test_workers_read_the_hub_at_the_commit_of_the_plan(
    cluster: Connected, hub: LocalHub, job: Job, alone: dict[str, str], tmp_path: Path
) -> None:
    from quantkit.hub.ref import HubRef
    from quantkit.hub.session import HubSession

    files = {path.name: path.read_bytes() for path in Path(job.model).iterdir() if path.is_file()}
    hub.add_repo("me/it", files)
    with HubSession(Silent(), tmp_path / "spool") as session:
        place = session.at(HubRef("me/it"))
        convert(replace(job, model=place), Output(tmp_path / "o", 1, cluster=cluster), Silent())
    assert {path.name for path in (tmp_path / "o").glob("*.gguf")} == set(alone)
    assert _data(tmp_path / "o") == _data_of(job, tmp_path)


def _data_of(job: Job, tmp_path: Path) -> dict[str, str]:
    convert(job, Output(tmp_path / "local", 2), Silent())
    return _data(tmp_path / "local")


def _data(folder: Path) -> dict[str, str]:
    """The digests of the tensors; what the metadata say of the source differs."""
    from quantkit.write.manifest import load_manifest

    manifests = [load_manifest(path) for path in folder.glob("*.manifest.json")]
    shards = [shard for manifest in manifests for shard in manifest.shards]
    return {tensor.name: tensor.sha256 for shard in shards for tensor in shard.tensors}


def test_a_gpu_that_fails_a_worker_is_one_clear_error(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with planned(job, Silent()) as (source, decided):
        plan, fingerprint = decided.plans[-1], source.fingerprint()
        how = decided.how
    ShardWriter(tmp_path, plan).close()
    errand = on_cluster.Errand(plan, Path(job.model), fingerprint, how, tmp_path, device="cpu:0")
    worker = errand.opened()
    monkeypatch.setattr(on_cluster, "encode_tile", failing)
    with pytest.raises(DeviceError, match="out of memory"):
        worker.run(on_cluster.TileRange(((0, 0, 1),)))
    worker.close()


class Watch(Silent):
    """Kills the workers when one has begun with a share of the text below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.warnings: list[str] = []
        self._folder = folder
        threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        while not list(self._folder.rglob("share-*")):
            time.sleep(0.01)
        for pid in workers():
            os.kill(pid, signal.SIGKILL)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the workers have: products of several threads may end in other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_calibration_is_shared_and_a_killed_worker_changes_nothing(
    cluster: Connected, fixture_model: Path, tmp_path: Path
) -> None:
    job = Calibration(fixture_model, Reading("core", 1024, 64), Running("cpu"), span_tokens=256)
    (tmp_path / "two").mkdir()
    watch = Watch(tmp_path / "two")
    spread = spread_over(cluster, watch)
    calibrate(job, tmp_path / "two" / "m.gguf", watch, spread=spread)
    calibrate(job, tmp_path / "m.gguf", Silent())
    assert (tmp_path / "two" / "m.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert any("lost the worker" in text for text in watch.warnings)


@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_is_shared_and_a_killed_worker_changes_nothing(
    cluster: Connected, job: Job, fixture_model: Path, tmp_path: Path
) -> None:
    convert(replace(job, limits=Limits()), Output(tmp_path, 1), Silent())
    quant = tmp_path / "m-Q2_K.gguf"
    reading, running = Reading("core", 1024, 64), Running("cpu")
    asked = Evaluation(fixture_model, (quant,), reading, running, span_tokens=256)
    watch = Watch(tmp_path / "two")
    report = evaluate(asked, tmp_path / "two", watch, spread=spread_over(cluster, watch))
    assert report == evaluate(asked, tmp_path / "one", Silent())
    assert any("lost the worker" in text for text in watch.warnings)


def command(fixture_model: Path, folder: Path) -> list[str]:
    job = [str(fixture_model), "-r", "q2_k", "--no-imatrix", "--rounding", "nearest"]
    run = ["--executor", "ray", "--workers", "2", "--json", "-o", str(folder)]
    return [sys.executable, "-m", "quantkit", "convert", *job, *run]


def test_the_command_starts_a_cluster_of_its_own_and_leaves_nothing_of_it(
    fixture_model: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"QUANTKIT_TEST": str(tmp_path)}
    done = subprocess.run(
        command(fixture_model, tmp_path),
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "2 workers of" in done.stdout
    assert done.stderr == ""
    deadline = time.monotonic() + 30
    while _processes_with(f"QUANTKIT_TEST={tmp_path}"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_sigterm_ends_the_command_as_it_ends_any_and_it_can_go_on(
    fixture_model: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"QUANTKIT_TEST": str(tmp_path)}
    process = subprocess.Popen(
        command(fixture_model, tmp_path), stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout
    while "cluster" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    deadline = time.monotonic() + 30
    while _processes_with(f"QUANTKIT_TEST={tmp_path}"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not list(tmp_path.glob("*Q2_K*.gguf"))
    subprocess.run(command(fixture_model, tmp_path), check=True, capture_output=True)
    assert list(tmp_path.glob("*Q2_K*.gguf"))


def _processes_with(variable: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found


_TWO_MACHINES = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster as Machines
from quantkit.pipeline import Job, Output, convert, on_cluster, planned
from quantkit.run.cluster import Cluster, connected
from quantkit.run.events import Silent

room = {"num_cpus": 1, "object_store_memory": 80 << 20}
machines = Machines(initialize_head=True, head_node_args=room | {"include_dashboard": False})
other = machines.add_node(**room)
ray.init(address=machines.address, log_to_driver=False)
on_cluster._RANGE_WEIGHTS = 150_000


class Power(Silent):
    n = 0

    def advance(self, n):
        Power.n += 1
        if Power.n == 5:
            machines.remove_node(other, allow_graceful=False)

    def warn(self, text):
        print(text)


job = Job(Path(sys.argv[1]), "q2_k", name="m", corpus=None, rounding="nearest")
with connected(Cluster()) as cluster:
    print(cluster)
    convert(job, Output(Path(sys.argv[2]), 1, cluster=cluster), Power())
"""


@pytest.mark.slow
def test_a_machine_that_is_lost_changes_nothing(
    job: Job, fixture_model: Path, tmp_path: Path
) -> None:
    """Two machines are two Ray nodes here; one of them is killed with all that is on it."""
    arguments = [_TWO_MACHINES, str(fixture_model), str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    assert "2 workers of 1 core" in done.stdout
    assert "lost the worker" in done.stdout
    convert(replace(job, limits=Limits()), Output(tmp_path / "one", 2), Silent())
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
