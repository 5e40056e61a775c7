"""Strict, bounded parser of one GGUF file's header. Tensor data is never read.

Every count and length is checked against the bytes that are left before anything is allocated or
looped over. What is accepted here, ggml accepts; the reverse does not hold: empty tensors,
invalid UTF-8, NUL in names, booleans other than 0 and 1 and bytes behind the data are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, Protocol, Self

from quantkit.container.kv import CODES
from quantkit.container.layout import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    VERSION,
    TensorPlace,
    padded,
    tensor_n_bytes,
)
from quantkit.container.names import (
    ALIGNMENT,
    MAX_KEY_BYTES,
    MAX_TENSOR_NAME_BYTES,
    check_name,
    escaped,
    shown,
)
from quantkit.errors import GgufError
from quantkit.types import GgmlType, Kv, KvType

TensorInfo = TensorPlace

# Above what models have, and few enough for 256 MiB and 5 seconds. The largest
# header is some 17 MB; a model whose experts are not merged has 14,000 tensors, Kimi K2.5 1,100.
MAX_HEADER_BYTES = 20 << 20
MAX_KVS = 1 << 12
MAX_TENSORS = 1 << 14
MAX_ITEMS = 11 << 17  # array elements in all KVs together; the largest vocabularies have 1.3 M
MAX_STRINGS = 1 << 20  # of them texts; tokens and merges of the largest are 0.8 M

_STEP = 1 << 20  # bytes per read
_MIN_KV = 8 + 1 + 4 + 1  # length, key, type, value
_MIN_INFO = 8 + 1 + 4 + 8 + 4 + 8  # length, name, n_dims, ne[0], type, offset
_U64 = struct.Struct("<Q")


class RangeFile(Protocol):
    """A file that is not on this machine, read by range."""

    @property
    def display(self) -> Path:
        """What stands for it where a path is shown."""

    @property
    def name(self) -> str:
        """Base name."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def etag(self) -> str:
        """What tells its content from another."""

    def exists(self) -> bool:
        """Whether it is there."""

    def with_name(self, name: str) -> Self:
        """A file beside it."""

    def read(self, begin: int, end: int, *, head: bool = False) -> bytes:
        """Bytes `begin .. end`, which lie inside it; `head` for those of a header."""

    def lay_out(self, tensors: Iterable[tuple[str, int, int]]) -> None:
        """Where its tensors lie: (name, begin, end) in order."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says about itself, in the file's order.

    `remote` reads a file that is not on this machine; `path` is then only its name.
    """

    path: Path
    version: int
    kvs: dict[str, Kv]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_begin: int
    n_bytes: int
    remote: RangeFile | None = None

    def stamp(self) -> tuple[int, int | str]:
        """Its size and what tells its content from another; raises `OSError` where it is gone."""
        if self.remote is not None:
            return self.remote.size, self.remote.etag
        info = self.path.stat()
        return info.st_size, info.st_mtime_ns


def read_gguf(
    path: str | Path | RangeFile, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> GgufFile:
    """Parse the header of a little-endian GGUF file of version 2 or 3.

    Raises `GgufError`, and nothing else, for anything that is not one, cannot be opened, or
    points outside itself; for a remote file also what reading it raises.
    """
    if not isinstance(path, str | Path):
        stream, where = _Stream(path), escaped(str(path.display))
        parsed = _parse(path.display, _Cursor(stream, path.size, where, max_header_bytes))
        path.lay_out((t.name, t.begin, t.end) for t in parsed.tensors)
        return replace(parsed, remote=path)
    path = Path(path)
    where = escaped(str(path))
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise GgufError("not a regular file", where=where)
        with path.open("rb", buffering=0) as file:
            return _parse(path, _Cursor(file, stat.st_size, where, max_header_bytes))
    except OSError as error:
        raise GgufError(f"cannot be read: {error.strerror}", where=where) from error


class _Stream:
    """A remote file read from its beginning."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._at = 0

    def read(self, n: int) -> bytes:
        begin, self._at = self._at, min(self._at + n, self._file.size)
        return self._file.read(begin, self._at, head=True)


class _Cursor:
    """A position in the header, over a buffer that is filled as needed."""

    def __init__(
        self, file: BinaryIO | _Stream, n_bytes: int, where: str, max_header_bytes: int
    ) -> None:
        self._file = file
        self._most = max_header_bytes
        self._where = where
        self._buffer = b""
        self._at = 0
        self._base = 0  # file position of the buffer's start
        self.n_bytes = n_bytes
        self.subject = ""  # the entry being parsed, for messages
        self.items_left = MAX_ITEMS
        self.strings_left = MAX_STRINGS

    @property
    def where(self) -> str:
        return f"{self._where}, {self.subject}" if self.subject else self._where

    @property
    def position(self) -> int:
        return self._base + self._at

    @property
    def left(self) -> int:
        """Bytes that the header may still have."""
        return min(self.n_bytes, self._most) - self.position

    def fail(self, message: str, hint: str = "") -> GgufError:
        return GgufError(message, where=self.where, hint=hint)

    def need(self, n: int) -> None:
        """Have the next `n` bytes in the buffer."""
        if n > self.left:
            if self.n_bytes > self._most and n <= self.n_bytes - self.position:
                raise self.fail(f"the header is larger than {self._most} bytes")
            raise self.fail(
                f"the file ends early: {n} bytes expected at {self.position} of {self.n_bytes}"
            )
        if self._at + n <= len(self._buffer):
            return
        parts = [self._buffer[self._at :]]
        self._base, self._at = self.position, 0
        n_have = len(parts[0])
        n_want = min(max(n, _STEP), self.n_bytes - self._base)
        while n_have < n_want:
            part = self._file.read(min(_STEP, n_want - n_have))
            if not part:
                raise self.fail("the file shrank while it was read")
            parts.append(part)
            n_have += len(part)
        self._buffer = b"".join(parts)

    def unpack(self, format_: str) -> tuple[Any, ...]:
        """Fixed-size little-endian values."""
        n = struct.calcsize(format_)
        self.need(n)
        values = struct.unpack_from(format_, self._buffer, self._at)
        self._at += n
        return values

    def u32(self) -> int:
        return int(self.unpack("<I")[0])

    def strings(self, n: int) -> list[str]:
        """`n` length-prefixed UTF-8 texts; the caller has bounded `n`."""
        texts: list[str] = []
        buffer, at = self._buffer, self._at
        try:
            for _ in range(n):
                if at + 8 > len(buffer):
                    self._at = at
                    self.need(8)
                    buffer, at = self._buffer, self._at
                (length,) = _U64.unpack_from(buffer, at)
                if at + 8 + length > len(buffer):
                    self._at = at
                    self.need(8 + length)
                    buffer, at = self._buffer, self._at
                end = at + 8 + length
                texts.append(str(buffer[at + 8 : end], "utf-8"))
                at = end
        except UnicodeDecodeError as error:
            raise self.fail(f"string {len(texts)} of {n} is not UTF-8") from error
        self._at = at
        return texts

    def name(self, max_bytes: int) -> str:
        """A key or tensor name."""
        (length,) = self.unpack("<Q")
        if length > max_bytes:
            raise self.fail(f"a name of {length} bytes, at most {max_bytes} are allowed")
        self.need(length)
        raw = self._buffer[self._at : self._at + length]
        self._at += length
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"name {raw!r} is not UTF-8") from error
        check_name(name, max_bytes=max_bytes, where=self.where)
        return name


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    version, n_tensors, n_kvs = _read_preamble(cursor)
    kvs = _read_kvs(cursor, n_kvs)
    alignment = _alignment_of(kvs, cursor)
    infos = [_read_info(cursor, index, n_tensors) for index in range(n_tensors)]
    cursor.subject = ""
    data_begin = padded(cursor.position, alignment)
    tensors = _place(infos, data_begin, alignment, cursor)
    # A file without tensors may stop right behind its header.
    return GgufFile(
        path=path,
        version=version,
        kvs=kvs,
        tensors=tensors,
        alignment=alignment,
        data_begin=min(data_begin, cursor.n_bytes),
        n_bytes=cursor.n_bytes,
    )


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic, version = cursor.unpack("<4sI")
    if magic != MAGIC:
        raise cursor.fail(f"not a GGUF file: it begins with {magic!r}")
    if version and not version & 0xFFFF:
        raise cursor.fail(
            "a big-endian GGUF file", hint="only little-endian files are read; convert it first"
        )
    if not 2 <= version <= VERSION:
        raise cursor.fail(f"GGUF version {version}, only 2 and 3 are known")
    n_tensors, n_kvs = cursor.unpack("<QQ")
    if n_tensors * _MIN_INFO + n_kvs * _MIN_KV > cursor.left:
        raise cursor.fail(
            f"{n_tensors} tensors and {n_kvs} KVs cannot be in the {cursor.left} bytes that follow"
        )
    if n_tensors > MAX_TENSORS or n_kvs > MAX_KVS:
        raise cursor.fail(f"{n_tensors} tensors and {n_kvs} KVs are more than any model has")
    return version, n_tensors, n_kvs


def _read_kvs(cursor: _Cursor, n_kvs: int) -> dict[str, Kv]:
    kvs: dict[str, Kv] = {}
    for index in range(n_kvs):
        cursor.subject = f"KV {index + 1} of {n_kvs}"
        key = cursor.name(MAX_KEY_BYTES)
        cursor.subject = f"KV {shown(key)}"
        if key in kvs:
            raise cursor.fail("two values for one key")
        type_ = _kv_type(cursor)
        if type_ is not KvType.ARRAY:
            kvs[key] = Kv(type_, _read_items(cursor, type_, 1)[0])
            continue
        item = _kv_type(cursor)
        if item is KvType.ARRAY:
            raise cursor.fail("arrays of arrays are not supported")
        (n_items,) = cursor.unpack("<Q")
        n_least = n_items * (8 if item is KvType.STRING else struct.calcsize(CODES[item]))
        n_strings = n_items if item is KvType.STRING else 0
        too_many = n_items > cursor.items_left or n_strings > cursor.strings_left
        if n_least > cursor.left or too_many:
            raise cursor.fail(
                f"an array of {n_items} {item.name} cannot be in the {cursor.left} bytes left"
            )
        cursor.items_left -= n_items
        cursor.strings_left -= n_strings
        kvs[key] = Kv(type_, _read_items(cursor, item, n_items), item)
    return kvs


def _kv_type(cursor: _Cursor) -> KvType:
    id_ = cursor.u32()
    try:
        return KvType(id_)
    except ValueError as error:
        raise cursor.fail(f"unknown value type {id_}") from error


def _read_items(cursor: _Cursor, type_: KvType, n: int) -> list[Any]:
    if type_ is KvType.STRING:
        return list(cursor.strings(n))
    values = list(cursor.unpack(f"<{n}{CODES[type_]}"))
    if type_ is not KvType.BOOL:
        return values
    if max(values, default=0) > 1:
        raise cursor.fail(f"{max(values)} is no truth value")
    return [value == 1 for value in values]


def _alignment_of(kvs: Mapping[str, Kv], cursor: _Cursor) -> int:
    kv = kvs.get(ALIGNMENT)
    if kv is None:
        return DEFAULT_ALIGNMENT
    cursor.subject = f"KV {ALIGNMENT}"
    if kv.type is not KvType.U32:
        raise cursor.fail(f"expected U32, got {kv.type.name}")
    alignment = int(kv.value)
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"{alignment} is no power of two up to {MAX_ALIGNMENT}")
    return alignment


def _read_info(cursor: _Cursor, index: int, n_tensors: int) -> TensorInfo:
    """One tensor; `begin` is still its offset into the data."""
    cursor.subject = f"tensor {index + 1} of {n_tensors}"
    name = cursor.name(MAX_TENSOR_NAME_BYTES)
    cursor.subject = f"tensor {shown(name)}"
    n_dims = cursor.u32()
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"{n_dims} dimensions, expected 1 to {MAX_DIMS}")
    *ne, id_, offset = cursor.unpack(f"<{n_dims}QiQ")
    try:
        type_ = GgmlType(id_)
    except ValueError as error:
        raise cursor.fail(
            f"unknown tensor type {id_}",
            hint="types from 97 on are ik_llama.cpp's own; llama.cpp does not load them"
            if id_ >= 97
            else "the file is damaged, or newer than this version of quantkit",
        ) from error
    shape = tuple(ne[::-1])
    n_bytes = tensor_n_bytes(shape, type_, where=cursor.where)
    return TensorInfo(name, shape, type_, offset, n_bytes)


def _place(
    infos: list[TensorInfo], data_begin: int, alignment: int, cursor: _Cursor
) -> tuple[TensorInfo, ...]:
    tensors = []
    seen: set[str] = set()
    offset = end = 0
    for info in infos:
        cursor.subject = f"tensor {shown(info.name)}"
        if info.name in seen:
            raise cursor.fail("two tensors have this name")
        seen.add(info.name)
        if info.begin != offset:
            fault = "overlaps the tensor before it" if info.begin < offset else "leaves a gap"
            raise cursor.fail(f"offset {info.begin} {fault}, expected {offset}")
        end = data_begin + offset + info.n_bytes
        if end > cursor.n_bytes:
            raise cursor.fail(
                f"its data ends at {end}, the file at {cursor.n_bytes}",
                hint="the file is cut off; download or write it again",
            )
        tensors.append(
            TensorInfo(info.name, info.shape, info.type, data_begin + offset, info.n_bytes)
        )
        offset += padded(info.n_bytes, alignment)
    cursor.subject = ""
    # ggml's writers pad behind the last tensor too, others stop at its end.
    if cursor.n_bytes > data_begin + offset:
        raise cursor.fail(f"{cursor.n_bytes - data_begin - offset} bytes behind the last tensor")
    return tuple(tensors)
