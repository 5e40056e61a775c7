"""Positional reads from many shards with few descriptors, safe from any thread.

No memory map: a map of a file that shrinks under the reader kills the process with SIGBUS, and its
resident pages cannot be told from the run's own memory.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from quantkit.errors import SourceError
from quantkit.source.folder import Folder
from quantkit.types import TensorRef

Bytes = npt.NDArray[np.uint8]

MAX_OPEN = 64
_EIO_RETRIES = 3
_EIO_PAUSE_S = 0.05  # doubled with every retry
_AHEAD_BYTES = 16 << 20
_CHANGED_HINT = "leave the checkpoint alone while it is converted, then run again"


class Shards(Protocol):
    """The shards of one checkpoint, wherever they are. Reading is safe from any thread."""

    @property
    def stamps(self) -> Mapping[str, tuple[int, int | str]]:
        """File -> its size and what tells its content from another, of those in use."""

    @property
    def n_bytes(self) -> int:
        """Size of all shards together."""

    def size(self, file: str) -> int:
        """Bytes of `file`."""

    def read(self, file: str, offset: int, n_bytes: int) -> Bytes:
        """Bytes `offset .. offset + n_bytes` of `file`, in an array of their own."""

    def will_open(self, files: Iterable[str]) -> None:
        """These files' headers are read next."""

    def lay_out(self, file: str, tensors: Iterable[TensorRef]) -> None:
        """Where a file's tensors lie, in the order of their bytes."""

    def will_read(self, tensors: Iterable[TensorRef]) -> None:
        """Tensors that are read from now on, in this order."""

    def close(self) -> None:
        """Release what is held. What has been read stays valid."""


@dataclass(slots=True)
class _Open:
    fd: int
    n_users: int = 0


class ReadAhead:
    """Which tensors the system should fetch now, of those that are read from now on, in order.

    The next 16 MiB behind the tensor that is being read. One that is larger is read for so long
    that the system sees for itself where that leads. Safe from any thread.
    """

    def __init__(self, tensors: Iterable[TensorRef] = ()) -> None:
        self._upcoming = iter(tensors)
        self._next: deque[TensorRef] = deque()  # fetched and not yet read
        self._lock = threading.Lock()

    def start(self) -> list[TensorRef]:
        """What to fetch before anything is read."""
        with self._lock:
            return self._fetched()

    def reading(self, file: str, offset: int) -> list[TensorRef]:
        """What to fetch as these bytes are read."""
        with self._lock:
            for n, ref in enumerate(self._next, 1):
                if ref.file == file and ref.begin <= offset < ref.end:
                    for _ in range(n):
                        self._next.popleft()
                    return self._fetched()
        return []

    def _fetched(self) -> list[TensorRef]:
        fetched = []
        while sum(ref.n_bytes for ref in self._next) < _AHEAD_BYTES:
            ref = next(self._upcoming, None)
            if ref is None:
                break
            self._next.append(ref)
            if ref.n_bytes <= _AHEAD_BYTES:
                fetched.append(ref)
        return fetched


class ShardFiles:
    """The shards of one folder. A file is held to the size and time it had when first opened."""

    def __init__(self, folder: Folder, max_open: int = MAX_OPEN) -> None:
        self.stamps: dict[str, tuple[int, int | str]] = {}  # file -> (bytes, mtime in ns)
        self._folder = folder
        self._max_open = max_open
        self._open: OrderedDict[str, _Open] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._closed = False
        self._ahead = ReadAhead()
        # Without posix_fadvise, as on macOS, pages are left to the system.
        n_pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "posix_fadvise") else 2**62
        self._n_memory = n_pages * os.sysconf("SC_PAGE_SIZE")

    @contextmanager
    def use(self, file: str) -> Iterator[int]:
        """A descriptor of `file` that stays open inside the `with` block."""
        with self._lock:
            entry = self._entry(file)
            entry.n_users += 1
        try:
            yield entry.fd
        finally:
            with self._lock:
                entry.n_users -= 1
                self._shrink()

    def read(self, file: str, offset: int, n_bytes: int) -> Bytes:
        """Bytes `offset .. offset + n_bytes` of `file`, in an array of their own.

        Raises `SourceError` if the file is shorter, has changed since it was first opened, or
        gives an I/O error four times in a row.
        """
        self._fetch(self._ahead.reading(file, offset))
        data = np.empty(n_bytes, np.uint8)
        with self.use(file) as fd:
            done = 0
            while done < n_bytes:
                n_read = _read_some(fd, data[done:], offset + done, file)
                if n_read == 0:
                    raise SourceError(
                        f"ends at byte {offset + done:,}; {n_bytes - done:,} more are expected",
                        where=file,
                        hint=_CHANGED_HINT,
                    )
                done += n_read
            self._check_unchanged(file, fd)
            if n_bytes and 2 * self.n_bytes > self._n_memory:
                # Of a model that does not fit, no page is there when it is wanted again.
                os.posix_fadvise(fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)
        return data

    def will_open(self, files: Iterable[str]) -> None:
        """See `Shards`; the system reads ahead by itself."""

    def lay_out(self, file: str, tensors: Iterable[TensorRef]) -> None:
        """See `Shards`."""

    def will_read(self, tensors: Iterable[TensorRef]) -> None:
        """See `Shards`."""
        if hasattr(os, "posix_fadvise"):
            self._ahead = ReadAhead(tensors)
            self._fetch(self._ahead.start())

    def close(self) -> None:
        """Close every descriptor that no thread is reading from; the rest follow their readers."""
        with self._lock:
            self._closed = True
            self._shrink()

    def size(self, file: str) -> int:
        """Bytes of `file` when it was first opened."""
        with self.use(file):
            return self.stamps[file][0]

    @property
    def n_bytes(self) -> int:
        """Size of all shards together."""
        return sum(size for size, _ in self.stamps.values())

    def _fetch(self, tensors: list[TensorRef]) -> None:
        for ref in tensors:
            with self.use(ref.file) as fd:
                os.posix_fadvise(fd, ref.begin, ref.n_bytes, os.POSIX_FADV_WILLNEED)

    def _entry(self, file: str) -> _Open:
        if self._closed:
            raise ValueError("the checkpoint is closed")
        entry = self._open.get(file)
        if entry is None:
            entry = _Open(self._folder.open_shard(file))
            self._open[file] = entry
            info = os.fstat(entry.fd)
            self.stamps.setdefault(file, (info.st_size, info.st_mtime_ns))
        self._open.move_to_end(file)
        return entry

    def _shrink(self) -> None:
        n_excess = len(self._open) - (0 if self._closed else self._max_open)
        if n_excess > 0:
            idle = [file for file, entry in self._open.items() if entry.n_users == 0]
            for file in idle[:n_excess]:
                os.close(self._open.pop(file).fd)

    def _check_unchanged(self, file: str, fd: int) -> None:
        info = os.fstat(fd)
        if (info.st_size, info.st_mtime_ns) != self.stamps[file]:
            raise SourceError(
                "has changed since the checkpoint was opened", where=file, hint=_CHANGED_HINT
            )


def _read_some(fd: int, target: Bytes, offset: int, file: str) -> int:
    """One positional read, tried again where the device reports a passing fault."""
    n_failed = 0
    while True:
        try:
            return os.preadv(fd, [target.data], offset)
        except OSError as error:
            if error.errno != errno.EIO or n_failed == _EIO_RETRIES:
                raise SourceError(
                    f"cannot be read at byte {offset:,}: {error.strerror}",
                    where=file,
                    hint="check the disk or the network file system, then run again",
                ) from error
        time.sleep(_EIO_PAUSE_S * 2**n_failed)
        n_failed += 1
