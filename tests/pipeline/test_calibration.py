"""`quantkit calibrate`: the same bytes however often it dies, and no word more than is true."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.calibrate.imatrix import read_imatrix
from quantkit.errors import OutputError, UsageError
from quantkit.pipeline.calibration import Calibration, calibrate, tokens_beside
from quantkit.pipeline.opening import Reading
from quantkit.run import fs
from quantkit.run.events import Silent
from quantkit.text.tokens import load_tokens

BUDGET, N_CTX = 256, 64
DONE = ["m.gguf", "m.tokens.safetensors"]


class PowerCut(BaseException):
    """What nothing in the program catches."""


class Told(Silent):
    """Keeps the lines."""

    def __init__(self):
        self.lines = {}

    def stage(self, name, detail):
        self.lines[name] = detail


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(model: Path, folder: Path, *, budget: int = BUDGET, **options) -> dict[str, str]:
    told = Told()
    job = Calibration(model, Reading("core", budget, N_CTX))
    calibrate(job, folder / "m.gguf", told, **options)
    return told.lines


@pytest.fixture(scope="module")
def undisturbed(fixture_model, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    lines = run(fixture_model, folder)
    assert "resume" not in lines
    assert sorted(os.listdir(folder)) == DONE
    return (folder / "m.gguf").read_bytes()


def command(model: Path, output: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "quantkit", "calibrate", str(model), "--corpus", "core"),
        *("--budget", str(BUDGET), "-c", str(N_CTX), "-t", "1", "-o", str(output), *more),
    ]


def test_a_result_is_not_made_twice_nor_overwritten_by_another(
    fixture_model, undisturbed, tmp_path
):
    (tmp_path / "m.gguf").write_bytes(undisturbed)
    (tmp_path / "m.gguf.work").mkdir()
    (tmp_path / "m.gguf.work" / "sweep.state").write_bytes(b"of a run killed at the very end")
    assert "nothing to do" in run(fixture_model, tmp_path)["measure"]
    assert os.listdir(tmp_path) == ["m.gguf"]
    with pytest.raises(UsageError, match="made of another model, text or setting") as caught:
        run(fixture_model, tmp_path, budget=BUDGET - N_CTX)
    assert "--force" in caught.value.hint
    assert (tmp_path / "m.gguf").read_bytes() == undisturbed
    run(fixture_model, tmp_path, budget=BUDGET - N_CTX, force=True)
    assert read_imatrix(tmp_path / "m.gguf").n_tokens == BUDGET - N_CTX


def test_the_result_names_its_text_and_keeps_its_tokens(fixture_model, undisturbed, tmp_path):
    (tmp_path / "m.gguf").write_bytes(undisturbed)
    stats = read_imatrix(tmp_path / "m.gguf")
    assert (stats.chunk_size, stats.n_chunks, stats.datasets) == (N_CTX, BUDGET // N_CTX, ("core",))
    run(fixture_model, tmp_path, force=True)
    tokens = load_tokens(tokens_beside(tmp_path / "m.gguf"))
    assert len(tokens.ids) == BUDGET
    assert stats.kvs["quantkit.calibration.tokens"].value == tokens.digest


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_dying_around_every_flush_and_rename(
    fixture_model, undisturbed, tmp_path, monkeypatch, call
):
    target = os if call == "fsync" else Path
    real = getattr(target, call)
    resumed = 0
    for n in (1, 4, 7, 12):
        for after in (False, True)[: 2 if call == "replace" else 1]:
            folder = tmp_path / f"{n}-{after}"
            folder.mkdir()
            left = [n]

            def dying(*args, left=left, after=after):
                left[0] -= 1
                if left[0] == 0 and not after:
                    raise PowerCut
                result = real(*args)
                if left[0] == 0:
                    raise PowerCut
                return result

            monkeypatch.setattr(target, call, dying)
            try:
                run(fixture_model, folder)
            except PowerCut:
                if (folder / "m.gguf").exists():
                    assert (folder / "m.gguf").read_bytes() == undisturbed
            monkeypatch.undo()
            resumed += "resume" in run(fixture_model, folder)
            assert (folder / "m.gguf").read_bytes() == undisturbed
            assert sorted(os.listdir(folder)) == DONE
    assert resumed >= 2


def test_another_run_in_between_is_not_mixed_in(fixture_model, undisturbed, tmp_path, monkeypatch):
    for budget, n in ((BUDGET, 4), (BUDGET - N_CTX, 1)):  # the second dies before its first save
        with monkeypatch.context() as patched:
            die_at_save(patched, n)
            with pytest.raises(PowerCut):
                run(fixture_model, tmp_path, budget=budget)
    assert "resume" in run(fixture_model, tmp_path)
    assert (tmp_path / "m.gguf").read_bytes() == undisturbed
    assert sorted(os.listdir(tmp_path)) == DONE


def die_at_save(monkeypatch, n: int) -> None:
    """Die where the state behind the n-th layer would be saved, or at the next part after it."""
    from quantkit.forward.sweep import Sweep

    real, left = Sweep._save, [n]

    def save(self, next_layer):
        left[0] -= 1
        if left[0] <= 0:
            raise PowerCut
        real(self, next_layer)

    monkeypatch.setattr(Sweep, "_save", save)


def test_a_state_without_its_layers_is_refused_with_what_to_do(
    fixture_model, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        die_at_save(patched, 2)
        with pytest.raises(PowerCut):
            run(fixture_model, tmp_path)
    work = tmp_path / "m.gguf.work"
    for part in work.glob("part-*"):
        part.unlink()
    with pytest.raises(OutputError, match="lacks this file") as caught:
        run(fixture_model, tmp_path)
    assert str(work) in caught.value.hint


def test_two_runs_at_a_time_do_not_write_the_same_files(fixture_model, undisturbed, tmp_path):
    with fs.claimed(tmp_path / "m.gguf.work"):
        with pytest.raises(OutputError, match="another run"):
            run(fixture_model, tmp_path)
        (tmp_path / "m.gguf").write_bytes(undisturbed)
        with pytest.raises(OutputError, match="another run"):
            run(fixture_model, tmp_path)


def test_saved_tokens_give_the_same_result_and_are_not_cut(fixture_model, undisturbed, tmp_path):
    run(fixture_model, tmp_path)
    saved = tokens_beside(tmp_path / "m.gguf").rename(tmp_path / "saved.safetensors")
    job = Calibration(fixture_model, Reading(str(saved), None, N_CTX))
    calibrate(job, tmp_path / "again.gguf", Silent())
    assert (tmp_path / "again.gguf").read_bytes() == undisturbed
    with pytest.raises(UsageError, match="taken whole"):
        calibrate(
            replace(job, reading=replace(job.reading, budget=64)), tmp_path / "b.gguf", Silent()
        )


@pytest.mark.parametrize("n", [1, 4, 9, 40])
def test_a_full_disk_is_told_and_the_run_goes_on_later(
    fixture_model, undisturbed, tmp_path, monkeypatch, n
):
    real, count = os.pwrite, [0]

    def full(*args):
        count[0] += 1
        if count[0] >= n:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="no space left") as caught:
        run(fixture_model, tmp_path)
    assert "continues where it stopped" in caught.value.hint
    monkeypatch.undo()
    run(fixture_model, tmp_path)
    assert (tmp_path / "m.gguf").read_bytes() == undisturbed
    assert sorted(os.listdir(tmp_path)) == DONE


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)],
    ids=["kill", "interrupt"],
)
def test_a_process_that_is_stopped_in_the_middle_is_continued(
    fixture_model, undisturbed, tmp_path, number, code
):
    output = tmp_path / "m.gguf"
    process = subprocess.Popen(
        command(fixture_model, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not list(tmp_path.glob("m.gguf.work/part-*")) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert said.splitlines()[-1] == "interrupted; run the same command again to continue"
    assert not output.exists()
    again = subprocess.run(
        command(fixture_model, output, "--json"), check=True, capture_output=True, text=True
    )
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert events[0]["detail"].startswith("core: 256 tokens, 4 chunks of 64")
    assert [e["name"] for e in events if e["event"] == "stage"][-2:] == ["measure", "experts"]
    assert "more text" in events[-1]["text"], "256 tokens do not reach all experts"
    assert output.read_bytes() == undisturbed
    assert sorted(os.listdir(tmp_path)) == DONE
