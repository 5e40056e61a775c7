"""Writes shards positionally under a temporary name; they get their final names all at once.

LAID OUT (the plan) -> OPEN (`ShardWriter(...)`) -> tiles in any order -> `commit()`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.run import fs
from quantkit.run.closing import Closing
from quantkit.run.journal import Journal
from quantkit.types import Plan, PlannedTensor
from quantkit.write.manifest import dump_manifest, load_manifest, manifest_path
from quantkit.write.record import Provenance, manifest_of

# Bytes between two barriers that make finished tiles durable: what a power cut can cost.
_SYNC_BYTES = 4 << 30


class ShardWriter(Closing):
    """The open output of one plan: partial files, and the journal of what is in them.

    A context manager. Leaving it without `commit()` keeps partial files and journal, so that
    the same plan can be opened again and goes on.
    """

    def __init__(self, folder: Path, plan: Plan, *, restart: bool = False) -> None:
        self.plan = plan
        self._folder = folder
        self._paths = [folder / shard.file for shard in plan.shards]
        self._unsynced = 0
        self._fds: list[int] = []
        fs.make_folder(folder)
        self._journal = Journal(journal_path(folder, plan.stem), plan.digest, restart=restart)
        try:
            if not self._journal.done:
                self._discard_leftovers()
            partials = [fs.partial_of(path) for path in self._paths]
            fs.require_space(folder, plan.n_bytes, sum(map(fs.allocated, partials)))
            self._forget_lost_files()
            for path, shard in zip(self._paths, plan.shards, strict=True):
                fd = fs.open_sized(fs.partial_of(path), shard.n_bytes)
                self._fds.append(fd)
                fs.write_at(fd, shard.header, 0, path)
        except BaseException:
            self.close()
            raise

    @property
    def work(self) -> Path:
        """Where what else an unfinished run needs may lie; removed when the files are complete."""
        return self._folder / f".{self.plan.stem}.work"

    def missing(self) -> Iterator[tuple[int, int]]:
        """(tensor, tile) of everything that is not written yet, in file order."""
        for number, tensor in enumerate(self.plan.tensors):
            for tile in range(tensor.n_tiles):
                if (number, tile) not in self._journal.done:
                    yield number, tile

    def n_done_bytes(self) -> int:
        """Bytes of tiles that earlier runs wrote."""
        return sum(
            tile_span(self.plan.tensors[tensor], tile)[1] for tensor, tile in self._journal.done
        )

    def write(self, tensor: int, tile: int, data: memoryview, digest: bytes) -> None:
        """Write a tile and record it with the sha256 of its bytes.

        Now and then makes what is written durable; so one thread writes, and no tile can slip
        between the flush and the line that vouches for it.
        """
        planned = self.plan.tensors[tensor]
        begin, n_bytes = tile_span(planned, tile)
        if data.nbytes != n_bytes:
            raise ValueError(f"{planned.spec.name}: tile of {data.nbytes} bytes, not {n_bytes}")
        fs.write_at(self._fds[planned.shard], data, begin, self._paths[planned.shard])
        self._journal.record(tensor, tile, digest)
        self._journal.done[tensor, tile] = digest
        self._unsynced += n_bytes
        if self._unsynced >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Make every recorded tile durable."""
        try:
            for fd, path in zip(self._fds, self._paths, strict=True):
                with fs.writing(path):
                    os.fsync(fd)
        except OutputError:
            # After a failed flush the kernel takes the pages for clean: the next would succeed.
            self._journal.doubt()
            raise
        self._journal.sync()
        self._unsynced = 0

    def commit(self, provenance: Provenance) -> list[Path]:
        """Flush everything, write the manifest and give the files their final names."""
        if next(self.missing(), None) is not None:
            raise OutputError("tiles are missing", where=str(self._journal.path))
        self.sync()
        recorded = manifest_path(self._folder, self.plan.stem)
        # What is replaced goes first: no shard of it may stand beside one of these.
        for path in (recorded, *self._paths):
            fs.remove(path)
        with fs.writing(self._folder):
            fs.sync_folder(self._folder)
        self._journal.sync(seal=True)
        manifest = manifest_of(self.plan, self._journal.done, provenance)
        for path in self._paths:
            fs.publish(path)
        fs.write_whole(recorded, dump_manifest(manifest))
        self._discard_work()  # the journal goes last: without it nobody looks here again
        fs.remove(self._journal.path)
        return self._paths

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._journal.close()

    def _discard_leftovers(self) -> None:
        """Remove what another run left, which may have been cut into other shards.

        Written over it would not do: what stands between tensors has to be zero.
        """
        self._discard_work()
        ours = re.compile(re.escape(self.plan.stem) + r"(-\d{5}-of-\d{5})?\.gguf" + fs.PARTIAL)
        for path in self._folder.iterdir():
            if ours.fullmatch(path.name):
                fs.remove(path)

    def _discard_work(self) -> None:
        fs.empty_folder(self.work)
        fs.remove_folder(self.work)

    def _forget_lost_files(self) -> None:
        """Drop records of tiles whose partial file was removed or cut; take back named shards.

        A run that died between two renames has finished shards under their final names.
        """
        lost = set()
        for number, (path, shard) in enumerate(zip(self._paths, self.plan.shards, strict=True)):
            partial = fs.partial_of(path)
            if self._journal.sealed and not partial.exists() and path.exists():
                fs.unpublish(path)
            if not partial.exists() or partial.stat().st_size != shard.n_bytes:
                lost.add(number)
        known = {number for number, _ in self._journal.done}
        self._journal.forget(
            {number for number in known if self.plan.tensors[number].shard in lost}
        )


def tile_span(tensor: PlannedTensor, tile: int) -> tuple[int, int]:
    """Absolute offset and length in bytes of a tile."""
    slab, first, last = tensor.tile(tile)
    begin = tensor.begin + (slab * tensor.slab_rows + first) * tensor.row_bytes
    return begin, (last - first) * tensor.row_bytes


def journal_path(folder: Path, stem: str) -> Path:
    """Where the journal of an unfinished conversion lies."""
    return folder / f".{stem}.journal"


def is_written(folder: Path, plan: Plan, *, force: bool) -> bool:
    """Whether the folder already holds exactly this plan's finished files.

    Raises `OutputError` if files of those names hold something else, unless `force`.
    """
    taken = [shard.file for shard in plan.shards if (folder / shard.file).exists()]
    if journal_path(folder, plan.stem).exists() or not taken:
        return False
    path = manifest_path(folder, plan.stem)
    if path.exists() and len(taken) == len(plan.shards) and load_manifest(path).plan == plan.digest:
        return True
    if not force:
        raise OutputError(
            "exists and was made from another source, recipe or layout",
            where=str(folder / taken[0]),
            hint="choose another folder with -o, or pass --force to replace it when done",
        )
    return False
