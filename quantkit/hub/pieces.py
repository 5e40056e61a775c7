"""Where the tensors of a file are cut into the pieces that are fetched.

A piece ends where a tensor does, so that nothing is fetched that nobody reads. Tensors that are
read together share one: packed values, scales and shape of a weight, and runs of tiny tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_PIECE = 16 << 20
_MIN_PIECE = 4 << 10
_TINY = 64  # a tensor of less than a piece by this factor may share one with other such

Span = tuple[int, int]  # begin, end


def piece_bytes(limit: int) -> int:
    """How large a piece may be in a spool of `limit` bytes: a few must fit for every thread."""
    return max(_MIN_PIECE, min(MAX_PIECE, limit // 16))


@dataclass(frozen=True, slots=True)
class Layout:
    """The bounds of a file's pieces, ascending, from the first tensor to the last."""

    bounds: tuple[int, ...]

    def spans(self, begin: int, end: int) -> Iterator[Span]:
        """The pieces that hold bytes `begin .. end`; what lies outside all is one as it is."""
        while begin < end:
            k = bisect_right(self.bounds, begin)
            if k == 0 or k == len(self.bounds):
                stop = end if k else min(end, self.bounds[0] if self.bounds else end)
                yield begin, stop
                begin = stop
            else:
                yield self.bounds[k - 1], self.bounds[k]
                begin = self.bounds[k]

    def after(self, span: Span) -> Iterator[Span]:
        """The pieces that follow one, in the file's order."""
        k = bisect_right(self.bounds, span[0])
        if k > 0 and self.bounds[k - 1] == span[0]:
            yield from zip(self.bounds[k:], self.bounds[k + 1 :], strict=False)


def lay_out(tensors: Iterable[tuple[str, int, int]], n_piece: int) -> Layout:
    """Cut a file's tensors, (name, begin, end) in the order of their bytes, without holes."""
    bounds: list[int] = []
    stem, is_tiny, last = "", False, 0
    for name, begin, end in tensors:
        if begin == end:
            continue
        tiny = end - begin <= n_piece // _TINY
        own = name.rpartition(".")[0] or name
        joins = (
            bounds
            and begin == last
            and end - bounds[-1] <= n_piece
            and (own == stem or (tiny and is_tiny))
        )
        if not joins:
            bounds.append(begin)
            is_tiny = True
            while end - bounds[-1] > n_piece:
                bounds.append(bounds[-1] + n_piece)
        stem, is_tiny, last = own, is_tiny and tiny, end
    if bounds:
        bounds.append(last)
    return Layout(tuple(bounds))
