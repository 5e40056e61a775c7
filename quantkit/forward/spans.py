"""Spans: how a text is shared among machines so that the result does not depend on how.

A span is a few whole sequences, and the unit of computation: no block of tokens crosses its end, so
what becomes of a token depends on its span alone. Whatever is summed up over tokens is summed up
span by span, and the spans' sums are added in their order, by whichever process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from quantkit.errors import OutputError, UsageError
from quantkit.run import fs

SPAN_TOKENS = 8192  # about; small enough to share, large enough for products to run at full speed

_FOLDERS = "share-"  # what the names of shares' folders begin with


@dataclass(frozen=True, slots=True)
class Spans:
    """A text of `n_seq` sequences of `n_ctx` tokens, `n_each` sequences to a span.

    The last span may be shorter. `n_each` must not depend on who computes what.
    """

    n_seq: int
    n_ctx: int
    n_each: int

    @classmethod
    def of(cls, shape: tuple[int, ...], n_tokens: int = SPAN_TOKENS) -> Spans:
        """Of chunks [n_seq, n_ctx]: as many in a span as `n_tokens` hold, at least one."""
        n_seq, n_ctx = shape
        return cls(n_seq, n_ctx, max(1, n_tokens // max(1, n_ctx)))

    def __len__(self) -> int:
        return (self.n_seq + self.n_each - 1) // self.n_each

    @property
    def n_tokens(self) -> int:
        """Of all spans."""
        return self.n_seq * self.n_ctx

    def all(self) -> range:
        """The share of a process that works alone."""
        return range(len(self))

    def chunks(self, share: range) -> slice:
        """The sequences of consecutive spans."""
        return slice(share.start * self.n_each, min(share.stop * self.n_each, self.n_seq))

    def ends(self, share: range) -> tuple[int, ...]:
        """Where each span of a share ends, in tokens from the share's first."""
        first = self.chunks(share).start
        stops = (self.chunks(range(span, span + 1)).stop for span in share)
        return tuple((stop - first) * self.n_ctx for stop in stops)

    def check(self, share: range) -> None:
        """Raise `UsageError` for what is no share of these spans."""
        if not 0 <= share.start < share.stop <= len(self) or share.step != 1:
            raise UsageError(f"{share} is no share of {len(self)} spans")


def shares(n_spans: int, n_workers: int) -> list[range]:
    """Consecutive spans for each of so many workers, as equal as can be; none is empty."""
    n = max(1, min(n_spans, n_workers))
    cuts = [n_spans * k // n for k in range(n + 1)]
    return [range(begin, end) for begin, end in pairwise(cuts) if begin < end]


@contextmanager
def share_folder(work: Path, share: range) -> Iterator[Path]:
    """A folder in `work` for a run of a share, which no other run of it has.

    A run that was killed finds its state there again; of one that went well only the empty folder
    stays. While another run of the same share is at work, this one has a folder of its own, which
    does not stay.
    """
    folder = work / f"{_FOLDERS}{share.start:05}-{share.stop:05}"
    with ExitStack() as stack:
        try:
            stack.enter_context(fs.claimed(folder))
        except OutputError:
            with fs.writing(work):
                folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=work))
            stack.callback(_remove, folder)
        yield folder
        fs.empty_folder(folder)  # not removed, for another run may be about to claim it


def hand_over(path: Path, folder: Path) -> None:
    """Move a whole file to a folder of the same file system, in place of one of its name."""
    target = folder / path.name
    with fs.writing(target):
        path.replace(target)
        fs.sync_folder(folder)


def clear_shares(work: Path) -> None:
    """Remove all folders of shares; nobody may be at work in them."""
    for folder in work.glob(f"{_FOLDERS}*"):
        _remove(folder)


def _remove(folder: Path) -> None:
    fs.empty_folder(folder)
    fs.remove_folder(folder)
