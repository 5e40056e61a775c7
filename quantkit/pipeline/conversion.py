"""The story: open a model, plan, quantise, write. Each step can be run and seen alone."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quantkit.errors import UsageError
from quantkit.hub.room import require_room
from quantkit.hub.session import ref_of, spool_of
from quantkit.pipeline import gguf_source
from quantkit.pipeline.encoding import codecs, in_order
from quantkit.pipeline.on_cluster import Errand, made_on_cluster
from quantkit.pipeline.planning import Job, Planned, plan_job, planned
from quantkit.plan.memory import hidden_states
from quantkit.quantize.tiles import Encoding, Source, encode_tile
from quantkit.run import fs
from quantkit.run.cluster import Connected
from quantkit.run.events import Reporter, files, size
from quantkit.run.executor import run_threaded
from quantkit.run.store import Store
from quantkit.source.gguf import MODEL, GgufSource
from quantkit.text.extras import require
from quantkit.types import Plan
from quantkit.write.record import Provenance
from quantkit.write.writer import ShardWriter, is_written

if TYPE_CHECKING:
    from quantkit.pipeline.rounding import Text


class OpenWriter(Protocol):
    """Opens the output of one plan."""

    def __call__(self, folder: Path, plan: Plan, *, restart: bool) -> ShardWriter:
        """See `ShardWriter`."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where it goes. `restart` discards an unfinished run, `force` replaces finished files.

    `device` is where weights are encoded: cpu (numba), or one of torch's, such as cuda. `memory` is
    a bound in bytes for what is in work, beside the process itself and the metadata; see `fit`.
    `open_writer` may be something that sends finished shards elsewhere as well.

    With a `cluster`, which is connected, tiles are made by its workers; `staging` is a store for
    machines that do not share the folder.
    """

    folder: Path
    n_threads: int
    restart: bool = False
    force: bool = False
    device: str = "cpu"
    open_writer: OpenWriter = ShardWriter
    memory: int | None = None
    cluster: Connected | None = None
    staging: str | None = None


def convert(job: Job, output: Output, reporter: Reporter) -> Planned:
    """Convert a model; every file of it is complete under its final name, or there is none."""
    with planned(job, reporter) as (source, first):
        decided, text = first, None
        first.memory(output.n_threads, output.memory)  # or refuse before any work
        if output.staging is not None:
            Store(output.staging)  # or refuse
        _require_room(job, source, first, output)
        for warning in first.warnings:
            reporter.warn(warning)
        if isinstance(source, GgufSource):
            job = _as_allowed(job, source, first, output)
        if decided.by_inputs:
            text = _text(job, decided, output)
            decided = plan_job(job, source, decided.recipe, text.kvs)
        if decided.starved and job.imatrix is None and job.corpus is not None:
            job = replace(job, imatrix=_calibrated(job, decided, output, reporter))
            decided = plan_job(job, source, decided.recipe, text.kvs if text else None)
        if decided.starved:
            types = ", ".join(decided.starved)
            reporter.warn(f"{types} without importance statistics: all columns count alike")
        for plan in decided.plans:
            if is_written(output.folder, plan, force=output.force):
                reporter.stage("write", f"{plan.stem} is already there, nothing to do")
            else:
                _write(plan, source, job, decided, output, reporter, text)
    return decided


def _require_room(job: Job, source: Source, decided: Planned, output: Output) -> None:
    """Refuse what is on the Hub where the disk does not hold output and spool, before any work."""
    paths = [output.folder / shard.file for plan in decided.plans for shard in plan.shards]
    present = sum(fs.allocated(fs.partial_of(path)) for path in paths)
    if not output.force:
        present += sum(map(fs.allocated, paths))
    n_output = max(0, sum(plan.n_bytes for plan in decided.plans) - present)
    n_source = sum(ref.n_bytes for ref in source.tensors.values())
    require_room(job.model, output.folder, n_output, n_source)


def _as_allowed(job: Job, source: GgufSource, decided: Planned, output: Output) -> Job:
    """The job on a GGUF file, of which no tokenizer is read; refuses what needs one."""
    gguf_source.refuse_own_source(source, decided.plans[-1], output.folder)
    if source.kind != MODEL or job.corpus is None:
        return replace(job, corpus=None)  # no text goes through a vision tower
    if not job.corpus.endswith(".safetensors"):
        if decided.by_inputs:
            raise gguf_source.refuse_to_read("", feedback=True)
        if decided.starved and job.imatrix is None:
            raise gguf_source.refuse_to_read(", ".join(decided.starved), feedback=False)
    return job


def _text(job: Job, decided: Planned, output: Output) -> Text:
    """What the model will be run on while its weights are rounded."""
    if job.corpus is None:
        raise UsageError(
            "rounding with feedback needs text to run the model on",
            hint="leave out --no-imatrix, or choose --rounding nearest",
        )
    require("torch")
    from quantkit.pipeline.opening import Running  # noqa: PLC0415 - brings torch
    from quantkit.pipeline.rounding import Text  # noqa: PLC0415

    running = Running(output.device)
    if output.memory is not None:
        running = replace(running, memory=hidden_states(decided.plans[-1], output.memory))
    return Text.read(job.model, job.corpus, job.n_tokens(decided.recipe), running)


def _calibrated(job: Job, decided: Planned, output: Output, reporter: Reporter) -> Path:
    """The imatrix of this model in the output folder, measured now if it is not there yet."""
    require("torch")
    from quantkit.pipeline.calibration import Calibration, calibrate  # noqa: PLC0415 - brings torch
    from quantkit.pipeline.opening import Reading, Running  # noqa: PLC0415

    corpus = job.corpus or ""
    budget = None if corpus.endswith(".safetensors") else job.n_tokens(decided.recipe)
    types = ", ".join(decided.starved)
    amount = "" if budget is None else f"{budget:,} tokens of "
    reporter.warn(f"{types} and no --imatrix: calibrating first, {amount}{corpus}")
    plan = decided.plans[-1]
    path = output.folder / f"{plan.stem.removesuffix(f'-{plan.recipe_name}')}.imatrix.gguf"
    fs.make_folder(output.folder)
    running = Running() if output.memory is None else Running(memory=output.memory)
    calibrate(Calibration(job.model, Reading(corpus, budget), running), path, reporter)
    return path


def _write(
    plan: Plan,
    source: Source,
    job: Job,
    decided: Planned,
    output: Output,
    reporter: Reporter,
    text: Text | None,
) -> None:
    recipe = decided.recipe
    provenance = Provenance(source.origin, source.fingerprint(), recipe)
    n_inexact = 0
    # Before anything is laid out: the device may not be there. Workers have devices of their own.
    is_here = output.cluster is None or text is not None
    encoding = _encoding(plan, decided, output) if is_here else Encoding(decided.how)
    with output.open_writer(output.folder, plan, restart=output.restart) as writer:
        reporter.begin(plan.stem, plan.n_bytes, writer.n_done_bytes())
        try:
            if text is not None and plan is decided.plans[-1]:
                text.round(plan, encoding, recipe.feedback, writer, output.n_threads, reporter)
            if output.cluster is None:
                making = _made_here(plan, source, decided, output, encoding, writer)
            else:
                errand = _errand(plan, source, job, decided, output)
                making = made_on_cluster(output.cluster, errand, writer, reporter)
            with closing(making) as parts:
                for n_bytes, inexact in parts:
                    reporter.advance(n_bytes)
                    n_inexact += inexact
        finally:
            reporter.end()
        writer.commit(provenance)
    if n_inexact:
        reporter.warn(f"{n_inexact:,} blocks have a scale beyond f16 and were encoded, not copied")
    reporter.stage("write", f"{plan.stem}: {size(plan.n_bytes)} in {files(len(plan.shards))}")


def _encoding(plan: Plan, decided: Planned, output: Output) -> Encoding:
    lookup = decided.importance.lookup if decided.importance else None
    strip = decided.memory(output.n_threads, output.memory).strip_weights
    return Encoding(decided.how, lookup, codecs(plan, output.device), strip_weights=strip)


def _made_here(
    plan: Plan,
    source: Source,
    decided: Planned,
    output: Output,
    encoding: Encoding,
    writer: ShardWriter,
) -> Generator[tuple[int, int], None, None]:
    """(bytes, blocks that were not copied) of tiles as they are written, by threads."""
    memory = decided.memory(output.n_threads, output.memory)

    def make(key: tuple[int, int]) -> tuple[int, int]:
        tile = encode_tile(source, plan.tensors, key, encoding)
        writer.write(*key, tile.data, tile.digest)
        return tile.data.nbytes, tile.n_inexact

    source.will_read(in_order(plan, writer.missing()))
    yield from run_threaded(
        make,
        writer.missing(),
        output.n_threads,
        n_bytes=lambda key: memory.of_tile(plan.tensors[key[0]]),
        budget=memory.n_bytes,
    )


def _errand(plan: Plan, source: Source, job: Job, decided: Planned, output: Output) -> Errand:
    """What workers elsewhere have to know of it."""
    importance = decided.importance
    if importance and not {*importance.lookup.covered()} & {t.spec.name for t in plan.tensors}:
        importance = None  # of a vision tower nothing is known
    return Errand(
        plan,
        ref_of(job.model),
        source.fingerprint(),
        decided.how,
        output.folder.resolve(),
        output.staging,
        job.imatrix.resolve() if importance and job.imatrix else None,
        importance.digest if importance else "",
        output.device,
        output.memory,
        spool_of(job.model),
    )
