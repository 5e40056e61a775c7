"""Text shared among processes: the files are those of one process, byte for byte, whatever happens
on the way."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from quantkit.calibrate.imatrix import read_imatrix
from quantkit.cli import cli
from quantkit.errors import OutputError, SourceError, UsageError
from quantkit.evaluate.logits_file import BaseFile
from quantkit.forward.spans import shares
from quantkit.pipeline import Job, Output, convert
from quantkit.pipeline.calibration import Calibration, calibrate
from quantkit.pipeline.evaluation import Evaluation, evaluate, write_base
from quantkit.pipeline.opening import Reading, Running
from quantkit.pipeline.shared import in_turn
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from tests.pipeline.conftest import FIXTURE

N_CTX, N_CHUNKS, SPAN = 32, 11, 96  # three chunks to a span, two in the last
N_SPANS = 4
READING = Reading("core", N_CTX * N_CHUNKS, N_CTX)
DENSE = "llama"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["tiny-kimi-k2.5", DENSE])
def model(request, tmp_path_factory) -> Path:
    if request.param != DENSE:
        return FIXTURE
    from make_hf_checkpoint import make

    folder = tmp_path_factory.mktemp("dense") / DENSE
    make(DENSE, folder)
    return folder


@pytest.fixture(scope="module")
def quants(model, tmp_path_factory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("quants")
    job = Job(model, "q4_0", Limits(), name="m", mmproj=None, corpus=None)
    convert(job, Output(folder, 1), Silent())
    return (folder / "m-Q4_0.gguf",)


def calibration(model: Path, **options) -> Calibration:
    return Calibration(model, READING, span_tokens=SPAN, **options)


def evaluation(model: Path, quants, **options) -> Evaluation:
    return Evaluation(model, tuple(quants), READING, span_tokens=SPAN, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    calibrate(calibration(model), folder / "m.gguf", Silent())
    return files_of(folder)


@pytest.fixture(scope="module")
def report(model, quants, tmp_path_factory) -> str:
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("alone") / "work"
    return json.dumps(evaluate(evaluation(model, quants), work, Silent()))


class Told(Silent):
    def __init__(self):
        self.total, self.done = 0, 0.0

    def begin(self, title, total, n_done, unit="bytes"):
        self.total = total

    def advance(self, n):
        self.done += n


class CrashError(BaseException):
    """What nothing in the program catches."""


def by_pickle(n_workers: int, spoil=lambda job: job):
    """As `in_turn`, every share by a worker of its own that knows the job by pickle alone."""

    def spread(job, n_spans):
        assert n_spans == N_SPANS
        cut = shares(n_spans, n_workers)
        for share in reversed(cut):  # whoever is first to finish
            worker = pickle.loads(pickle.dumps(spoil(job))).opened()  # noqa: S301 - as Ray does
            worker.run(share)
            worker.close()
            yield share

    return spread


@pytest.mark.parametrize("n_workers", [1, 2, 3, 9])
def test_statistics_are_the_same_bytes_for_any_number_of_workers(
    model, calibrated, tmp_path, n_workers
):
    told = Told()
    calibrate(calibration(model), tmp_path / "m.gguf", told, spread=by_pickle(n_workers))
    assert files_of(tmp_path) == calibrated
    assert sorted(os.listdir(tmp_path)) == sorted(calibrated), "nothing else is left"
    assert told.done == pytest.approx(told.total) == N_CTX * N_CHUNKS


@pytest.mark.parametrize("n_workers", [3, 9])
def test_a_report_is_the_same_for_any_number_of_workers(model, quants, report, tmp_path, n_workers):
    told, work = Told(), tmp_path / "work"
    shared = evaluate(evaluation(model, quants), work, told, spread=by_pickle(n_workers))
    assert json.dumps(shared) == report
    assert os.listdir(tmp_path) == []
    assert told.done == pytest.approx(told.total) == N_CTX * N_CHUNKS


def test_the_text_is_several_spans_which_do_not_change_what_is_measured(
    model, calibrated, tmp_path
):
    """Sums of one span and of four are those of the same tokens."""
    calibrate(replace(calibration(model), span_tokens=10**6), tmp_path / "m.gguf", Silent())
    one = read_imatrix(tmp_path / "m.gguf")
    (tmp_path / "many.gguf").write_bytes(calibrated["m.gguf"])
    many = read_imatrix(tmp_path / "many.gguf")
    assert one.sums.keys() == many.sums.keys()
    for name in one.sums:
        ours, theirs = one.sums[name], many.sums[name]
        if "_exps" not in name:  # a token near a tie may be routed otherwise
            assert (ours.counts == theirs.counts).all()
            assert ours.sum2 == pytest.approx(theirs.sum2, rel=1e-3, abs=1e-6)
        assert ours.counts.sum() == theirs.counts.sum()


def dies(monkeypatch, target: str, n: int) -> None:
    """Die at the n-th call of a function."""
    from importlib import import_module

    module, name = target.rsplit(".", 1)
    real, left = getattr(import_module(module), name), [n]

    def dying(*args):
        left[0] -= 1
        if left[0] == 0:
            raise CrashError
        return real(*args)

    monkeypatch.setattr(target, dying)


@pytest.mark.parametrize("n", [2, 9])
def test_a_calibration_that_is_killed_in_a_share_goes_on(
    model, calibrated, tmp_path, monkeypatch, n
):
    monkeypatch.setattr("quantkit.forward.sweep._SHARE", 1e9)
    with monkeypatch.context() as patched:
        dies(patched, "quantkit.calibrate.measure.hand_over", n)
        with pytest.raises(CrashError):
            calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=in_turn(2))
    assert (tmp_path / "m.gguf.work").exists()
    calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=in_turn(2))
    assert files_of(tmp_path) == calibrated
    assert sorted(os.listdir(tmp_path)) == sorted(calibrated)


def test_what_another_number_of_workers_left_is_not_done_again(
    model, calibrated, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        dies(patched, "quantkit.pipeline.calibration.merge_shares", 1)
        with pytest.raises(CrashError):
            calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=in_turn(4))
    dies(monkeypatch, "quantkit.calibrate.measure._pass", 1)
    calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=in_turn(3))
    assert files_of(tmp_path) == calibrated


def test_one_process_takes_over_from_many_that_were_killed(
    model, calibrated, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        dies(patched, "quantkit.calibrate.measure.hand_over", 3)
        with pytest.raises(CrashError):
            calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=in_turn(2))
    calibrate(calibration(model), tmp_path / "m.gguf", Silent())
    assert files_of(tmp_path) == calibrated
    assert sorted(os.listdir(tmp_path)) == sorted(calibrated)


@pytest.mark.parametrize("n", [1, 4])
def test_an_evaluation_that_is_killed_in_a_share_goes_on(
    model, quants, report, tmp_path, monkeypatch, n
):
    job, work = evaluation(model, quants), tmp_path / "work"
    with monkeypatch.context() as patched:
        dies(patched, "quantkit.evaluate.shares.hand_over", n)
        with pytest.raises(CrashError):
            evaluate(job, work, Silent(), spread=in_turn(2))
    assert len(list(work.glob("scores-*"))) == n - 1
    assert json.dumps(evaluate(job, work, Silent(), spread=in_turn(2))) == report
    assert os.listdir(tmp_path) == []


def twice_at_once(job, n_spans):
    """Every share is done by a second worker while the first is in the middle of it."""
    first, second = job.opened(), job.opened()
    for share in shares(n_spans, 2):
        with_double(first, second, share)
        yield share
    first.close()
    second.close()


def with_double(first, second, share) -> None:
    from quantkit.forward.stream import Stream

    advance, begun = Stream.advance, []

    def interrupted(stream, layer, progress=lambda part: None):
        if layer == 1 and not begun:
            begun.append(True)
            second.run(share)
        advance(stream, layer, progress)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stream, "advance", interrupted)
        first.run(share)
    assert begun


def test_a_straggler_and_its_double_do_not_disturb_each_other(
    model, quants, calibrated, report, tmp_path
):
    calibrate(calibration(model), tmp_path / "c" / "m.gguf", Silent(), spread=twice_at_once)
    assert files_of(tmp_path / "c") == calibrated
    work = tmp_path / "e" / "work"
    shared = evaluate(evaluation(model, quants), work, Silent(), spread=twice_at_once)
    assert json.dumps(shared) == report
    assert os.listdir(tmp_path / "e") == []


def test_a_file_of_log_probabilities_is_a_base_for_many_too(model, quants, tmp_path):
    path = tmp_path / "base.logits"
    write_base(evaluation(model, ()), path, Silent())
    assert BaseFile(path).n_chunks == N_CHUNKS
    reports = [
        json.dumps(evaluate(evaluation(path, quants), tmp_path / "w", Silent(), spread=spread))
        for spread in (None, by_pickle(3))
    ]
    assert reports[0] == reports[1]


def test_a_span_of_a_calibration_that_is_missing_is_named(model, tmp_path):
    def lossy(job, n_spans):
        yield from in_turn(2)(job, n_spans)
        sorted(job.work.glob("part-*"))[1].unlink()

    with pytest.raises(OutputError, match=r"-00001\.gguf: the saved work lacks this file"):
        calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=lossy)
    assert not (tmp_path / "m.gguf").exists()


def test_a_worker_that_sees_another_model_or_text_refuses(model, quants, tmp_path):
    other = {
        "identity": lambda job: replace(job, identity="another"),
        "settings": lambda job: replace(job, running=Running(activations="exact")),
    }
    for spoil in other.values():
        with pytest.raises(SourceError, match="not what the run was begun with"):
            calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=by_pickle(2, spoil))
        with pytest.raises(SourceError, match="not what the run was begun with"):
            evaluate(
                evaluation(model, quants),
                tmp_path / "w",
                Silent(),
                spread=by_pickle(2, spoil),
            )


def test_a_share_that_is_none_is_refused(model, tmp_path):
    def wrong(job, n_spans):
        worker = job.opened()
        worker.run(range(n_spans, n_spans + 1))
        yield range(1)

    with pytest.raises(UsageError, match="no share of 4 spans"):
        calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=wrong)


def test_workers_alike_give_the_same_proof(model, quants, tmp_path):
    proofs = set()

    def proven(job, n_spans):
        workers = job.opened(), job.opened()
        proofs.update(worker.proof for worker in workers)
        proofs.add(replace(job, n_threads=1).opened().proof)
        yield from in_turn(1)(job, n_spans)

    calibrate(calibration(model), tmp_path / "m.gguf", Silent(), spread=proven)
    evaluate(evaluation(model, quants), tmp_path / "w", Silent(), spread=proven)
    assert len(proofs) == 1


@pytest.fixture
def two_workers_here(monkeypatch):
    """`--executor ray` without Ray: the shares of two workers, in turn."""

    @contextmanager
    def connected(cluster, threads, device, view):
        yield "two workers" if cluster["executor"] == "ray" else None

    for command in ("calibrate", "evaluate"):
        monkeypatch.setattr(f"quantkit.cli.{command}.on_cluster", connected)
    monkeypatch.setattr("quantkit.pipeline.spread.spread_over", lambda found, view: in_turn(2))


def test_the_commands_share_their_text(model, quants, tmp_path, two_workers_here):
    text = ["--corpus", "core", "--budget", str(READING.budget), "-c", str(N_CTX), "-t", "1", "-q"]
    for executor in ("threads", "ray"):
        out = tmp_path / executor
        for arguments in (
            ["calibrate", str(model), *text, "-o", str(out / "m.gguf")],
            ["evaluate", str(model), str(quants[0]), *text, "-o", str(out)],
        ):
            done = CliRunner().invoke(cli, [*arguments, "--executor", executor])
            assert done.exit_code == 0, done.output
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "threads")


@pytest.mark.parametrize("more", [["--save-base", "f"], ["--engine", "llama.cpp"]])
def test_what_is_not_shared_is_refused_on_a_cluster(more):
    asked = ["evaluate", "m", "q.gguf", "--text", "t", "--executor", "ray", *more]
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 2
    assert "--executor shares neither" in done.output
