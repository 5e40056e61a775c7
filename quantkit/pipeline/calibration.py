"""Calibrate: text in, importance statistics out, the model streamed past."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.calibrate.coverage import THRESHOLDS, coverage
from quantkit.calibrate.imatrix import read_imatrix, write_imatrix
from quantkit.calibrate.measure import clear, measure
from quantkit.calibrate.statistics import Statistics
from quantkit.container.kv import string, u32
from quantkit.errors import UsageError
from quantkit.evaluate.summary import with_bos
from quantkit.hub.session import Place
from quantkit.pipeline.opening import Opened, Reading, Running, opened, read_tokens
from quantkit.run import fs
from quantkit.run.events import Reporter, size
from quantkit.text.tokens import TokenSet, chunks
from quantkit.types import Kv

_IDENTITY = "quantkit.calibration.identity"


@dataclass(frozen=True)
class Calibration:
    """What to measure, on what, and how."""

    model: Place
    reading: Reading
    running: Running = field(default_factory=Running)


def calibrate(
    job: Calibration, output: Path, reporter: Reporter, *, force: bool = False
) -> Statistics:
    """Measure and write an imatrix, with its tokens beside it.

    A killed run is continued by the next one, and what is there already is not done again.
    """
    if output.suffix != ".gguf":
        raise UsageError("an imatrix is a GGUF file, its name ends in .gguf", where=str(output))
    with opened(job.model, job.running.constants) as model:
        tokens = read_tokens(model, job.reading)
        identity = f"{model.identity} {tokens.digest} {job.reading.n_ctx} {job.running.compute()}"
        if output.exists() and not force:
            return _finished(output, identity, reporter)
        statistics = _measure(job, model, tokens, identity, output, reporter)
    _tell(statistics, output, reporter)
    return statistics


def tokens_beside(imatrix: Path) -> Path:
    """Where the tokens of an imatrix are kept."""
    return imatrix.with_name(imatrix.name.removesuffix(".gguf") + ".tokens.safetensors")


@contextmanager
def progress_of(n_tokens: int, title: str, reporter: Reporter) -> Iterator[Callable[[float], None]]:
    """A bar in tokens; what comes out is told parts of the whole, up to 1."""
    reporter.begin(title, n_tokens, 0, "tokens")
    try:
        yield lambda part: reporter.advance(part * n_tokens)
    finally:
        reporter.end()


def tell_text(tokens: TokenSet, n_chunks: int, n_ctx: int, reporter: Reporter) -> None:
    """What is read, in a line; chats that a template refused, in another."""
    cut = f"{n_chunks:,} chunk{'s' if n_chunks != 1 else ''} of {n_ctx:,}"
    reporter.stage("text", f"{tokens.name}: {len(tokens.ids):,} tokens, {cut}")
    if refused := sum(tokens.refused.values()):
        reporter.warn(f"{refused} chats were left out: the model's template refused them")


def _finished(output: Path, identity: str, reporter: Reporter) -> Statistics:
    statistics = read_imatrix(output)
    kv = statistics.kvs.get(_IDENTITY)
    if kv is None or kv.value != identity:
        raise UsageError(
            "is there already, made of another model, text or setting",
            where=str(output),
            hint="--force replaces it; -o names another file",
        )
    if (work := _work(output)).exists():  # of a run that was killed when all was written
        with fs.claimed(work):
            clear(work)
    reporter.stage("measure", f"{output.name} is already there, nothing to do")
    return statistics


def _measure(
    job: Calibration,
    model: Opened,
    tokens: TokenSet,
    identity: str,
    output: Path,
    reporter: Reporter,
) -> Statistics:
    n_ctx, n_layers = job.reading.n_ctx, model.hyper.n_layers
    cut = chunks(tokens, n_ctx)
    tell_text(tokens, len(cut), n_ctx, reporter)
    work = _work(output)
    with fs.claimed(work):
        with progress_of(cut.size, f"calibrate {model.name}", reporter) as progress:
            statistics = measure(
                model.weights,
                model.hyper,
                with_bos(cut, model.bos),
                job.running.settings(work),
                identity,
                progress,
                lambda done: reporter.stage("resume", f"{done} of {n_layers} layers are done"),
            )
        statistics.datasets = (tokens.name,)
        tokens.save(tokens_beside(output))
        write_imatrix(output, statistics, _kvs(model, tokens, identity))
        clear(work)
    return read_imatrix(output)


def _work(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def _kvs(model: Opened, tokens: TokenSet, identity: str) -> dict[str, Kv]:
    return {
        _IDENTITY: string(identity),
        "quantkit.calibration.model": string(model.name),
        "quantkit.calibration.tokens": string(tokens.digest),
        "quantkit.calibration.n_tokens": u32(len(tokens.ids)),
    }


def _tell(statistics: Statistics, output: Path, reporter: Reporter) -> None:
    n_bytes = output.stat().st_size
    reporter.stage("measure", f"{output.name}: {len(statistics.sums)} tensors, {size(n_bytes)}")
    covered = coverage(statistics)
    if covered.n_experts:
        below = ", ".join(f"{covered.share_below(n):.1%} fewer than {n}" for n in THRESHOLDS)
        said = f"{covered.n_experts:,} routed: {covered.share_below(1):.1%} saw no token, {below}"
        reporter.stage("experts", said)
    if covered.share_below(THRESHOLDS[0]):
        reporter.warn(
            "experts that saw little borrow from others; more text reaches more of them"
            f" (`quantkit imatrix show {output.name}` tells which)"
        )
