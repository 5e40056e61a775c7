"""The files of one model: which belong together, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.container.names import (
    ALIGNMENT,
    SPLIT_COUNT,
    SPLIT_KEYS,
    SPLIT_NO,
    SPLIT_TENSORS,
    escaped,
    parse_shard_file_name,
    shard_file_name,
    shown,
)
from quantkit.container.reader import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    GgufFile,
    RangeFile,
    TensorInfo,
    read_gguf,
)
from quantkit.errors import GgufError
from quantkit.types import Kv, KvType

_LISTED = 3  # of many missing files, name this many


@dataclass(frozen=True, slots=True)
class ShardSet:
    """All files of a model in one folder, in order."""

    folder: Path
    stem: str
    files: tuple[GgufFile, ...]

    @property
    def kvs(self) -> dict[str, Kv]:
        """The model's metadata: what the first file carries, without the bookkeeping of shards."""
        first = self.files[0].kvs if self.files else {}
        return {key: kv for key, kv in first.items() if key not in (*SPLIT_KEYS, ALIGNMENT)}

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def n_tensors(self) -> int:
        """Number of tensors in all files."""
        return sum(len(file.tensors) for file in self.files)

    def tensors(self) -> Iterator[tuple[GgufFile, TensorInfo]]:
        """Every tensor with its file, in order."""
        for file in self.files:
            for tensor in file.tensors:
                yield file, tensor


def open_shards(path: str | Path | RangeFile) -> ShardSet:
    """The whole set that the file at `path` belongs to; a file that is no shard is a set of one.

    Raises `GgufError` for the first thing wrong with the set; `survey` tells all of them.
    """
    shards, problems = survey(path)
    if problems:
        raise problems[0]
    return shards


def survey(path: str | Path | RangeFile) -> tuple[ShardSet, tuple[GgufError, ...]]:
    """The readable files of a set, and everything that is wrong with it.

    Checked: every shard is there and readable; names, `split.no`, `split.count` and
    `split.tensors.count` agree; only the first shard carries metadata; tensor names are unique.
    All headers together keep to the bounds of one.
    """
    if isinstance(path, str):
        path = Path(path)
    named = parse_shard_file_name(path.name)
    stem, _, count = named or (path.name.removesuffix(".gguf"), 0, 1)
    problems: list[GgufError] = []
    paths: list[Path | RangeFile]
    if named and count > 1:
        paths = [path.with_name(shard_file_name(stem, no, count)) for no in range(count)]
        missing = [p.name for p in paths if not p.exists()]
        if missing:
            problems.append(_missing(missing, count, _shown_path(path).parent))
        present = [(no, p) for no, p in enumerate(paths) if p.exists()]
    else:
        present = [(0, path)]

    files: list[tuple[int, GgufFile]] = []
    n_left, n_tensors = MAX_HEADER_BYTES, 0
    for no, shard_path in present:
        try:
            file = read_gguf(shard_path, max_header_bytes=n_left)
        except GgufError as error:
            # A new one, without the frames that hold what had been read.
            problems.append(GgufError(error.message, where=error.where, hint=error.hint))
            continue
        files.append((no, file))
        n_left, n_tensors = n_left - file.data_begin, n_tensors + len(file.tensors)
        if n_tensors > MAX_TENSORS:
            reason = f"more than {MAX_TENSORS} tensors up to here; the rest was not read"
            problems.append(GgufError(reason, where=escaped(str(_shown_path(shard_path)))))
            break
    for no, file in files:
        problems.extend(_check_split(file, no, count))
    shards = ShardSet(_shown_path(path).parent, stem, tuple(file for _, file in files))
    problems.extend(_check_totals(shards, count))
    return shards, tuple(problems)


def _shown_path(path: Path | RangeFile) -> Path:
    return path if isinstance(path, Path) else path.display


def _missing(missing: list[str], count: int, folder: Path) -> GgufError:
    listed = ", ".join(escaped(name) for name in missing[:_LISTED])
    more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
    return GgufError(
        f"{len(missing)} of {count} shards are missing: {listed}{more}",
        where=escaped(str(folder)),
        hint="all shards of a model must lie in one folder",
    )


def _check_split(file: GgufFile, no: int, count: int) -> Iterator[GgufError]:
    where = escaped(str(file.path))
    wanted = {SPLIT_NO: (KvType.U16, no), SPLIT_COUNT: (KvType.U16, count)}
    if count == 1 and SPLIT_COUNT not in file.kvs:
        wanted = {}
    for key, (type_, value) in wanted.items():
        kv = file.kvs.get(key)
        if kv is None:
            yield GgufError(f"{key} is missing, expected {value}", where=where)
        elif kv.type is not type_ or kv.value != value:
            yield GgufError(
                f"{key} is {kv.type.name} {shown(str(kv.value))}, expected {type_.name} {value}",
                where=where,
                hint="the file was renamed, or belongs to another model",
            )
    if no > 0:
        extra = [key for key in file.kvs if key not in (*SPLIT_KEYS, ALIGNMENT)]
        if extra:
            yield GgufError(
                f"holds {len(extra)} KVs that belong into the first shard, such as "
                f"{shown(extra[0])}",
                where=where,
            )


def _check_totals(shards: ShardSet, count: int) -> Iterator[GgufError]:
    home: dict[str, str] = {}
    for file, tensor in shards.tensors():
        file_name = escaped(file.path.name)
        if tensor.name in home:
            yield GgufError(
                f"also in {home[tensor.name]}", where=f"{file_name}, tensor {shown(tensor.name)}"
            )
        home[tensor.name] = file_name
    if len(shards.files) < count:
        return  # without every shard there is no total
    for file in shards.files:
        kv = file.kvs.get(SPLIT_TENSORS)
        if kv is None and count == 1:
            continue
        if kv is None or kv.type is not KvType.I32 or kv.value != shards.n_tensors:
            got = "missing" if kv is None else f"{kv.type.name} {shown(str(kv.value))}"
            yield GgufError(
                f"{SPLIT_TENSORS} is {got}, expected I32 {shards.n_tensors}",
                where=escaped(str(file.path)),
            )
