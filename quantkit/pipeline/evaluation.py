"""Evaluate: base and quantised models over the same text, and a report of how far they part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from quantkit.calibrate.coverage import coverage
from quantkit.calibrate.imatrix import read_imatrix
from quantkit.calibrate.statistics import Statistics
from quantkit.container.names import escaped, parse_shard_file_name, shard_file_name, shown
from quantkit.container.shardset import open_shards
from quantkit.errors import QuantkitError, UsageError
from quantkit.evaluate.compare import Progress, Traces, Windows, compare, save_base
from quantkit.evaluate.html import report_html
from quantkit.evaluate.llamacpp import score_with_llamacpp
from quantkit.evaluate.logits_file import MAGIC, BaseFile
from quantkit.evaluate.report import Base, Coverage, TaskResult, Text, describe, report_json
from quantkit.evaluate.scores import Scores
from quantkit.evaluate.shares import clear, merge_shares
from quantkit.evaluate.summary import Summary, perplexity, scored_positions, summarise
from quantkit.forward.spans import SPAN_TOKENS
from quantkit.forward.sweep import Sweep, clear_state
from quantkit.hub.folder import HubFile
from quantkit.hub.session import Place
from quantkit.pipeline.calibration import progress_of, tell_text
from quantkit.pipeline.opening import (
    MODEL,
    Opened,
    Reading,
    Running,
    kind_of,
    opened,
    opened_gguf,
    read_tokens,
)
from quantkit.pipeline.shared import TOKENS, Spread, have_done
from quantkit.pipeline.shared_evaluation import comparison, party, shared_evaluation
from quantkit.pipeline.tasks import Asking, ask
from quantkit.recipe import parse_recipe
from quantkit.run import fs
from quantkit.run.events import Reporter, files, size
from quantkit.text.overlap import refuse_overlap
from quantkit.text.tokens import Ids, TokenSet, chunks, load_tokens
from quantkit.write.manifest import load_manifest, manifest_path

Engine = Literal["quantkit", "llama.cpp"]


@dataclass(frozen=True)
class Evaluation:
    """What to compare, on what, and how: on a text, on questions to answer, or on both.

    `imatrix` adds expert coverage to the report. `calibrated_on` are tokens that the quants were
    calibrated with: a text that shares too much with them is refused unless `force`. `span_tokens`
    is the size of what can be shared.
    """

    model: Place
    quants: tuple[Path | HubFile, ...]
    reading: Reading | None
    running: Running = field(default_factory=Running)
    engine: Engine = "quantkit"
    n_threads: int = 1
    imatrix: Path | None = None
    calibrated_on: Path | None = None
    force: bool = False
    asking: Asking | None = None
    span_tokens: int = SPAN_TOKENS


def evaluate(
    job: Evaluation, work: Path, reporter: Reporter, *, spread: Spread | None = None
) -> dict[str, Any]:
    """The report as plain data. `work` is where a killed run's state waits for the next one.

    With `spread` the text is shared among processes, the report is the same; questions, and what
    llama.cpp runs, stay in this process.
    """
    job = replace(job, quants=models_among(job.quants, reporter))
    is_file = is_base_file(job.model)
    if job.asking and (is_file or job.engine != "quantkit"):
        raise UsageError(
            f"questions are asked of models that quantkit runs, not of {_other(job, is_file)}",
            hint="name the checkpoint's folder, and leave --engine out",
        )
    statistics = read_imatrix(job.imatrix) if job.imatrix else None
    constants = job.running.constants
    text: Text | None = None
    tokens: TokenSet | None = None
    scores: Scores | None = None
    traces: Traces | None = None
    tasks: list[TaskResult] = []
    with ExitStack() as stack:
        quants = [stack.enter_context(opened_gguf(path, constants)) for path in job.quants]
        base: Opened | BaseFile
        if is_file and isinstance(job.model, Path):
            base, name = BaseFile(job.model), job.model.name
            cut, text = _read_file(base, name, reporter)
        else:
            base = stack.enter_context(opened(job.model, constants))
            name = base.name
            if job.reading:
                tokens, cut, text = _read(job, job.reading, base, quants, reporter)
        stack.callback(fs.remove_folder, work)  # where it is empty: nothing to be continued
        stack.enter_context(fs.claimed(work))
        if job.asking and isinstance(base, Opened):  # first, so that a bad file is told at once
            settings = job.running.settings(work / "task")
            tasks = ask(job.asking, base, quants, settings, reporter)
        if text:
            scores, traces = _scores(job, base, quants, (cut, tokens), work, reporter, spread)
    clear_state(work / "task")
    fs.remove_folder(work / "task")
    fs.remove(work / TOKENS)
    clear(work)
    return _report(job, name, text, scores, traces, tasks, statistics)


def models_among(paths: Sequence[Path | HubFile], reporter: Reporter) -> tuple[Path | HubFile, ...]:
    """The models among GGUF files, a shard set by its first; what is left out is told.

    `OUT/*.gguf` may so be given as it is. Where nothing is a model, all is returned.
    """
    models: list[Path | HubFile] = []
    others, n_shards = [], 0
    for path in paths:
        named = parse_shard_file_name(path.name)
        first = path
        if named and named[2] > 1:
            first = path.with_name(shard_file_name(named[0], 0, named[2]))
        if first in models:
            n_shards += path != first
        elif (kind := kind_of(open_shards(path))) == MODEL:
            models.append(first)
        else:
            others.append(f"{escaped(path.name)} ({shown(kind)})")
    if not models:
        return tuple(paths)
    if others:
        reporter.warn(f"left out, as it is no model: {', '.join(others)}")
    if n_shards:
        reporter.warn(f"shards of sets that are named already: {files(n_shards)}")
    return tuple(models)


def predicted_kld(path: Path) -> float | None:
    """What `quantkit allocate` expected of a file, from the record of its conversion beside it."""
    named = parse_shard_file_name(path.name)
    record = manifest_path(path.parent, named[0] if named else path.stem)
    if not record.is_file():
        return None
    try:
        return parse_recipe(load_manifest(record).recipe.text, where=str(record)).predicted_kld
    except QuantkitError:
        return None


def _other(job: Evaluation, is_file: bool) -> str:
    return "a file of log-probabilities" if is_file else job.engine


def is_base_file(path: Place) -> bool:
    """Whether this is a file of base log-probabilities, by its first bytes."""
    if not isinstance(path, Path) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write_base(job: Evaluation, output: Path, reporter: Reporter) -> None:
    """Only the base, as a file that this tool and llama-perplexity compare quants with."""
    work = output.with_name(output.name + ".work")
    with opened(job.model, job.running.constants) as base:
        if job.reading is None:
            raise UsageError("there is no text to run")
        _, cut, _ = _read(job, job.reading, base, (), reporter)
        with fs.claimed(work), progress_of(cut.size, f"run {base.name}", reporter) as progress:
            sweep = _save_base(job, base, cut, work, output, progress)
        sweep.clear()
        fs.remove_folder(work)
    reporter.stage("write", f"{output.name}: {size(output.stat().st_size)}")


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json and report.html."""
    fs.make_folder(folder)
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    fs.write_whole(folder / "report.json", text.encode() + b"\n")
    fs.write_whole(folder / "report.html", report_html(report).encode())


def _read(
    job: Evaluation, reading: Reading, base: Opened, quants: Sequence[Opened], reporter: Reporter
) -> tuple[TokenSet, Ids, Text]:
    tokens = read_tokens(base, reading)
    _refuse_training_text(job, tokens, quants)
    n_ctx = reading.n_ctx
    cut = chunks(tokens, n_ctx)
    tell_text(tokens, len(cut), n_ctx, reporter)
    return tokens, cut, _about(tokens.name, cut, tokens.digest)


def _read_file(base: BaseFile, name: str, reporter: Reporter) -> tuple[Ids, Text]:
    cut = base.tokens
    reporter.stage("text", f"{name}: {len(cut):,} chunks of {base.n_ctx:,} tokens")
    return cut, _about(name, cut, "")


def _about(corpus: str, cut: Ids, digest: str) -> Text:
    n_chunks, n_ctx = cut.shape
    return Text(corpus=corpus, n_tokens=cut.size, n_chunks=n_chunks, n_ctx=n_ctx, digest=digest)


def _refuse_training_text(job: Evaluation, tokens: TokenSet, quants: Sequence[Opened]) -> None:
    if job.calibrated_on:
        refuse_overlap(load_tokens(job.calibrated_on), tokens, force=job.force)
    for quant in quants:
        kv = quant.weights.kvs.get("quantize.imatrix.dataset")
        if kv and kv.value == tokens.name and not job.force:
            raise UsageError(
                f"was calibrated with {tokens.name}: scores on it would flatter",
                where=quant.name,
                hint="measure with another text, or insist with --force",
            )


def _scores(
    job: Evaluation,
    base: Opened | BaseFile,
    quants: Sequence[Opened],
    text: tuple[Ids, TokenSet | None],
    work: Path,
    reporter: Reporter,
    spread: Spread | None,
) -> tuple[Scores, Traces | None]:
    cut, tokens = text
    if job.engine == "llama.cpp":
        return _scores_of_llamacpp(job, base, cut, work, reporter), None
    compared = comparison(job.running, job.span_tokens, base, quants, cut, work)
    title = f"evaluate {len(quants)} against {job.model.name}"
    with progress_of(cut.size, title, reporter) as progress:
        if spread is None:
            scores, traces, _ = compare(compared, progress)
        else:
            shared = shared_evaluation(compared, job.model, job.quants, job.running, tokens)
            have_done(spread, shared, compared.text.spans, progress)
            scores, traces = merge_shares(compared)
    reporter.stage("evaluate", f"{files(len(quants))} against {job.model.name}")
    return scores, traces


def _scores_of_llamacpp(
    job: Evaluation, base: Opened | BaseFile, cut: Ids, work: Path, reporter: Reporter
) -> Scores:
    """The quants run by llama.cpp; a base that is a checkpoint is run here, into a base file."""
    with ExitStack() as stack:
        source: Path | BaseFile
        if isinstance(base, BaseFile):
            source = base
        elif base.shards is None:
            source = stack.enter_context(_temporary_base(job, base, cut, work, reporter))
        else:
            source = _here(job.model)
        title = f"llama.cpp evaluates {len(job.quants)}"
        with progress_of(cut.size, title, reporter) as progress:
            return score_with_llamacpp(
                source,
                [_here(path) for path in job.quants],
                cut,
                threads=job.n_threads,
                on_chunk=lambda n_done: progress(1 / len(cut)),
            )


def _here(place: Place) -> Path:
    """A file that llama.cpp can open."""
    if isinstance(place, Path):
        return place
    raise UsageError(
        "llama.cpp runs files on this machine only",
        where=str(place),
        hint="download it first, or leave --engine out",
    )


@contextmanager
def _temporary_base(
    job: Evaluation, base: Opened, cut: Ids, work: Path, reporter: Reporter
) -> Iterator[BaseFile]:
    path = work / "base.logits"
    fs.make_folder(work)
    with progress_of(cut.size, f"run {base.name}", reporter) as progress:
        sweep = _save_base(job, base, cut, work, path, progress)
    try:
        yield BaseFile(path)
    finally:
        sweep.clear()
        fs.remove(path)
        fs.remove_folder(work)


def _save_base(
    job: Evaluation, base: Opened, cut: Ids, work: Path, path: Path, progress: Progress
) -> Sweep:
    windows, settings = Windows.of(cut, base.bos), job.running.settings(work)
    return save_base(party(base), windows, settings, base.identity, path, progress)


def _report(
    job: Evaluation,
    name: str,
    text: Text | None,
    scores: Scores | None,
    traces: Traces | None,
    tasks: Sequence[TaskResult],
    statistics: Statistics | None,
) -> dict[str, Any]:
    ppl, ppl_error = perplexity(scores.nll_base) if scores else (None, None)
    running = job.running
    constants = {
        "constants": running.constants,
        "activations": running.activations,
        "type": running.dtype,
    }
    return report_json(
        model=name,
        text=text,
        engine=job.engine,
        constants=constants if job.engine == "quantkit" else {},
        base=Base(ppl=ppl, ppl_error=ppl_error, path=str(job.model)),
        quants=[
            describe(
                path,
                _summary(text, scores, k),
                kld=scores.kld[k] if scores else None,
                layers=traces.layers(k) if traces else (),
                tasks=tasks[k : k + 1],
            )
            for k, path in enumerate(job.quants)
        ],
        coverage=_coverage(statistics) if statistics else None,
    )


def _summary(text: Text | None, scores: Scores | None, quant: int) -> Summary:
    if text is None or scores is None:
        return {}
    return summarise(scores, quant, window=len(scored_positions(text.n_ctx)))


def _coverage(statistics: Statistics) -> Coverage | None:
    layers = coverage(statistics).layers
    if not layers:
        return None
    return Coverage(
        layers=tuple(layer.layer for layer in layers),
        counts=tuple(layer.counts for layer in layers),
        n_tokens=statistics.n_tokens,
    )
