"""Writes shards positionally under a temporary name; they get their final names all at once.

LAID OUT (the plan) -> OPEN (`ShardWriter(...)`) -> tiles in any order -> `commit()`.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.run import fs
from quantkit.run.closing import Closing
from quantkit.run.journal import Journal
from quantkit.types import Plan
from quantkit.write.manifest import dump_manifest, load_manifest, manifest_path
from quantkit.write.record import Provenance, manifest_of
from quantkit.write.shards import PartialShards, tile_span

# Bytes that wait for a flush when one begins, and when writers wait for it: what a power cut costs.
_SYNC_BYTES = 1 << 30
_MOST_SYNCS = 4


class ShardWriter(Closing):
    """The open output of one plan: partial files, and the journal of what is in them.

    Tiles are written from any thread, while one more makes durable what is there. A flush that
    fails is told to everybody who writes, syncs or commits from then on.

    A context manager. Leaving it without `commit()` keeps partial files and journal, so that
    the same plan can be opened again and goes on.
    """

    def __init__(self, folder: Path, plan: Plan, *, restart: bool = False) -> None:
        self.plan = plan
        self._folder = folder
        self._paths = [folder / shard.file for shard in plan.shards]
        self._shards: PartialShards | None = None
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="quantkit-flush")
        self._changed = threading.Condition()
        self._n_fresh = self._n_flushing = 0  # bytes
        self._is_asked = False  # for a flush that has not begun
        self._failure: BaseException | None = None
        fs.make_folder(folder)
        n_tiles = [tensor.n_tiles for tensor in plan.tensors]
        path = journal_path(folder, plan.stem)
        self._journal = Journal(path, plan.digest, n_tiles, restart=restart)
        try:
            if not self._journal.done:
                self._discard_leftovers()
            partials = [fs.partial_of(path) for path in self._paths]
            fs.require_space(folder, plan.n_bytes, sum(map(fs.allocated, partials)))
            self._forget_lost_files()
            for partial, shard in zip(partials, plan.shards, strict=True):
                os.close(fs.open_sized(partial, shard.n_bytes))
            self._shards = PartialShards(folder, plan)
            self._shards.write_headers()
        except BaseException:
            self.close()
            raise

    @property
    def work(self) -> Path:
        """Where what else an unfinished run needs may lie; removed when the files are complete."""
        return self._folder / f".{self.plan.stem}.work"

    def missing(self) -> Iterator[tuple[int, int]]:
        """(tensor, tile) of everything that is not written yet, in file order."""
        done = self._journal.done
        for number, tensor in enumerate(self.plan.tensors):
            for tile in range(tensor.n_tiles):
                if (number, tile) not in done:
                    yield number, tile

    def n_done_bytes(self) -> int:
        """Bytes of tiles that earlier runs wrote."""
        return sum(tile_span(self.plan.tensors[tensor], n)[1] for tensor, n in self._journal.done)

    def write(self, tensor: int, tile: int, data: memoryview, digest: bytes) -> None:
        """Write a tile and record it with the sha256 of its bytes, from any thread.

        Waits where the disk is so far behind that what is not durable would grow without bound.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._n_unsure < self._most_unsure)
            self._raise_failure()
        self._files().write(tensor, tile, data)
        self.record(tensor, tile, digest)

    def record(self, tensor: int, tile: int, digest: bytes) -> None:
        """Note a tile whose bytes are in its file; another process has flushed what it wrote."""
        with self._changed:
            self._raise_failure()  # of what was written before a flush failed, nothing is known
            self._journal.record(tensor, tile, digest)
            self._n_fresh += tile_span(self.plan.tensors[tensor], tile)[1]
            if self._n_fresh >= _SYNC_BYTES and not self._is_asked:
                self._is_asked = True
                self._flusher.submit(self._flush)

    def sync(self) -> None:
        """Make every recorded tile durable."""
        self._raise_failure()
        self._flusher.submit(self._flush).result()

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
        self._journal.seal()
        manifest = manifest_of(self.plan, self._journal.done, provenance)
        for path in self._paths:
            fs.publish(path)
        fs.write_whole(recorded, dump_manifest(manifest))
        self._discard_work()  # the journal goes last: without it nobody looks here again
        fs.remove(self._journal.path)
        return self._paths

    def close(self) -> None:
        """Close all files, when the flush that is under way has ended."""
        self._flusher.shutdown(cancel_futures=True)
        if self._shards is not None:
            self._shards.close()
        self._journal.close()

    @property
    def _n_unsure(self) -> int:
        """Bytes that are recorded and not durable."""
        return self._n_fresh + self._n_flushing

    @property
    def _most_unsure(self) -> int:
        return _MOST_SYNCS * _SYNC_BYTES

    def _files(self) -> PartialShards:
        if self._shards is None:
            raise ValueError("the output is closed")
        return self._shards

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _flush(self) -> None:
        """Make durable what is recorded now; in the one thread that does it."""
        try:
            with self._changed:
                self._is_asked = False
                self._raise_failure()
                self._journal.mark()
                self._n_flushing, self._n_fresh = self._n_fresh, 0
            self._flush_files()
            self._journal.sync()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            with self._changed:
                self._n_flushing = 0
                self._changed.notify_all()

    def _flush_files(self) -> None:
        try:
            self._files().flush()
        except OutputError as error:
            # After a failed flush the kernel takes the pages for clean: the next would succeed.
            # From here on nothing is recorded, which would seem to be behind the doubt.
            with self._changed:
                self._failure = error
                self._journal.doubt()
            raise

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
        done = self._journal.done
        self._journal.forget(
            [n for n, t in enumerate(self.plan.tensors) if t.shard in lost and done.count(n)]
        )


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
