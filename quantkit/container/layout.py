"""Where every byte of every shard will lie, before any data exists. Opens no file.

File form, little endian: magic, u32 version, u64 tensors, u64 KVs | KVs | tensor infos | padding |
data. A tensor info is name, u32 n_dims, u64 ne[] (row length first), i32 type, u64 offset into the
data. Offsets are the running sum of the sizes, each padded to the alignment; so is the file's end.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from quantkit.container.kv import encode_kv, i32, u16, u32
from quantkit.container.names import (
    ALIGNMENT,
    MAX_SHARDS,
    MAX_TENSOR_NAME_BYTES,
    SPLIT_COUNT,
    SPLIT_KEYS,
    SPLIT_NO,
    SPLIT_TENSORS,
    check_name,
    check_stem,
    shard_file_name,
    shown,
)
from quantkit.errors import GgufError, UsageError
from quantkit.types import GgmlType, Kv

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 4096  # a page; more only wastes space
MAX_DIMS = 4

_PREAMBLE = struct.Struct("<4sIQQ")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor to be placed; `shape` is rows first, the reverse of ggml's `ne`."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor's bytes in its file: `n_bytes` from `begin`, counted from the file's start.

    `shape` is rows first.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    begin: int
    n_bytes: int

    @property
    def end(self) -> int:
        """First byte behind the tensor; padding may follow."""
        return self.begin + self.n_bytes

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file: `header` is all of it up to `data_begin`, where the first tensor starts."""

    file_name: str
    header: bytes
    data_begin: int
    tensors: tuple[TensorPlace, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class _Sized:
    tensor: TensorEntry
    name: bytes
    n_bytes: int

    @property
    def info_bytes(self) -> int:
        """Size of its entry in the header."""
        return 8 + len(self.name) + 4 + 8 * len(self.tensor.shape) + 4 + 8

    def info(self, offset: int) -> bytes:
        """Its entry in the header."""
        ne = self.tensor.shape[::-1]
        head = struct.pack("<Q", len(self.name)) + self.name + struct.pack("<I", len(ne))
        return head + struct.pack(f"<{len(ne)}QiQ", *ne, self.tensor.type, offset)


def lay_out(
    stem: str,
    kvs: Mapping[str, Kv],
    tensors: Sequence[TensorEntry],
    *,
    max_shard_bytes: int | None,
    max_shard_tensors: int | None = None,
    alignment: int = DEFAULT_ALIGNMENT,
) -> tuple[ShardLayout, ...]:
    """Distribute `tensors`, in order, over as few files as the limits allow.

    `max_shard_bytes` bounds a file's size, header included; only a file with a single tensor may
    be larger. One file is `STEM.gguf`; several are `STEM-0000N-of-0000M.gguf`, where the first
    carries `kvs` and all carry the three `split.*` keys. Those keys and `general.alignment` belong
    to the layout and may not be in `kvs`. Raises `GgufError` for names, shapes or values that GGUF
    cannot hold, `UsageError` for limits that cannot be meant.
    """
    _check_limits(max_shard_bytes, max_shard_tensors, alignment)
    check_stem(stem)
    for key in (*SPLIT_KEYS, ALIGNMENT):
        if key in kvs:
            raise GgufError("the layout sets this key itself", where=f"KV {key}")
    own = {} if alignment == DEFAULT_ALIGNMENT else {ALIGNMENT: u32(alignment)}
    encoded_own = [encode_kv(key, kv) for key, kv in own.items()]
    encoded = [encode_kv(key, kv) for key, kv in kvs.items()] + encoded_own
    sized = _measure(tensors)

    limits = _Limits(max_shard_bytes, max_shard_tensors, alignment)
    bounds = _cut(sized, limits, [sum(map(len, encoded))])
    if len(bounds) > 2:
        n_split = sum(map(len, _split_kvs(0, 0, 0)))
        n_first = sum(map(len, encoded)) + n_split
        n_other = sum(map(len, encoded_own)) + n_split
        bounds = _cut(sized, limits, [n_first, n_other])
    count = len(bounds) - 1
    if count > MAX_SHARDS:
        raise GgufError(
            f"{count} shards, at most {MAX_SHARDS} can be numbered", hint="allow larger shards"
        )
    layouts = []
    for no, (begin, end) in enumerate(pairwise(bounds)):
        entries = encoded if no == 0 else encoded_own
        if count > 1:
            entries = entries + _split_kvs(no, count, len(sized))
        name = shard_file_name(stem, no, count)
        layouts.append(_place(name, entries, sized[begin:end], alignment))
    return tuple(layouts)


def padded(n: int, alignment: int) -> int:
    """`n` rounded up to a multiple of `alignment`."""
    return -(-n // alignment) * alignment


def tensor_n_bytes(shape: Sequence[int], type_: GgmlType, *, where: str) -> int:
    """Stored size; refuses what ggml cannot address: 0 or 5 axes, empty axes, cut blocks."""
    if not 1 <= len(shape) <= MAX_DIMS:
        raise GgufError(f"{len(shape)} dimensions, expected 1 to {MAX_DIMS}", where=where)
    if min(shape) < 1 or prod(shape) >= 1 << 63:
        raise GgufError(f"shape {list(shape)} cannot be stored", where=where)
    if shape[-1] % type_.block_size:
        raise GgufError(
            f"rows of {shape[-1]} are no multiple of the block of {type_.name}, {type_.block_size}",
            where=where,
        )
    n_bytes = prod(shape[:-1]) * type_.row_bytes(shape[-1])
    if n_bytes >= 1 << 63:
        raise GgufError(f"{n_bytes} bytes are more than a file can have", where=where)
    return n_bytes


@dataclass(frozen=True, slots=True)
class _Limits:
    max_bytes: int | None
    max_tensors: int | None
    alignment: int

    def allow(self, n_tensors: int, n_bytes: int) -> bool:
        """Whether a file may have that many tensors and bytes."""
        return (self.max_tensors is None or n_tensors <= self.max_tensors) and (
            self.max_bytes is None or n_bytes <= self.max_bytes
        )


def _check_limits(max_bytes: int | None, max_tensors: int | None, alignment: int) -> None:
    for limit, what in ((max_bytes, "bytes"), (max_tensors, "tensors")):
        if limit is not None and limit < 1:
            raise UsageError(f"a shard of at most {limit} {what} holds nothing")
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise UsageError(f"alignment {alignment} is no power of two up to {MAX_ALIGNMENT}")


def _measure(tensors: Sequence[TensorEntry]) -> list[_Sized]:
    sized: list[_Sized] = []
    seen: set[str] = set()
    for tensor in tensors:
        where = f"tensor {shown(tensor.name)}"
        name = check_name(tensor.name, max_bytes=MAX_TENSOR_NAME_BYTES, where=where)
        if tensor.name in seen:
            raise GgufError("two tensors have this name", where=where)
        seen.add(tensor.name)
        n_bytes = tensor_n_bytes(tensor.shape, tensor.type, where=where)
        sized.append(_Sized(tensor, name, n_bytes))
    return sized


def _cut(sized: Sequence[_Sized], limits: _Limits, kv_bytes: Sequence[int]) -> list[int]:
    """Where shards begin and the last one ends, as indices; `kv_bytes`: first shard's, others'."""
    bounds = [0]
    n_header = n_data = 0
    for index, item in enumerate(sized):
        n_header += item.info_bytes
        n_data += padded(item.n_bytes, limits.alignment)
        first = _PREAMBLE.size + (kv_bytes[0] if len(bounds) == 1 else kv_bytes[-1])
        n_file = padded(first + n_header, limits.alignment) + n_data
        n_tensors = index + 1 - bounds[-1]
        if n_tensors > 1 and not limits.allow(n_tensors, n_file):
            bounds.append(index)
            n_header, n_data = item.info_bytes, padded(item.n_bytes, limits.alignment)
    return [*bounds, len(sized)]


def _split_kvs(no: int, count: int, n_tensors: int) -> list[bytes]:
    kvs = {SPLIT_NO: u16(no), SPLIT_COUNT: u16(count), SPLIT_TENSORS: i32(n_tensors)}
    return [encode_kv(key, kv) for key, kv in kvs.items()]


def _place(
    file_name: str, kvs: Sequence[bytes], sized: Sequence[_Sized], alignment: int
) -> ShardLayout:
    infos = []
    offsets = []
    offset = 0
    for item in sized:
        infos.append(item.info(offset))
        offsets.append(offset)
        offset += padded(item.n_bytes, alignment)
    preamble = _PREAMBLE.pack(MAGIC, VERSION, len(sized), len(kvs))
    header = b"".join((preamble, *kvs, *infos))
    data_begin = padded(len(header), alignment)
    places = (
        TensorPlace(s.tensor.name, s.tensor.shape, s.tensor.type, data_begin + o, s.n_bytes)
        for s, o in zip(sized, offsets, strict=True)
    )
    return ShardLayout(
        file_name=file_name,
        header=header.ljust(data_begin, b"\0"),
        data_begin=data_begin,
        tensors=tuple(places),
        n_bytes=data_begin + offset,
    )
