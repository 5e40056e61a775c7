"""What a reboot costs, and what another layout does; `tests/faults` kills at every call."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from quantkit.errors import OutputError
from quantkit.pipeline import Job, Output, convert, planned
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from quantkit.write.shards import tile_span

LIMIT = 6_000_000


class PowerCut(BaseException):
    """What nothing in the program catches."""


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.gguf")}


def run(model, folder, **options):
    job = Job(model, "q4_x", Limits(LIMIT), name="m")
    convert(job, Output(folder, 2, **options), Silent())


@pytest.fixture
def dying(monkeypatch):
    """dying(call, n, error): the n-th call of os.<call> from now on raises `error`."""

    def arrange(call: str, n: int, error: BaseException, *, after: bool = False) -> list[int]:
        real = getattr(os, call)
        count = [0]

        def wrapped(*arguments, **keywords):
            count[0] += 1
            if count[0] == n and not after:
                raise error
            result = real(*arguments, **keywords)
            if count[0] == n:
                raise error
            return result

        monkeypatch.setattr(os, call, wrapped)
        return count

    yield arrange
    monkeypatch.undo()


def test_an_unfinished_run_of_another_layout_is_refused_unless_restarted(
    converted, fixture_model, tmp_path, dying, monkeypatch
):
    dying("pwrite", 100, PowerCut())
    with pytest.raises(PowerCut):
        run(fixture_model, tmp_path)
    monkeypatch.undo()
    other = Job(fixture_model, "q4_x", Limits(None), name="m")
    with pytest.raises(OutputError, match="--restart"):
        convert(other, Output(tmp_path, 2), Silent())
    convert(other, Output(tmp_path, 2, restart=True), Silent())
    assert digests(tmp_path)["m-Q4_X.gguf"] == digests(converted("q4_x"))["m-Q4_X.gguf"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_reboot_costs_what_was_not_flushed_and_nothing_else(
    converted, fixture_model, tmp_path, dying, monkeypatch
):
    monkeypatch.setattr("quantkit.write.writer._SYNC_BYTES", 4_000_000)
    dying("pwrite", 150, PowerCut())
    with pytest.raises(PowerCut):
        run(fixture_model, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("quantkit.run.journal._boot_id", lambda: "another boot")
    (journal,) = tmp_path.glob(".*.journal")
    lines = journal.read_text().splitlines()
    last_sync = max(n for n, line in enumerate(lines) if line == "sync")
    flushed = max(n for n, line in enumerate(lines[:last_sync]) if line == "flush")
    unflushed = [line.split()[1:3] for line in lines[flushed:] if line.startswith("tile")]
    assert unflushed
    for path in tmp_path.glob("m-*.partial"):  # the lost tiles hold anything
        sure = [line.split() for line in lines[:flushed] if line.startswith("tile")]
        spoil(path, fixture_model, {(int(t), int(n)) for _, t, n, _ in sure})
    run(fixture_model, tmp_path)
    assert digests(tmp_path) == digests(converted("q4_x", LIMIT))


def spoil(path, model, keep):
    """Overwrite every tile of a partial file but those to keep."""
    with planned(Job(model, "q4_x", Limits(LIMIT), name="m"), Silent()) as (_, decided):
        plan = decided.plans[-1]
    number = [shard.file for shard in plan.shards].index(path.name.removesuffix(".partial"))
    with path.open("r+b") as file:
        for t, tensor in enumerate(plan.tensors):
            for n in range(tensor.n_tiles):
                if tensor.shard == number and (t, n) not in keep:
                    begin, n_bytes = tile_span(tensor, n)
                    file.seek(begin)
                    file.write(b"\xa5" * n_bytes)


def test_a_signal_that_falls_into_code_made_from_a_string_ends_with_the_same_code(tmp_path):
    (tmp_path / "program.py").write_text("""
import os, signal, time
import quantkit.cli
def interrupted(**options):
    exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(1)")
quantkit.cli.cli.main = interrupted
quantkit.cli.main()
""")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-m", "program"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 130, run.stderr
    assert "run the same command again" in run.stderr
