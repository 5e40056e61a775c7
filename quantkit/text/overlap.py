"""How much of a test text is in the text that a model was calibrated with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.errors import UsageError
from quantkit.text.tokens import Ids, TokenSet

WINDOW = 32
_BATCH = 1 << 16  # windows compared at once

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Overlap:
    """`share` of the second set's windows that occur in the first, and one of them, i32[window].

    `example` is the first such window, None where there is none.
    """

    share: float
    n_windows: int
    n_shared: int
    example: Ids | None


def overlap(a: TokenSet, b: TokenSet, window: int = WINDOW) -> Overlap:
    """Which windows of `window` consecutive tokens of `b` occur anywhere in `a`; exact.

    Sets of different tokenizers cannot be compared (`UsageError`). Sets shorter than a window
    have none.
    """
    if a.tokenizer != b.tokenizer:
        raise UsageError(f"{a.name} and {b.name} were made with different tokenizers")
    if window < 1:
        raise UsageError(f"a window of {window} tokens")
    if min(len(a.ids), len(b.ids)) < window:
        return Overlap(0.0, max(len(b.ids) - window + 1, 0), 0, None)
    shared = _occurs(_windows(a.ids, window), _windows(b.ids, window))
    n_shared = int(shared.sum())
    first = int(shared.argmax())
    example = b.ids[first : first + window].copy() if n_shared else None
    return Overlap(n_shared / len(shared), len(shared), n_shared, example)


def refuse_overlap(
    train: TokenSet, test: TokenSet, limit: float = 0.01, *, force: bool = False
) -> Overlap:
    """The overlap; `UsageError` where more than `limit` of `test` is in `train`, unless forced."""
    found = overlap(train, test)
    if found.share > limit and not force:
        raise UsageError(
            f"{found.share:.2%} of {test.name}'s windows of {WINDOW} tokens are in {train.name}, "
            "with which the statistics were made; scores on it would flatter",
            hint=f"measure with another text; at most {limit:.2%} may be shared",
        )
    return found


def _windows(ids: Ids, window: int) -> Ids:
    """A view i32[n, window]."""
    return np.lib.stride_tricks.sliding_window_view(ids, window)


def _hashes(windows: Ids) -> Hashes:
    """A polynomial of the mixed ids modulo 2^64 (Horner's rule over columns), u64[n]."""
    hashes = np.zeros(len(windows), np.uint64)
    for k in range(windows.shape[1]):
        mixed = windows[:, k].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        hashes = hashes * np.uint64(0xD6E8FEB86659FD93) + mixed
    return hashes


def _occurs(a: Ids, b: Ids) -> npt.NDArray[np.bool_]:
    """Which rows of `b` are rows of `a`. Hashes find candidates, tokens decide."""
    hashes = _hashes(a)
    order = np.argsort(hashes, kind="stable")
    order = order[~_repeats(a, hashes, order)]
    hashes = hashes[order]
    wanted = _hashes(b)
    place = np.searchsorted(hashes, wanted, "left")
    end = np.searchsorted(hashes, wanted, "right")
    found = np.zeros(len(b), np.bool_)
    # One round settles it unless different windows share a hash.
    while (open_ := np.flatnonzero(~found & (place < end))).size:
        found[open_] = _equal(a, order[place[open_]], b, open_)
        place[open_] += 1
    return found


def _repeats(a: Ids, hashes: Hashes, order: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the rows, in this order by hash, are the same as the one before."""
    result = np.zeros(len(order), np.bool_)
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    result[same + 1] = _equal(a, order[same], a, order[same + 1])
    return result


def _equal(
    a: Ids, rows_a: npt.NDArray[np.int64], b: Ids, rows_b: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Row by row, in batches: a window is a view, a selection of them is not."""
    result = np.empty(len(rows_a), np.bool_)
    for i in range(0, len(rows_a), _BATCH):
        part = slice(i, i + _BATCH)
        result[part] = (a[rows_a[part]] == b[rows_b[part]]).all(axis=1)
    return result
