"""One sweep over the calibration text: importance statistics of every matrix of a model.

Only the layer at work is in memory. What it gave is written to the work folder before the hidden
states behind it are saved, so a killed run finds the layers that it does not do again.

The text can be shared: `measure_share` sees some of its spans and leaves a file for each span and
layer, `merge_shares` adds them up to the files that `measure` alone would have written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from quantkit.calibrate.collect import Collector, fold_files
from quantkit.calibrate.imatrix import read_imatrix
from quantkit.calibrate.statistics import Statistics, added
from quantkit.errors import OutputError
from quantkit.forward.hyper import Hyper
from quantkit.forward.matrices import Matrices
from quantkit.forward.spans import SPAN_TOKENS, Spans, hand_over, share_folder
from quantkit.forward.stream import Sequences, Stream
from quantkit.forward.sweep import Settings, Sweep, clear_work
from quantkit.forward.weights import Weights
from quantkit.run import fs

Progress = Callable[[float], None]  # told parts of the whole, up to 1

_PARTS = "part-"  # what the names of the layers' files begin with


@dataclass(frozen=True)
class Measuring:
    """A model, the text `chunks` i32[n_chunks, n_ctx], each a sequence of its own, and how.

    `identity` names the model and its text. `settings.work` is where files are left until the
    caller calls `clear`: a state of the same identity there is taken up.
    """

    weights: Weights
    hyper: Hyper
    chunks: npt.NDArray[np.int32]
    settings: Settings
    identity: str
    span_tokens: int = SPAN_TOKENS

    @property
    def spans(self) -> Spans:
        """The spans of the text."""
        return Spans.of(self.chunks.shape, self.span_tokens)

    @cached_property
    def digest(self) -> str:
        """Of all that the result depends on, sha256 in hex."""
        said = f"{self.identity} {self.spans} {self.settings.compute}".encode()
        return hashlib.sha256(said + np.ascontiguousarray(self.chunks).tobytes()).hexdigest()

    def parts(self, span: int | None = None) -> list[Path]:
        """The layers' files, the last for what lies behind them; of all spans or of one.

        The digest in a name keeps a layer apart from those of a run with other settings.
        """
        begin, end = f"{_PARTS}{self.digest[:16]}", "" if span is None else f"-{span:05}"
        layers = range(self.hyper.n_layers + 1)
        return [self.settings.work / f"{begin}-{layer:05}{end}.gguf" for layer in layers]


def measure(job: Measuring, progress: Progress, resumed: Callable[[int], None]) -> Statistics:
    """Statistics of all the text, by this process alone.

    They are read from the work folder when they are asked for. A killed run is continued, with the
    same result as if nothing had happened, and `resumed` told the number of layers that it has.
    """
    parts = job.parts()

    def start(first: int) -> None:
        if first:
            _require(parts[:first])
            resumed(first)

    collector = Collector()
    _pass(job, job.spans.all(), collector, start, lambda k: collector.save(parts[k]), progress)
    return _statistics(job)


def measure_share(job: Measuring, share: range, progress: Progress) -> None:
    """See the spans of a share, and leave a file for each of them and each layer.

    What an earlier run has left is not done again. Several runs of a share may be at work at once.
    """
    job.spans.check(share)
    work = job.settings.work
    parts = [job.parts(span) for span in share]
    if all(path.is_file() for paths in parts for path in paths):
        progress(1.0)
        return
    fs.make_folder(work)
    with share_folder(work, share) as folder:
        collector = Collector(len(share))

        def save(layer: int) -> None:
            mine = [folder / paths[layer].name for paths in parts]
            collector.save(*mine)
            for path in mine:
                hand_over(path, work)

        def start(first: int) -> None:
            _require([path for paths in parts for path in paths[:first]])

        _pass(
            replace(job, settings=replace(job.settings, work=folder)),
            share, collector, start, save, progress,
        )  # fmt: skip


def merge_shares(job: Measuring) -> Statistics:
    """Add up what all shares have left; the statistics, and the files, are those of `measure`.

    Raises `OutputError` where a span's file is missing.
    """
    of_spans = [job.parts(span) for span in job.spans.all()]
    for layer, part in enumerate(job.parts()):
        if not part.is_file():
            files = [paths[layer] for paths in of_spans]
            _require(files)
            fold_files(files, part)
    return _statistics(job)


def clear(work: Path) -> None:
    """Remove what measuring leaves in its work folder, whatever run it was of."""
    clear_work(work, f"{_PARTS}*.gguf*")


def _pass(
    job: Measuring,
    share: range,
    collector: Collector,
    start: Callable[[int], None],
    save: Callable[[int], None],
    progress: Progress,
) -> None:
    """Take a share through the model; `save` is called behind each layer and behind the last.

    `start` is told the layers that were done before.
    """
    hyper, settings = job.hyper, job.settings
    sequences = Sequences.share(job.chunks, job.spans, share)
    with torch.inference_mode():
        matrices = Matrices(job.weights, settings.compute, collector)
        rows = settings.rows_for(hyper, len(sequences), 1)
        stream = Stream(matrices, hyper, sequences, rows, collector.enter)
        sweep = Sweep([stream], collector, settings.work, f"{job.digest} {share}")
        first = sweep.start()
        start(first)
        progress(first / hyper.n_layers)
        fs.make_folder(settings.work)
        sweep.run(first, save, lambda part: progress(part / hyper.n_layers))
        stream.observe_output()
        save(hyper.n_layers)


def _statistics(job: Measuring) -> Statistics:
    read = [read_imatrix(part) for part in job.parts()]
    return Statistics(
        chunk_size=job.chunks.shape[1],
        n_tokens=job.chunks.size,
        sums=added([part.sums for part in read]),
        priors=added([part.priors for part in read]),
    )


def _require(parts: list[Path]) -> None:
    for part in parts:
        if not part.is_file():
            raise OutputError(
                "the saved work lacks this file",
                where=str(part),
                hint=f"remove the folder {part.parent} to start over",
            )
