"""Calibrate: text in, importance statistics out, the model streamed past, by one or by many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.calibrate.coverage import THRESHOLDS, coverage
from quantkit.calibrate.imatrix import read_imatrix, write_imatrix
from quantkit.calibrate.measure import Measuring, clear, measure, measure_share, merge_shares
from quantkit.calibrate.statistics import Statistics
from quantkit.container.kv import string, u32
from quantkit.errors import UsageError
from quantkit.evaluate.summary import with_bos
from quantkit.forward.spans import SPAN_TOKENS
from quantkit.hub.session import HubSession, Place, ref_of, spool_of
from quantkit.pipeline.opening import Opened, Reading, Running, opened, read_tokens
from quantkit.pipeline.shared import (
    TOKENS,
    OpenedWorker,
    Ref,
    Spread,
    have_done,
    pinned,
    require_same,
    use_threads,
)
from quantkit.run import fs
from quantkit.run.events import Reporter, Silent, size
from quantkit.text.tokens import TokenSet, chunks
from quantkit.types import Kv

_IDENTITY = "quantkit.calibration.identity"


@dataclass(frozen=True)
class Calibration:
    """What to measure, on what, and how. `span_tokens` is the size of what can be shared."""

    model: Place
    reading: Reading
    running: Running = field(default_factory=Running)
    span_tokens: int = SPAN_TOKENS


@dataclass(frozen=True)
class SharedCalibration:
    """What is to be measured, for a worker; see `SharedJob`.

    `reading` is of tokens in `work`, `identity` what model and text have to be. `spool` bounds what
    is fetched from the Hub, bytes on each worker's disk.
    """

    model: Ref
    reading: Reading
    running: Running
    span_tokens: int
    work: Path
    identity: str
    spool: int = 0
    n_threads: int | None = None

    def opened(self) -> CalibrationWorker:
        """A worker at it."""
        return CalibrationWorker(self)


class CalibrationWorker(OpenedWorker):
    """See `ShareWorker`."""

    def __init__(self, shared: SharedCalibration) -> None:
        use_threads(shared.n_threads)
        with ExitStack() as stack:
            session = stack.enter_context(HubSession(Silent(), spool=shared.spool))
            place = session.at(shared.model)
            job = Calibration(place, shared.reading, shared.running, shared.span_tokens)
            model = stack.enter_context(opened(place, job.running.constants))
            tokens = read_tokens(model, job.reading)
            identity = _identity(job, model, tokens)
            require_same(f"{model.name} or its text", identity, shared.identity)
            self._measuring = _measuring(job, model, tokens, identity, shared.work)
            super().__init__(self._measuring.settings.compute, stack.pop_all())

    def run(self, share: range) -> None:
        """See `ShareWorker`."""
        measure_share(self._measuring, share, lambda _: None)


def calibrate(
    job: Calibration,
    output: Path,
    reporter: Reporter,
    *,
    force: bool = False,
    spread: Spread | None = None,
) -> Statistics:
    """Measure and write an imatrix, with its tokens beside it.

    A killed run is continued by the next one, and what is there already is not done again. With
    `spread` the text is shared among processes; the file is the same, byte for byte.
    """
    if output.suffix != ".gguf":
        raise UsageError("an imatrix is a GGUF file, its name ends in .gguf", where=str(output))
    with opened(job.model, job.running.constants) as model:
        tokens = read_tokens(model, job.reading)
        identity = _identity(job, model, tokens)
        if output.exists() and not force:
            return _finished(output, identity, reporter)
        statistics = _measure(job, model, tokens, identity, output, reporter, spread)
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
            _clear(work)
    reporter.stage("measure", f"{output.name} is already there, nothing to do")
    return statistics


def _identity(job: Calibration, model: Opened, tokens: TokenSet) -> str:
    return f"{model.identity} {tokens.digest} {job.reading.n_ctx} {job.running.compute()}"


def _measuring(
    job: Calibration, model: Opened, tokens: TokenSet, identity: str, work: Path
) -> Measuring:
    return Measuring(
        model.weights,
        model.hyper,
        with_bos(chunks(tokens, job.reading.n_ctx), model.bos),
        job.running.settings(work),
        identity,
        job.span_tokens,
    )


def _measure(
    job: Calibration,
    model: Opened,
    tokens: TokenSet,
    identity: str,
    output: Path,
    reporter: Reporter,
    spread: Spread | None,
) -> Statistics:
    n_layers, work = model.hyper.n_layers, _work(output)
    measuring = _measuring(job, model, tokens, identity, work)
    n_chunks, n_ctx = measuring.chunks.shape
    tell_text(tokens, n_chunks, n_ctx, reporter)
    title = f"calibrate {model.name}"
    with fs.claimed(work):
        with progress_of(measuring.chunks.size, title, reporter) as progress:
            if spread is None:
                statistics = measure(
                    measuring,
                    progress,
                    lambda done: reporter.stage("resume", f"{done} of {n_layers} layers are done"),
                )
            else:
                tokens.save(work / TOKENS)
                have_done(spread, _shared(job, identity, work), measuring.spans, progress)
                statistics = merge_shares(measuring)
        statistics.datasets = (tokens.name,)
        tokens.save(tokens_beside(output))
        write_imatrix(output, statistics, _kvs(model, tokens, identity))
        _clear(work)
    return read_imatrix(output)


def _shared(job: Calibration, identity: str, work: Path) -> SharedCalibration:
    return SharedCalibration(
        ref_of(job.model),
        Reading(str(work.resolve() / TOKENS), n_ctx=job.reading.n_ctx),
        pinned(job.running),
        job.span_tokens,
        work.resolve(),
        identity,
        spool_of(job.model),
    )


def _clear(work: Path) -> None:
    fs.remove(work / TOKENS)
    clear(work)


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
