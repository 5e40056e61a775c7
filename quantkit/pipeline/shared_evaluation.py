"""An evaluation's comparison, and the same for workers that share its text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.evaluate.compare import Comparison, Party, Windows
from quantkit.evaluate.logits_file import BaseFile
from quantkit.evaluate.shares import digest_of, run_share
from quantkit.hub.session import HubSession, Place, ref_of, spool_of
from quantkit.pipeline.opening import Opened, Reading, Running, opened, opened_gguf, read_tokens
from quantkit.pipeline.shared import TOKENS, OpenedWorker, Ref, pinned, require_same, use_threads
from quantkit.run.events import Silent
from quantkit.text.tokens import Ids, TokenSet, chunks


@dataclass(frozen=True)
class SharedEvaluation:
    """What is to be compared, for a worker; see `SharedJob`.

    `reading` is of tokens in `work`, None where `model` is a file of log-probabilities, which has
    them. `identity` is what models and text have to be. `spool` bounds what is fetched from the
    Hub, bytes on each worker's disk.
    """

    model: Ref
    quants: tuple[Ref, ...]
    reading: Reading | None
    running: Running
    span_tokens: int
    work: Path
    identity: str
    spool: int = 0
    n_threads: int | None = None

    def opened(self) -> EvaluationWorker:
        """A worker at it."""
        return EvaluationWorker(self)


class EvaluationWorker(OpenedWorker):
    """See `ShareWorker`."""

    def __init__(self, shared: SharedEvaluation) -> None:
        use_threads(shared.n_threads)
        constants = shared.running.constants
        with ExitStack() as stack:
            session = stack.enter_context(HubSession(Silent(), spool=shared.spool))
            quants = [
                stack.enter_context(opened_gguf(session.file(quant), constants))
                for quant in shared.quants
            ]
            place = session.at(shared.model)
            base: Opened | BaseFile
            if shared.reading:
                base = stack.enter_context(opened(place, constants))
                cut = chunks(read_tokens(base, shared.reading), shared.reading.n_ctx)
            elif isinstance(place, Path):
                base = BaseFile(place)
                cut = base.tokens
            else:
                raise UsageError("there is no text to run", where=str(place))
            job = comparison(shared.running, shared.span_tokens, base, quants, cut, shared.work)
            require_same(f"{shared.model} or a quant", digest_of(job), shared.identity)
            self._job = job
            super().__init__(self._job.settings.compute, stack.pop_all())

    def run(self, share: range) -> None:
        """See `ShareWorker`."""
        run_share(self._job, share, lambda _: None)


def comparison(
    running: Running,
    span_tokens: int,
    base: Opened | BaseFile,
    quants: Sequence[Opened],
    cut: Ids,
    work: Path,
) -> Comparison:
    """What is compared on `cut` i32[n_chunks, n_ctx], and how."""
    bos = base.bos if isinstance(base, Opened) else quants[0].bos
    return Comparison(
        party(base) if isinstance(base, Opened) else base,
        [party(quant) for quant in quants],
        Windows.of(cut, bos, span_tokens),
        running.settings(work),
        " ".join(_identity(model) for model in (base, *quants)),
    )


def shared_evaluation(
    job: Comparison,
    model: Place,
    quants: Sequence[Place],
    running: Running,
    tokens: TokenSet | None,
) -> SharedEvaluation:
    """The same for workers; the tokens, which a file of log-probabilities has, go to its work."""
    reading, work = None, job.settings.work.resolve()
    if tokens:
        tokens.save(work / TOKENS)
        reading = Reading(str(work / TOKENS), n_ctx=job.text.chunks.shape[1])
    return SharedEvaluation(
        ref_of(model),
        tuple(ref_of(quant) for quant in quants),
        reading,
        pinned(running),
        job.text.span_tokens,
        work,
        digest_of(job),
        max(spool_of(place) for place in (model, *quants)),
    )


def party(model: Opened) -> Party:
    """A model as one that takes part."""
    return Party(model.name, model.weights, model.hyper)


def _identity(model: Opened | BaseFile) -> str:
    if isinstance(model, Opened):
        return model.identity
    stat = model.path.stat()
    return f"{model.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
