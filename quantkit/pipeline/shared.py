"""Calibration and evaluation shared among processes by spans of their text; see `forward.spans`.

A shared job is plain data that goes to another machine. What is opened of it there does shares of
the text and leaves files in the job's work folder, on storage that all machines see under one path.
Who hands out the shares is a `Spread`; whatever it does, and however often, the result is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from quantkit import __version__
from quantkit.errors import SourceError
from quantkit.forward.matrices import Compute
from quantkit.forward.spans import Spans, shares
from quantkit.hub.ref import HubRef
from quantkit.pipeline.opening import Running

TOKENS = "tokens.safetensors"  # in the work folder: the text for all who share it

Progress = Callable[[float], None]  # told parts of the whole
Ref = Path | HubRef


class ShareWorker(Protocol):
    """Does shares of a job; a model stays open from one to the next."""

    @property
    def proof(self) -> str:
        """Equal for workers that give the same bits."""

    def run(self, share: range) -> None:
        """Do consecutive spans, and leave what came of them. May be repeated at any time."""

    def close(self) -> None:
        """Let go of everything."""


class OpenedWorker:
    """What workers of shares have in common: their proof, and what they hold open."""

    def __init__(self, compute: Compute, stack: ExitStack) -> None:
        self._compute, self._stack = compute, stack

    @cached_property
    def proof(self) -> str:
        """See `ShareWorker`."""
        return proof_of(self._compute)

    def close(self) -> None:
        """See `ShareWorker`."""
        self._stack.close()


class SharedJob(Protocol):
    """What a worker has to know, as plain data; `n_threads` are for each worker."""

    @property
    def n_threads(self) -> int | None:
        """None leaves torch as it is."""

    def opened(self) -> ShareWorker:
        """A worker at it. Raises what opening raises."""


# Has a job's so many spans done, in shares, and yields each share when it is done.
Spread = Callable[[SharedJob, int], Iterable[range]]


def in_turn(n_workers: int = 1) -> Spread:
    """All shares one after the other in this process, cut as for so many workers."""

    def spread(job: SharedJob, n_spans: int) -> Iterator[range]:
        worker = job.opened()
        try:
            for share in shares(n_spans, n_workers):
                worker.run(share)
                yield share
        finally:
            worker.close()

    return spread


def have_done(spread: Spread, job: SharedJob, spans: Spans, progress: Progress) -> None:
    """Have all spans done."""
    for share in spread(job, len(spans)):
        mine = spans.chunks(share)
        progress((mine.stop - mine.start) / spans.n_seq)


def use_threads(n_threads: int | None) -> None:
    """Let torch compute with so many."""
    if n_threads is not None:
        torch.set_num_threads(n_threads)


def require_same(what: str, mine: str, theirs: str) -> None:
    """Raise `SourceError` where a worker's identity of model and text is not the job's."""
    if mine != theirs:
        raise SourceError(
            "is not what the run was begun with, seen by a worker",
            where=what,
            hint="all machines must see the same files, of the same time, under one path, and "
            "compute on the same kind of device (--device)",
        )


def pinned(running: Running) -> Running:
    """The same with the device that `auto` means here, so that it means no other elsewhere."""
    return replace(running, device=str(running.compute().device))


def proof_of(compute: Compute) -> str:
    """A sha256 of versions and of products of some heights, whose last bits tell processors apart.

    It also depends on the number of threads where a product does.
    """
    digest = hashlib.sha256(f"{__version__} {torch.__version__} {compute}".encode())
    maker = torch.Generator().manual_seed(0)
    x, w = (torch.randn(512, 512, generator=maker).to(compute.device, compute.dtype) for _ in "xw")
    for height in (1, 7, 170, 512):
        y = (x[:height] @ w.T).float()
        y = torch.softmax(y, -1) * torch.rsqrt(y.square().mean(-1, keepdim=True))
        digest.update(y.cpu().numpy().tobytes())
    return digest.hexdigest()
