"""Tiles made by workers on other machines, and their way into the files.

A worker makes a range of tiles. On storage that all machines share it writes them to their places
in the partial files and flushes. Elsewhere it puts the range into a store, from which it is fetched
and written here. Either way this process journals, and not before the bytes are safe, so with a
worker is lost what it was at. A range that is made twice is the same bytes at the same place.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantkit import __version__
from quantkit.errors import OutputError, SourceError
from quantkit.hub.ref import HubRef
from quantkit.hub.session import HubSession
from quantkit.pipeline.encoding import codecs, in_order
from quantkit.pipeline.gguf_source import open_source
from quantkit.pipeline.importance import load_importance
from quantkit.plan.memory import fit
from quantkit.quantize.codec import How
from quantkit.quantize.gain import encode_rows
from quantkit.quantize.tiles import Encoding, Importances, Source, encode_tile
from quantkit.run.cluster import Connected, Crew, Seat
from quantkit.run.events import Reporter, Silent
from quantkit.run.executor import run_threaded
from quantkit.run.store import Store
from quantkit.types import Plan
from quantkit.write.shards import PartialShards, tile_span
from quantkit.write.writer import ShardWriter

# A range is some seconds of a worker: long beside a flush, short beside the whole.
_RANGE_WEIGHTS = 128 << 20
_RANGE_BYTES = 128 << 20

_IMATRIX = "imatrix.gguf"

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TileRange:
    """Tiles of a plan: runs of (tensor, first, last + 1), in file order."""

    runs: tuple[tuple[int, int, int], ...]

    def tiles(self) -> Iterator[Key]:
        """(tensor, tile) of each."""
        return ((tensor, tile) for tensor, *ends in self.runs for tile in range(*ends))

    def name(self, plan: Plan) -> str:
        """What it is called where it is kept: plan and range decide all that is in it."""
        return hashlib.sha256(f"{plan.digest} {self.runs}".encode()).hexdigest()[:32]


def tile_ranges(plan: Plan, missing: Iterable[Key]) -> list[TileRange]:
    """Missing tiles, in order, cut into ranges of some seconds' work."""
    found: list[TileRange] = []
    runs: list[tuple[int, int, int]] = []
    n_weights = n_bytes = 0
    for number, tile in missing:
        tensor = plan.tensors[number]
        size = tile_span(tensor, tile)[1]
        n_weights += size // tensor.row_bytes * tensor.spec.grid[1]
        n_bytes += size
        if runs and (n_weights > _RANGE_WEIGHTS or n_bytes > _RANGE_BYTES):
            found.append(TileRange(tuple(runs)))
            runs, n_weights, n_bytes = [], 0, 0
        if runs and runs[-1][0] == number and runs[-1][2] == tile:
            runs[-1] = (number, runs[-1][1], tile + 1)
        else:
            runs.append((number, tile, tile + 1))
    return [*found, TileRange(tuple(runs))] if runs else found


@dataclass(frozen=True, slots=True)
class Made:
    """What came of a range: a sha256 for each tile, and how many blocks could not be copied.

    `stored` is the object that holds the bytes, empty where they are in the files.
    """

    digests: tuple[bytes, ...]
    n_inexact: int
    stored: str = ""


@dataclass(frozen=True)
class Errand:
    """All that a worker has to know, as plain data that goes to another machine.

    `source` is a path or a pinned place on the Hub, whose content has `fingerprint`; `imatrix` has
    the sha256 `imatrix_digest`. Tiles go to `folder`, or to the store `staging` where there is one.
    `n_threads` and `memory` are for each worker, as is `spool`, all in bytes.
    """

    plan: Plan
    source: Path | HubRef
    fingerprint: str
    how: How
    folder: Path
    staging: str | None = None
    imatrix: Path | None = None
    imatrix_digest: str = ""
    device: str = "cpu"
    memory: int | None = None
    spool: int = 0
    n_threads: int = 1

    @property
    def store(self) -> Store | None:
        """Where ranges are put if storage is not shared; each plan has a place of its own."""
        return Store(self.staging).below(self.plan.digest[:32]) if self.staging else None

    def opened(self) -> TileWorker:
        """A worker at it."""
        return TileWorker(self)


class _Puts(Protocol):
    """Where a worker leaves what it makes."""

    def begin(self, task: TileRange) -> None:
        """A range begins."""

    def write(self, tensor: int, tile: int, data: memoryview) -> None:
        """Take a tile of it, from any thread."""

    def end(self, task: TileRange) -> str:
        """The range is whole: make it durable. The object's name, if it is one."""


class _InPlace(PartialShards):
    """The partial files, on storage that all machines share."""

    def begin(self, task: TileRange) -> None:
        """See `_Puts`."""

    def end(self, task: TileRange) -> str:
        """See `_Puts`."""
        self.flush({self._plan.tensors[tensor].shard for tensor, _, _ in task.runs})
        return ""


class _AsObjects:
    """A store; the tiles of a range become one object, in their order."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self._plan, self._store = plan, store
        self._data = bytearray()
        self._begins: dict[Key, int] = {}

    def begin(self, task: TileRange) -> None:
        """See `_Puts`."""
        self._begins, end = _offsets(self._plan, task)
        self._data = bytearray(end)

    def write(self, tensor: int, tile: int, data: memoryview) -> None:
        """See `_Puts`."""
        begin = self._begins[tensor, tile]
        self._data[begin : begin + data.nbytes] = data

    def end(self, task: TileRange) -> str:
        """See `_Puts`. The name is new every time, for a double may still be writing its own."""
        name = f"{task.name(self._plan)}-{uuid.uuid4().hex[:8]}"
        self._store.put(name, self._data)
        self._data = bytearray()
        return name


def _offsets(plan: Plan, task: TileRange) -> tuple[dict[Key, int], int]:
    """Where each tile of a range begins in its object, and the object's length."""
    begins, end = {}, 0
    for tensor, tile in task.tiles():
        begins[tensor, tile] = end
        end += tile_span(plan.tensors[tensor], tile)[1]
    return begins, end


class TileWorker:
    """Makes ranges of tiles of an errand.

    Raises what opening source, imatrix and output raise, and `SourceError` or `OutputError` where
    they are not those that the errand means.
    """

    def __init__(self, errand: Errand) -> None:
        self._errand = errand
        with ExitStack() as stack:
            self._puts = _opened_puts(errand, stack)
            self._source = _opened_source(errand, stack)
            self._memory = fit([errand.plan], errand.how, errand.n_threads, errand.memory)
            self._encoding = Encoding(
                errand.how,
                _opened_importance(errand, stack),
                codecs(errand.plan, errand.device),
                strip_weights=self._memory.strip_weights,
            )
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Let go of everything."""
        self._stack.close()

    @cached_property
    def proof(self) -> str:
        """Equal for workers that give the same bytes: the version, and a sample of every type."""
        digest = hashlib.sha256(__version__.encode())
        rows = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
        weight = np.random.default_rng(1).random(512, np.float32)
        for type_ in sorted({tensor.type for tensor in self._errand.plan.tensors}):
            blocks = encode_rows(self._encoding.codec_of(type_), rows, weight, self._errand.how)
            digest.update(np.ascontiguousarray(blocks).tobytes())
        return digest.hexdigest()

    def run(self, task: TileRange) -> Made:
        """Make every tile of a range and leave it where it belongs, durably."""
        digests: dict[Key, bytes] = {}
        n_inexact = 0
        self._puts.begin(task)
        self._source.will_read(in_order(self._errand.plan, task.tiles()))
        making = run_threaded(
            self._make,
            task.tiles(),
            self._errand.n_threads,
            n_bytes=lambda key: self._memory.of_tile(self._errand.plan.tensors[key[0]]),
            budget=self._memory.n_bytes,
        )
        with closing(making) as tiles:
            for key, digest, inexact in tiles:
                digests[key] = digest
                n_inexact += inexact
        stored = self._puts.end(task)
        return Made(tuple(digests[key] for key in task.tiles()), n_inexact, stored)

    def _make(self, key: Key) -> tuple[Key, bytes, int]:
        try:
            tile = encode_tile(self._source, self._errand.plan.tensors, key, self._encoding)
        except RuntimeError as error:
            raise _told(error, self._errand.device) from None
        self._puts.write(*key, tile.data)
        return key, tile.digest, tile.n_inexact


def _told(error: RuntimeError, device: str) -> Exception:
    """A GPU's failure as what the user can act on; any other error as it is."""
    if device == "cpu":
        return error
    from quantkit.quantize.torch.devices import device_error  # noqa: PLC0415 - brings torch

    return device_error(error) or error


def _opened_puts(errand: Errand, stack: ExitStack) -> _Puts:
    if errand.store:
        return _AsObjects(errand.plan, errand.store)
    try:
        return stack.enter_context(_InPlace(errand.folder, errand.plan))
    except OutputError as error:
        raise OutputError(
            f"{error.message}, seen by a worker",
            where=error.where,
            hint="the output folder must be on storage that all machines share under one path; "
            "else name a --staging store",
        ) from None


def _opened_source(errand: Errand, stack: ExitStack) -> Source:
    place: Any = errand.source
    if isinstance(place, HubRef):
        session = HubSession(Silent(), spool=errand.spool)
        place = stack.enter_context(session).at(place)
    source = open_source(place)
    stack.callback(source.close)
    if source.fingerprint() != errand.fingerprint:
        raise SourceError(
            "is not what the plan was made of, seen by a worker",
            where=str(errand.source),
            hint="all machines must see the same files, of the same time, under one path",
        )
    return source


def _opened_importance(errand: Errand, stack: ExitStack) -> Importances | None:
    path = errand.imatrix
    if path is None:
        return None
    if errand.store:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="quantkit-"))
        path = Path(folder) / path.name
        errand.store.get_file(_IMATRIX, path)
    importance = load_importance(path, tuple(tensor.spec for tensor in errand.plan.tensors))
    if importance.digest != errand.imatrix_digest:
        raise SourceError(
            "is not the imatrix that the plan was made with, seen by a worker", where=str(path)
        )
    return importance.lookup


def made_on_cluster(
    cluster: Connected, errand: Errand, writer: ShardWriter, reporter: Reporter
) -> Generator[tuple[int, int], None, None]:
    """(bytes, blocks that were not copied) of ranges of tiles as they are safe in the files.

    Raises as `Crew.results` does.
    """
    tasks = tile_ranges(errand.plan, writer.missing())
    if not tasks:
        return
    store = errand.store
    if store and errand.imatrix:
        store.put_file(_IMATRIX, errand.imatrix)

    def opener(seat: Seat) -> Callable[[], TileWorker]:
        return replace(errand, n_threads=seat.n_cpus).opened

    crew: Crew[TileRange, Made] = Crew(cluster, opener, reporter.warn)
    with closing(crew.results(tasks, lambda task: _described(errand.plan, task))) as results:
        for index, made in results:
            yield _taken(errand.plan, tasks[index], made, writer, store), made.n_inexact
    if store:
        store.clear()


def _taken(
    plan: Plan, task: TileRange, made: Made, writer: ShardWriter, store: Store | None
) -> int:
    """Journal a range, which is first brought here if it is an object. Its bytes."""
    begins, n_bytes = _offsets(plan, task)
    if store is None:
        for (tensor, tile), digest in zip(begins, made.digests, strict=True):
            writer.record(tensor, tile, digest)
        return n_bytes
    data = memoryview(store.get(made.stored))
    ends = [*list(begins.values())[1:], n_bytes]
    for ((tensor, tile), begin), end, digest in zip(
        begins.items(), ends, made.digests, strict=True
    ):
        part = data[begin:end]
        if hashlib.sha256(part).digest() != digest:
            raise OutputError(
                "holds other bytes than the worker put there", where=f"{store.url}/{made.stored}"
            )
        writer.write(tensor, tile, part, digest)
    store.remove(made.stored)
    return n_bytes


def _described(plan: Plan, task: TileRange) -> str:
    tensor, first, last = task.runs[0]
    rest = f" and {len(task.runs) - 1} more" if len(task.runs) > 1 else ""
    return f"{plan.tensors[tensor].spec.name}, tiles {first} to {last - 1}{rest}"
