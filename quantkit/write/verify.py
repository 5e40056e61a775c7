"""Is a shard set what was written: structure, sizes, digests, and no NaN or infinity.

With a manifest beside the shards every byte of them is covered: headers and tensors by digests,
padding by being zero. Without one only structure and content can be judged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

from quantkit.container.content import first_nonfinite
from quantkit.container.names import escaped, shown
from quantkit.container.reader import GgufFile, TensorInfo
from quantkit.container.shardset import ShardSet, survey
from quantkit.errors import GgufError, NonFiniteError, QuantkitError
from quantkit.run.executor import run_threaded
from quantkit.write.manifest import (
    Manifest,
    ShardRecord,
    chunk_ranges,
    load_manifest,
    manifest_path,
    tensor_digest,
)

_READ_BYTES = 4 << 20  # per read, so also the memory per thread
_JOB_BYTES = 32 << 20  # per unit of parallel work
_JOB_CHUNKS = 1 << 12  # likewise, where chunks are tiny


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at and everything that is wrong with it."""

    shards: ShardSet
    manifest: Path | None
    deep: bool
    problems: tuple[QuantkitError, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    @property
    def exit_code(self) -> int:
        """0 sound, 6 damaged, 7 undamaged but with NaN or infinity."""
        return min((problem.exit_code for problem in self.problems), default=0)


@dataclass(frozen=True, slots=True)
class _Job:
    """Some consecutive chunks of a tensor, as (begin, end) relative to it."""

    tensor: TensorInfo
    chunks: list[tuple[int, int]]

    @property
    def n_bytes(self) -> int:
        return self.chunks[-1][1] - self.chunks[0][0]


@dataclass(frozen=True, slots=True)
class _Found:
    """A finished job: its chunks' sha256s, joined, and the first block that is not finite."""

    job: _Job
    digests: bytes
    bad_block: int | None


def verify(
    path: str | Path,
    *,
    deep: bool = True,
    threads: int = 1,
    on_begin: Callable[[int], None] = lambda n: None,
    on_bytes: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check the shard set that the file at `path` belongs to; problems are collected, not raised.

    `deep` reads all tensor data, once, in `threads` threads; otherwise only sizes and headers are
    compared. `on_begin` hears how many data bytes there are, `on_bytes` of them as they are done.
    """
    shards, survey_problems = survey(path)
    on_begin(sum(tensor.n_bytes for _, tensor in shards.tensors()))
    problems: list[QuantkitError] = list(survey_problems)
    manifest, manifest_file = None, manifest_path(shards.folder, shards.stem)
    if manifest_file.exists():
        try:
            manifest = load_manifest(manifest_file)
            problems.extend(_compare_names(shards, manifest))
        except GgufError as error:
            problems.append(error)
    records = {shard.file: shard for shard in manifest.shards} if manifest else {}
    for file in shards.files:
        record = records.get(file.path.name)
        try:
            if record:
                problems.extend(_compare_headers(file, record))
            if deep:
                problems.extend(_check_data(file, record, threads, on_bytes))
                problems.extend(_check_padding(file))
        except GgufError as error:
            problems.append(error)
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            problems.append(GgufError(reason, where=escaped(str(file.path))))
    return VerifyReport(shards, manifest_file if manifest else None, deep, tuple(problems))


def _compare_names(shards: ShardSet, manifest: Manifest) -> Iterator[GgufError]:
    present = {file.path.name for file in shards.files}
    recorded = {shard.file for shard in manifest.shards}
    for name in sorted(present - recorded):
        yield GgufError("not in the manifest", where=escaped(name))
    for name in sorted(recorded - present):
        # One that exists could not be read, which the survey has told.
        if not (shards.folder / name).exists():
            yield GgufError("in the manifest but missing", where=escaped(name))


def _compare_headers(file: GgufFile, record: ShardRecord) -> Iterator[GgufError]:
    where = escaped(str(file.path))
    if file.n_bytes != record.n_bytes:
        yield GgufError(f"{file.n_bytes} bytes, expected {record.n_bytes}", where=where)
    buffer = bytearray(_READ_BYTES)
    with file.path.open("rb", buffering=0) as stream:
        digest = hashlib.sha256()
        for _, piece in _pieces(stream, (0, file.data_begin), buffer, where):
            digest.update(piece)
    if digest.hexdigest() != record.header_sha256:
        yield GgufError("the header is not the one that was written", where=where)
    there = [(t.name, t.type.name, t.begin, t.n_bytes) for t in file.tensors]
    if there != [(t.name, t.type, t.begin, t.n_bytes) for t in record.tensors]:
        yield GgufError("the tensors are not those of the manifest", where=where)


def _check_data(
    file: GgufFile,
    record: ShardRecord | None,
    threads: int,
    on_bytes: Callable[[int], None] | None,
) -> Iterator[QuantkitError]:
    parts: dict[str, list[_Found]] = {tensor.name: [] for tensor in file.tensors}
    scan = partial(_scan, file.path)
    with closing(run_threaded(scan, _jobs(file, record), threads)) as results:
        for found in results:
            parts[found.job.tensor.name].append(found)
            if on_bytes:
                on_bytes(found.job.n_bytes)
    written = {t.name: t.sha256 for t in record.tensors} if record else {}
    for name, unordered in parts.items():
        where = f"{escaped(str(file.path))}, tensor {shown(name)}"
        ordered = sorted(unordered, key=lambda found: found.job.chunks[0])
        digest = tensor_digest(found.digests for found in ordered)
        if written.get(name, digest) != digest:
            yield GgufError("its data is not what was written", where=where)
        bad_blocks = [found.bad_block for found in ordered if found.bad_block is not None]
        if bad_blocks:
            yield NonFiniteError(f"block {bad_blocks[0]} holds NaN or infinity", where=where)


def _jobs(file: GgufFile, record: ShardRecord | None) -> Iterator[_Job]:
    recorded = {t.name: t for t in record.tensors} if record else {}
    for tensor in file.tensors:
        # Without a usable record any cut at block borders will do.
        n_slabs, chunk_bytes = 1, _READ_BYTES // tensor.type.block_bytes * tensor.type.block_bytes
        cuts = recorded.get(tensor.name)
        if cuts and cuts.n_bytes == tensor.n_bytes and cuts.type == tensor.type.name:
            n_slabs, chunk_bytes = cuts.n_slabs, cuts.chunk_bytes
        job = _Job(tensor, [])
        for chunk in chunk_ranges(tensor.n_bytes, n_slabs, chunk_bytes):
            if job.chunks and (job.n_bytes >= _JOB_BYTES or len(job.chunks) >= _JOB_CHUNKS):
                yield job
                job = _Job(tensor, [])
            job.chunks.append(chunk)
        yield job


def _scan(path: Path, job: _Job) -> _Found:
    tensor = job.tensor
    block_bytes = tensor.type.block_bytes
    longest = min(_READ_BYTES, max(end - begin for begin, end in job.chunks))
    buffer = bytearray(longest // block_bytes * block_bytes)
    where = f"{escaped(str(path))}, tensor {shown(tensor.name)}"
    digests = bytearray()
    bad_block: int | None = None
    with path.open("rb", buffering=0) as stream:
        for begin, end in job.chunks:
            digest = hashlib.sha256()
            span = (tensor.begin + begin, tensor.begin + end)
            for at, piece in _pieces(stream, span, buffer, where):
                digest.update(piece)
                if bad_block is None and (bad := first_nonfinite(tensor.type, piece)) is not None:
                    bad_block = (at - tensor.begin) // block_bytes + bad
            digests += digest.digest()
    return _Found(job, bytes(digests), bad_block)


def _check_padding(file: GgufFile) -> Iterator[GgufError]:
    if not file.tensors:
        return
    ends = [tensor.end for tensor in file.tensors]
    begins = [tensor.begin for tensor in file.tensors[1:]] + [file.n_bytes]
    buffer = bytearray(file.alignment)
    with file.path.open("rb", buffering=0) as stream:
        for tensor, end, begin in zip(file.tensors, ends, begins, strict=True):
            where = f"{escaped(str(file.path))}, tensor {shown(tensor.name)}"
            if any(any(piece) for _, piece in _pieces(stream, (end, begin), buffer, where)):
                yield GgufError("the padding behind it is not zero", where=where)


def _pieces(
    stream: FileIO, span: tuple[int, int], buffer: bytearray, where: str
) -> Iterator[tuple[int, memoryview]]:
    """The file's bytes in `span` with their positions; a piece lives until the next one."""
    at, end = span
    stream.seek(at)
    view = memoryview(buffer)
    while at < end:
        piece = view[: min(len(view), end - at)]
        n_filled = 0
        while n_filled < len(piece):
            n = stream.readinto(piece[n_filled:])
            if not n:
                raise GgufError("the file shrank while it was read", where=where)
            n_filled += n
        yield at, piece
        at += len(piece)
