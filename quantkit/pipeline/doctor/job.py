"""What will limit a job on this machine, and what it will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quantkit.pipeline.doctor.disks import Disk, existing, output_disk, source_disk
from quantkit.pipeline.doctor.finding import Finding
from quantkit.pipeline.doctor.limits import memory_available
from quantkit.pipeline.planning import Job, Planned, planned
from quantkit.plan.report import work
from quantkit.plan.rounding import forecast
from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.gain import encode_rows
from quantkit.run.events import Silent, size, weights
from quantkit.run.executor import run_threaded
from quantkit.types import GgmlType, Plan

# Bytes that a thread gets through beside encoding: reading, expanding, digest and writing, each of
# what it is counted in (benchmarks/pipeline.py, an EPYC with SHA instructions).
_BYTES_PER_SECOND = 1.0e9
_ROWS, _COLS = 32, 4096
_MEASURED_S = 0.3  # for each type
_SHARE = 0.002  # of all weights, below which a type is not measured
_BESIDE = 512 << 20  # the program and what a large checkpoint's metadata takes


@dataclass
class Forecast:
    """Seconds by what they are spent on; they overlap, so the longest of them is the job's."""

    seconds: dict[str, float] = field(default_factory=dict)
    n_read: int = 0
    n_written: int = 0
    n_memory: int = 0

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total(self) -> float:
        """Of the whole job, good to a factor of two."""
        return self.seconds[self.limit]


@dataclass(frozen=True, slots=True)
class Question:
    """A job, where it is to go, and what it may take."""

    job: Job
    output: Path | None
    n_threads: int
    memory: int | None = None


def examine(asked: Question) -> tuple[list[Finding], Forecast]:
    """Plan the job and measure what it needs of this machine; raises what planning raises."""
    with planned(asked.job, Silent()) as (_, decided):
        told = Forecast()
        findings = [*_plan(decided), *_memory(asked, decided, told), *_disk(asked, decided, told)]
        told.seconds["encoding"] = _encoding_seconds(decided, asked.n_threads)
        if decided.by_inputs:
            n_tokens = asked.job.n_tokens(decided.recipe)
            found = forecast(decided.plans[-1], n_tokens, asked.n_threads)
            told.seconds["rounding with feedback"] = found.seconds
        if decided.starved and asked.job.corpus is not None:
            types = ", ".join(decided.starved)
            hint = "or give --imatrix, or --no-imatrix: a forward pass over the text comes on top"
            findings.append(Finding("imatrix", f"{types}: calibrated first", "note", hint))
        if not isinstance(asked.job.model, Path):
            hint = "the network is the limit wherever it is slower than the rest"
            findings.append(Finding("network", f"{size(told.n_read)} to fetch", "note", hint))
        findings.append(_verdict(told, decided, asked.n_threads))
    return findings, told


def _plan(decided: Planned) -> Iterator[Finding]:
    text = decided.plans[-1]
    yield Finding(
        "job",
        f"{text.stem}: {weights(text.n_weights)} weights at {text.bpw:.2f} bits,"
        f" {size(text.n_bytes)}",
    )


def _memory(asked: Question, decided: Planned, told: Forecast) -> Iterator[Finding]:
    told.n_memory = decided.memory(asked.n_threads, asked.memory).n_bytes + _BESIDE
    if decided.by_inputs:
        told.n_memory += forecast(decided.plans[-1], 1, 1).work.n_bytes
    free = memory_available()
    value = f"{size(told.n_memory)} at most for {asked.n_threads} threads"
    if free is None or told.n_memory <= free:
        yield Finding("memory", value)
    else:
        hint = "give --memory, or fewer --threads"
        if decided.by_inputs:
            hint = "choose --rounding nearest, or a machine with more memory"
        yield Finding("memory", f"{value}, {size(free)} are available", "failure", hint, 5)


def _disk(asked: Question, decided: Planned, told: Forecast) -> Iterator[Finding]:
    amounts: Counter[str] = Counter()
    for plan in decided.plans:
        amounts.update(work(plan))
    told.n_read, told.n_written = amounts["read_bytes"], amounts["write_bytes"]
    source = _source(asked.job, told)
    if source:
        yield Finding("source", f"{size(told.n_read)} to read at {size(source.read)}/s")
    if asked.output is None:
        return
    target = output_disk(asked.output)
    where = existing(asked.output)
    if target.refused:
        hint = "choose another folder with -o"
        yield Finding("output", f"{where}: {target.refused}", "failure", hint, 5)
    elif target.n_free < told.n_written:
        value = f"{size(told.n_written)} are needed and {size(target.n_free)} are free in {where}"
        yield Finding("output", value, "failure", "free some space, or choose another -o", 5)
    else:
        value = f"{size(told.n_written)} to write at {size(target.write)}/s"
        yield Finding("output", f"{value}, {size(target.n_free)} free")
    if target.write:
        told.seconds["writing"] = told.n_written / target.write
        if source and source.device == target.device:  # one disk does both
            both = told.seconds.pop("reading", 0.0) + told.seconds.pop("writing")
            told.seconds["the disk"] = both


def _source(job: Job, told: Forecast) -> Disk | None:
    if not isinstance(job.model, Path):
        return None
    files = [job.model] if job.model.is_file() else list(job.model.glob("*.safetensors"))
    disk = source_disk(max(files, key=lambda path: path.stat().st_size))
    if disk.read:
        told.seconds["reading"] = told.n_read / disk.read
    return disk


def _encoding_seconds(decided: Planned, n_threads: int) -> float:
    """All weights by the speed of their types here and now, and what goes with every byte."""
    counts: Counter[GgmlType] = Counter()
    n_bytes = 0
    for plan in decided.plans:
        n_bytes += plan.n_source_bytes + plan.n_bytes
        counts.update(_encoded(plan))
    least = _SHARE * sum(counts.values())
    speeds = {t: speed(t, decided.how, n_threads) for t, n in counts.items() if n >= least}
    encoding = sum(n / speeds[type_] for type_, n in counts.items() if type_ in speeds)
    return encoding + n_bytes / (_BYTES_PER_SECOND * n_threads)


def _encoded(plan: Plan) -> Counter[GgmlType]:
    counts: Counter[GgmlType] = Counter()
    for tensor in plan.tensors:
        if not tensor.repack and tensor.type.block_size > 1:
            counts[tensor.type] += tensor.spec.n_weights
    return counts


def speed(type_: GgmlType, how: How, n_threads: int) -> float:
    """Weights a second that so many threads encode together, beside whatever else runs now."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((_ROWS, _COLS)).astype(np.float32)
    importance = np.exp(rng.standard_normal(_COLS)).astype(np.float32)
    codec = codec_of(type_)
    encode_rows(codec, x[:1], importance, how)  # compiles
    begun = time.perf_counter()

    def until() -> Iterator[None]:
        while time.perf_counter() - begun < _MEASURED_S:
            yield

    def encode(_: None) -> int:
        return x.size if encode_rows(codec, x, importance, how).size else 0

    n = sum(run_threaded(encode, until(), n_threads))
    return n / (time.perf_counter() - begun)


def _verdict(told: Forecast, decided: Planned, n_threads: int) -> Finding:
    parts = [f"{name} {duration(s)}" for name, s in told.seconds.items()]
    value = f"about {duration(told.total)}, limited by {told.limit} ({', '.join(parts)})"
    hint = ""
    if told.limit == "encoding":
        hint = f"on {n_threads} threads; more cores, or --device cuda, make it shorter"
    elif told.limit == "rounding with feedback":
        hint = "--rounding nearest takes what encoding takes, and loses more"
    return Finding("time", value, "ok", hint)


def duration(seconds: float) -> str:
    """Time for people: 40 s, 12 min, 3.5 h, 4 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"
