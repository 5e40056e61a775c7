"""Reading a pinned repository's files by range, through the spool, ahead of who asks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice

from quantkit.errors import HubError
from quantkit.hub.client import Stopped
from quantkit.hub.fetch import Fetcher
from quantkit.hub.pieces import Layout, Span, lay_out, piece_bytes
from quantkit.hub.repo import Entry
from quantkit.hub.spool import DATA, HEAD, Spool, piece_name

N_CONNECTIONS = 4
_AHEAD = 4  # pieces
_BATCH = 16  # headers fetched at once
_Key = tuple[str, str, Span]  # kind of piece, path, range


class HubFiles:
    """Ranges of files. Safe from any thread; `fetcher` and `spool` belong to it until `close`."""

    def __init__(self, entries: dict[str, Entry], fetcher: Fetcher, spool: Spool) -> None:
        self._entries = entries
        self._fetcher = fetcher
        self._spool = spool
        self._n_piece = piece_bytes(spool.limit)
        self._layouts: dict[str, Layout] = {}
        self._order: list[_Key] = []  # the pieces in the order in which they will be read
        self._place: dict[_Key, int] = {}
        self._last: dict[str, Span] = {}
        self._flying: dict[_Key, Future[bytearray]] = {}
        self._flown: set[_Key] = set()  # never fetched ahead a second time
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(N_CONNECTIONS, thread_name_prefix="hub")

    def size(self, path: str) -> int:
        """Bytes of a file, by the listing."""
        return self._entries[path].size

    def etag(self, path: str) -> str:
        """The digest of a file, by the listing."""
        return self._entries[path].etag

    def read(self, path: str, begin: int, end: int, *, head: bool = False) -> bytes:
        """Bytes `begin .. end` of a file, which lie inside it. Raises as `Fetcher.read` does.

        `head` says that it is a header: one piece as it is, kept longer than others.
        """
        layout = self._layouts.get(path)
        if head or layout is None or not layout.bounds or end <= layout.bounds[0]:
            return self._part((HEAD, path, (begin, end)), 0, end - begin)
        parts = []
        for first, last in layout.spans(begin, end):
            lower, upper = max(begin, first), min(end, last)
            parts.append(self._part((DATA, path, (first, last)), lower - first, upper - first))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def fetch_whole(self, path: str) -> bytes:
        """All of a small file, past the spool; the caller has bounded its size."""
        entry = self._entries[path]
        return bytes(_result(self._pool.submit(self._fetcher.read, entry, 0, entry.size)))

    def lay_out(self, path: str, tensors: Iterable[tuple[str, int, int]]) -> None:
        """Tell where a file's tensors lie, (name, begin, end) in order, so as to cut it well."""
        self._layouts[path] = lay_out(tensors, self._n_piece)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Tell which ranges will be read and in which order, so that they are fetched ahead.

        Only files that are laid out.
        """
        place: dict[_Key, int] = {}
        for path, begin, end in ranges:
            for span in self._layouts[path].spans(begin, end):
                place.setdefault((DATA, path, span), len(place))
        self._place, self._order = place, list(place)

    def prefetch_heads(self, ranges: Sequence[tuple[str, int, int]]) -> None:
        """Fetch many headers at once, and wait for them."""
        for batch in (ranges[k : k + _BATCH] for k in range(0, len(ranges), _BATCH)):
            for future in [self._fly((HEAD, path, (begin, end))) for path, begin, end in batch]:
                if future is not None:
                    _result(future)

    def close(self) -> None:
        """Let go of what is in flight and wait for the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _part(self, key: _Key, begin: int, end: int) -> bytes:
        while True:
            stored = self._spool.read(self._name(key), begin, end)
            future = self._fly(key) if stored is None else None
            self._read_ahead(key)
            if stored is not None:
                return stored
            if future is not None:  # else it has come in between
                return bytes(memoryview(_result(future))[begin:end])

    def _fly(self, key: _Key) -> Future[bytearray] | None:
        """Fetch a piece, or wait with those who do; None where it is in the spool by now."""
        with self._lock:
            future = self._flying.get(key)
            if future is None and self._name(key) not in self._spool:
                future = self._flying[key] = self._pool.submit(self._fetch, key)
                self._flown.add(key)
            return future

    def _fetch(self, key: _Key) -> bytearray:
        _, path, (begin, end) = key
        try:
            data = self._fetcher.read(self._entries[path], begin, end)
            self._spool.put(self._name(key), data)
            return data
        finally:
            with self._lock:
                self._flying.pop(key, None)

    def _read_ahead(self, key: _Key) -> None:
        kind, path, span = key
        place = self._place.get(key)
        if place is not None:
            following: Iterable[_Key] = self._order[place + 1 : place + 1 + _AHEAD]
        elif kind is DATA:
            layout = self._layouts[path]
            last, self._last[path] = self._last.get(path), span
            # Only where reading goes on through the file: else it would be fetched in vain.
            goes_on = last is not None and last[1] == span[0]
            following = ((DATA, path, s) for s in islice(layout.after(span), 2 if goes_on else 0))
        else:
            return
        for other in following:
            with self._lock:
                if other in self._flown:
                    continue
                if len(self._flying) >= N_CONNECTIONS + _AHEAD:
                    return
            self._fly(other)

    def _name(self, key: _Key) -> str:
        kind, path, (begin, end) = key
        return piece_name(kind, self._entries[path].etag, begin, end)


def _result(future: Future[bytearray]) -> bytearray:
    try:
        return future.result()
    except (Stopped, CancelledError):
        raise HubError("the run is being stopped") from None
