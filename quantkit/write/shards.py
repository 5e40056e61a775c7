"""The unfinished files of a plan, open for positional writes from any thread or machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.run import fs
from quantkit.run.closing import Closing
from quantkit.types import Plan, PlannedTensor


class PartialShards(Closing):
    """The partial files of a plan's shards, which somebody has laid out at their full size.

    Safe from any thread; knows nothing of a journal. Whoever writes flushes before anybody vouches
    for what was written: a failed flush is told to those who had the file open as it failed.
    Raises `OutputError` naming a file that is not there or has another size.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._plan = plan
        self._paths = [folder / shard.file for shard in plan.shards]
        self._fds: list[int] = []
        try:
            for path, shard in zip(self._paths, plan.shards, strict=True):
                self._fds.append(_opened(fs.partial_of(path), shard.n_bytes))
        except BaseException:
            self.close()
            raise

    def write_headers(self) -> None:
        """Write what precedes the first tensor of every file."""
        for fd, shard, path in zip(self._fds, self._plan.shards, self._paths, strict=True):
            fs.write_at(fd, shard.header, 0, path)

    def write(self, tensor: int, tile: int, data: memoryview) -> None:
        """Write all bytes of a tile to their place; `ValueError` for another number of bytes."""
        planned = self._plan.tensors[tensor]
        begin, n_bytes = tile_span(planned, tile)
        if data.nbytes != n_bytes:
            raise ValueError(f"{planned.spec.name}: tile of {data.nbytes} bytes, not {n_bytes}")
        fs.write_at(self._fds[planned.shard], data, begin, self._paths[planned.shard])

    def flush(self, shards: Iterable[int] | None = None) -> None:
        """Make what was written to these files, or to all, durable."""
        for shard in range(len(self._fds)) if shards is None else shards:
            with fs.writing(self._paths[shard]):
                os.fsync(self._fds[shard])

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def tile_span(tensor: PlannedTensor, tile: int) -> tuple[int, int]:
    """Absolute offset and length in bytes of a tile."""
    slab, first, last = tensor.tile(tile)
    begin = tensor.begin + (slab * tensor.slab_rows + first) * tensor.row_bytes
    return begin, (last - first) * tensor.row_bytes


def _opened(path: Path, n_bytes: int) -> int:
    with fs.writing(path):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        there = os.fstat(fd).st_size
    if there != n_bytes:
        os.close(fd)
        raise OutputError(
            f"{there} bytes, expected {n_bytes}",
            where=str(path),
            hint="it was cut or replaced meanwhile: run the same command again",
        )
    return fd
