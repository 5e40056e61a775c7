"""`--memory` is kept to, and changes nothing in the files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import make_wide_layer
import pytest

from quantkit.errors import UsageError
from quantkit.pipeline import Job, Output, convert, planned
from quantkit.plan.memory import fit, hidden_states
from quantkit.quantize.codec import How
from quantkit.run.events import Silent

MB = 10**6
PROGRAM = 512 << 20  # what a run may take beside its budget
CGROUP = Path("/sys/fs/cgroup/memory")
GROUP = CGROUP / f"quantkit-test-{os.getpid()}"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.gguf"))}


@pytest.fixture(scope="module")
def job(fixture_model):
    return Job(fixture_model, "ud-q2_k_xl", name="m", corpus=None, rounding="nearest")


def test_the_bytes_are_the_same_for_every_budget(job, tmp_path):
    made = []
    for memory, n_threads in ((None, 2), (8 * MB, 1), (9 * MB, 3), (1000 * MB, 2)):
        folder = tmp_path / f"{memory}-{n_threads}"
        convert(job, Output(folder, n_threads, memory=memory), Silent())
        made.append(files(folder))
    assert all(other == made[0] for other in made[1:])


def test_an_unfinished_run_goes_on_with_another_budget(job, tmp_path):
    class StopError(Exception):
        pass

    class Impatient(Silent):
        def __init__(self):
            self.n = 0

        def advance(self, n):
            self.n += 1
            if self.n == 30:
                raise StopError

    convert(job, Output(tmp_path / "whole", 2), Silent())
    with pytest.raises(StopError):
        convert(job, Output(tmp_path / "cut", 2), Impatient())
    convert(job, Output(tmp_path / "cut", 1, memory=8 * MB), Silent())
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_no_tile_fits_is_refused_before_anything_is_written(job, tmp_path):
    with pytest.raises(UsageError, match="too little") as refused:
        convert(job, Output(tmp_path / "out", 2, memory=1 * MB), Silent())
    assert not (tmp_path / "out").exists()
    enough = int(re.search(r"--memory (\d+)MB", refused.value.hint)[1]) * MB
    convert(job, Output(tmp_path / "out", 2, memory=enough), Silent())


def test_more_threads_than_fit_get_smaller_strips_and_then_wait(job):
    with planned(job, Silent()) as (_, decided):
        plans = decided.plans
        alone = fit(plans, How(), 1, None)
        assert alone.strip_weights is None
        assert fit(plans, How(), 63, None).n_bytes == 32 * alone.n_bytes
        tight = fit(plans, How(), 63, alone.n_bytes)
        assert tight.strip_weights is not None
        assert tight.n_bytes <= alone.n_bytes
        assert (
            max(tight.of_tile(tensor) for plan in plans for tensor in plan.tensors) <= tight.n_bytes
        )


def test_feedback_is_refused_what_its_moments_do_not_fit(job):
    with planned(job, Silent()) as (_, decided):
        plan = decided.plans[-1]
        with pytest.raises(UsageError, match="rounding with feedback takes"):
            hidden_states(plan, 50 * MB)
        assert hidden_states(plan, 1000 * MB) - hidden_states(plan, 900 * MB) == 100 * MB


def rss_anon(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two layers of Kimi's width with four experts: 0.5 G weights, five times any budget here."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    make_wide_layer.make(
        folder, n_routed_experts=4, vocab_size=2048, intermediate_size=2048, q_lora_rank=256
    )
    return folder


@pytest.fixture
def in_group():
    """Starts a command in a control group with a limit of memory; skips where none can be made."""
    try:
        GROUP.mkdir()
        limit = GROUP / "memory.limit_in_bytes"
        limit.write_text(str(PROGRAM))
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made: {error.strerror}")

    def start(n_bytes: int, *command: str) -> subprocess.Popen[bytes]:
        limit.write_text(str(n_bytes))

        def join() -> None:
            (GROUP / "cgroup.procs").write_text(str(os.getpid()))

        return subprocess.Popen(command, preexec_fn=join)  # noqa: PLW1509 - no threads here

    yield start
    for _ in range(50):
        try:
            GROUP.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_promise_holds_in_a_control_group(wide, tmp_path, in_group):
    greedy = in_group(PROGRAM, sys.executable, "-c", "bytearray(10**9).count(1)")
    assert greedy.wait(120) == -9  # the limit is one

    budget, peak = 64 * MB, 0
    run = in_group(
        budget + PROGRAM,
        *(sys.executable, "-m", "quantkit", "convert", str(wide), "-r", "ud-iq2_xxs", "-o"),
        *(str(tmp_path), "-t", "2", "--memory", "64MB", "--rounding", "nearest"),
        *("--no-imatrix", "--quiet"),
    )
    while run.poll() is None:
        peak = max(peak, rss_anon(run.pid))
        time.sleep(0.01)
    assert run.returncode == 0
    assert 0 < peak <= budget + PROGRAM
    assert sum(path.stat().st_size for path in tmp_path.glob("*.gguf")) > 100 * MB
