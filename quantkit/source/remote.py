"""The shards of a checkpoint on the Hub: `ShardFiles`'s twin, over ranges of a pinned commit."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from quantkit.errors import SourceError
from quantkit.hub.folder import HubFolder
from quantkit.source.files import Bytes
from quantkit.types import TensorRef

_MOST_HEADER_BYTES = 4 << 20  # of a header that is fetched with others at once; more come alone


class HubShards:
    """See `Shards`. The folder, and with it what is in flight, belongs to whoever opened it."""

    def __init__(self, folder: HubFolder, prefix: str = "") -> None:
        self.stamps: dict[str, tuple[int, int | str]] = {}
        self._folder = folder
        self._prefix = prefix  # of names in the repository: a folder and a slash
        self._files = folder.files

    @property
    def n_bytes(self) -> int:
        """Size of all shards together."""
        return sum(size for size, _ in self.stamps.values())

    def size(self, file: str) -> int:
        """Bytes of `file`, by the Hub's listing."""
        path = self._prefix + file
        if path not in self._folder.repo.entries:
            raise SourceError(
                "is in the index but not in the repository",
                where=f"{self._folder}: {path}",
                hint="the upload is incomplete; choose another --revision",
            )
        if file not in self.stamps:
            self.stamps[file] = (self._files.size(path), self._files.etag(path))
        return self.stamps[file][0]

    def read(self, file: str, offset: int, n_bytes: int) -> Bytes:
        """Bytes `offset .. offset + n_bytes`, as u8[n_bytes] of the caller's own."""
        n_left = self.size(file) - offset
        if n_bytes > n_left:
            raise SourceError(
                f"{n_bytes:,} bytes are expected where {max(0, n_left):,} are left",
                where=f"{self._folder}: {file}",
            )
        data = self._files.read(self._prefix + file, offset, offset + n_bytes)
        return np.frombuffer(data, np.uint8).copy()

    def will_open(self, files: Iterable[str]) -> None:
        """Fetch the headers, many at once."""
        sizes = {self._prefix + file: self.size(file) for file in files}
        self._files.prefetch_heads([(file, 0, 8) for file, size in sizes.items() if size >= 8])
        heads = []
        for file, size in sizes.items():
            end = 8 + int.from_bytes(self._files.read(file, 0, 8), "little") if size >= 8 else 0
            if 8 < end <= min(size, _MOST_HEADER_BYTES):
                heads.append((file, 8, end))
        self._files.prefetch_heads(heads)

    def lay_out(self, file: str, tensors: Iterable[TensorRef]) -> None:
        """See `Shards`."""
        self._files.lay_out(
            self._prefix + file, [(ref.name, ref.begin, ref.end) for ref in tensors]
        )

    def will_read(self, tensors: Iterable[TensorRef]) -> None:
        """See `Shards`."""
        self._files.expect((self._prefix + ref.file, ref.begin, ref.end) for ref in tensors)

    def close(self) -> None:
        """See `Shards`."""
