"""A bounded folder of fetched pieces: what a run has of its source on disk.

A piece is a file named after its content (the file's digest and the range), written under another
name, and followed by its own SHA-256, which is checked when a later run finds it. When room is
wanted, pieces go that have been read in whole, then those that were not read for longest, and the
headers of files last.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from quantkit.run import fs

_SUFFIX = ".piece"
_DIGEST_BYTES = 32
HEAD, DATA = "head", "data"  # kinds of pieces


@dataclass(slots=True)
class _Piece:
    n_bytes: int  # with the digest behind it
    n_read: int = 0
    checked: bool = True


class Spool:
    """Pieces in `folder`, which is made; never more than `limit` bytes of them. For any thread."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._pieces: OrderedDict[str, _Piece] = OrderedDict()  # least recently read first
        self._n_bytes = 0
        self._n_reserved = 0
        self._lock = threading.Lock()
        fs.make_folder(folder)
        self._find()

    @property
    def n_bytes(self) -> int:
        """Bytes on disk now, with what is being written."""
        return self._n_bytes + self._n_reserved

    def read(self, name: str, begin: int, end: int) -> bytes | None:
        """Bytes `begin .. end` of a piece; None if it is not there, or not whole."""
        with self._lock:
            piece = self._pieces.get(name)
            if piece is None:
                return None
            self._pieces.move_to_end(name)
            piece.n_read += end - begin
            try:
                fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._forget(name)
                return None
        try:
            # Once open it stays readable, whoever needs its room.
            if not piece.checked and not _is_whole(fd, piece.n_bytes):
                with self._lock:
                    self._forget(name)
                return None
            piece.checked = True
            data = os.pread(fd, end - begin, begin)
        finally:
            os.close(fd)
        return data if len(data) == end - begin else None

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._pieces

    def put(self, name: str, data: bytes | bytearray) -> None:
        """Keep a piece, if there can be room for it; raises `OutputError` if the disk refuses."""
        n_bytes = len(data) + _DIGEST_BYTES
        if not self.reserve(n_bytes):
            return
        path = self._path(name)
        try:
            with fs.writing(path):
                temporary = fs.partial_of(path)
                with temporary.open("wb", buffering=0) as file:
                    for part in (data, hashlib.sha256(data).digest()):
                        _write(file.fileno(), part)
                temporary.replace(path)
            with self._lock:
                self._pieces[name] = _Piece(n_bytes)
                self._n_bytes += n_bytes
        finally:
            self.release(n_bytes)

    def reserve(self, n_bytes: int) -> bool:
        """Make room for so many bytes, for this or another use of the disk; False if there is none.

        Other pieces are removed for it.
        """
        with self._lock:
            if self._n_reserved + n_bytes > self.limit:
                return False
            for name in self._in_order_of_worth():
                if self._n_bytes + self._n_reserved + n_bytes <= self.limit:
                    break
                self._remove(name)
            self._n_reserved += n_bytes
            return True

    def release(self, n_bytes: int) -> None:
        """Give reserved room back."""
        with self._lock:
            self._n_reserved -= n_bytes

    def clear(self) -> None:
        """Remove all pieces, and the folder if nothing else is in it."""
        with self._lock:
            for name in list(self._pieces):
                self._remove(name)
        fs.remove_folder(self.folder)

    def _in_order_of_worth(self) -> list[str]:
        def worth(name: str) -> tuple[bool, bool]:
            piece = self._pieces[name]
            return name.startswith(HEAD), piece.n_read < piece.n_bytes - _DIGEST_BYTES

        return sorted(self._pieces, key=worth)  # stable: the least recently read go first

    def _find(self) -> None:
        """What an earlier run left: pieces to be checked when they are read, and scraps."""
        found: list[tuple[int, str, int]] = []
        for path in self.folder.glob(f"*{_SUFFIX}*"):
            info = path.lstat()
            if path.name.endswith(_SUFFIX) and path.is_file() and not path.is_symlink():
                found.append((info.st_mtime_ns, path.name.removesuffix(_SUFFIX), info.st_size))
            else:
                fs.remove(path)
        for _, name, n_bytes in sorted(found):
            self._pieces[name] = _Piece(n_bytes, checked=False)
            self._n_bytes += n_bytes
        if self.reserve(0):
            self.release(0)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _remove(self, name: str) -> None:
        fs.remove(self._path(name))
        self._n_bytes -= self._pieces.pop(name).n_bytes

    def _forget(self, name: str) -> None:
        if name in self._pieces:
            self._remove(name)


def piece_name(kind: str, etag: str, begin: int, end: int) -> str:
    """The name of a range of a file that has this digest."""
    return f"{kind}-{hashlib.sha256(f'{etag} {begin} {end}'.encode()).hexdigest()[:40]}"


def _is_whole(fd: int, n_bytes: int) -> bool:
    digest = hashlib.sha256()
    n_left = n_bytes - _DIGEST_BYTES
    at = 0
    while n_left > 0 and (part := os.pread(fd, min(1 << 20, n_left), at)):
        digest.update(part)
        at, n_left = at + len(part), n_left - len(part)
    return n_left == 0 and os.pread(fd, _DIGEST_BYTES + 1, at) == digest.digest()


def _write(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
