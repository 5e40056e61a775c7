"""Shares of a comparison: a file for each span of the text, and what they make together."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.errors import OutputError
from quantkit.evaluate.compare import Comparison, Progress, Traces, compare_share
from quantkit.evaluate.logits_file import BaseFile
from quantkit.evaluate.scores import Scores
from quantkit.forward.spans import hand_over, share_folder
from quantkit.forward.state import (
    Arrays,
    first_line,
    read_arrays,
    shapes_of,
    whole_state,
    write_state,
)
from quantkit.forward.sweep import clear_work
from quantkit.run import fs

_PARTS = "scores-"  # what the names of the spans' files begin with
_SCORES = ("nll_base", "nll", "kld", "same_top", "dp")


def run_share(job: Comparison, share: range, progress: Progress) -> None:
    """Compare on the spans of a share, and leave a file for each of them in `job.settings.work`.

    What an earlier run has left is not done again. Several runs of a share may be at work at once.
    """
    work, digest = job.settings.work, digest_of(job)
    if all(_read(job, digest, span) is not None for span in share):
        progress(1.0)
        return
    fs.make_folder(work)
    with share_folder(work, share) as folder:
        mine = replace(job, settings=replace(job.settings, work=folder))
        parts, traces, _ = compare_share(mine, share, progress)
        for span, scores, sums in zip(share, parts, traces.sums, strict=True):
            arrays: Arrays = {name: getattr(scores, name) for name in _SCORES}
            arrays["traces"] = sums
            path = folder / _name(digest, span)
            line = first_line(_said(digest, span), shapes_of(arrays))
            write_state(path, [line, *(array.tobytes() for array in arrays.values())])
            hand_over(path, work)


def merge_shares(job: Comparison) -> tuple[Scores, Traces | None]:
    """What all shares have found: scores and traces are those of `compare`, bit for bit.

    Raises `OutputError` where a span's file is missing or damaged.
    """
    digest, spans = digest_of(job), job.text.spans
    traces, parts = Traces(job.traced, job.n_layers, len(spans)), []
    for span in spans.all():
        arrays = _read(job, digest, span)
        if arrays is None:
            raise OutputError(
                "the saved work lacks this file, or it is damaged",
                where=str(job.settings.work / _name(digest, span)),
                hint="run the same command again: it is made anew",
            )
        parts.append(Scores(*(arrays[name] for name in _SCORES)))
        traces.sums[span] = arrays["traces"]
    return Scores.join(parts), None if isinstance(job.base, BaseFile) else traces


def clear(work: Path) -> None:
    """Remove what comparing leaves in its work folder, whatever run it was of."""
    clear_work(work, f"{_PARTS}*")


def digest_of(job: Comparison) -> str:
    """Of all that scores depend on, sha256 in hex."""
    text, compute = job.text, job.settings.compute
    said = f"{job.identity} {text.spans} {compute} {len(job.quants)} {job.traced}"
    digest = hashlib.sha256(said.encode())
    for ids in (text.chunks, text.inputs):
        digest.update(np.ascontiguousarray(ids).tobytes())
    return digest.hexdigest()


def _name(digest: str, span: int) -> str:
    return f"{_PARTS}{digest[:16]}-{span:05}"


def _said(digest: str, span: int) -> dict[str, Any]:
    return {"digest": digest, "span": span}


def _read(job: Comparison, digest: str, span: int) -> Arrays | None:
    """What a span's file holds; None if there is none or it is not whole."""
    like = _like(job, span)
    line = first_line(_said(digest, span), shapes_of(like))
    n_bytes = sum(array.nbytes for array in like.values())
    path = job.settings.work / _name(digest, span)
    with whole_state(path, [line], n_bytes) as found:
        return None if found is None else read_arrays(found[1], like)


def _like(job: Comparison, span: int) -> Arrays:
    """Arrays of the types and shapes that a span's file holds."""
    n, n_quants = len(job.text.rows(span)), len(job.quants)
    many: npt.NDArray[np.float64] = np.broadcast_to(0.0, (n_quants, n))
    return {
        "nll_base": many[0],
        "nll": many,
        "kld": many,
        "same_top": np.broadcast_to(False, (n_quants, n)),
        "dp": many,
        "traces": np.broadcast_to(0.0, (job.n_layers, job.traced, 4)),
    }
