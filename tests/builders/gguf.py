"""GGUF files spelled byte by byte, independent of quantkit's writer, and whole shard sets on disk.

`gguf_bytes` believes whatever it is told, so it can lie about counts, lengths, types and offsets.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from quantkit.container.layout import ShardLayout, TensorPlace
from quantkit.types import GgmlType
from quantkit.write.manifest import (
    Manifest,
    RecipeRecord,
    ShardRecord,
    SourceRecord,
    TensorRecord,
    chunk_ranges,
    dump_manifest,
    manifest_path,
    tensor_digest,
)

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string; `length` replaces the true one."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def kv(key: str | bytes, type_: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<i", type_) + payload


def array(item: int, n: int, payload: bytes = b"") -> bytes:
    """The payload of an ARRAY."""
    return struct.pack("<iQ", item, n) + payload


def info(
    name: str | bytes,
    ne: Sequence[int] = (32,),
    type_: int = GgmlType.F32,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    """A tensor info; `ne` in ggml's order, row length first."""
    dims = struct.pack(f"<I{len(ne)}Q", len(ne) if n_dims is None else n_dims, *ne)
    return text(name) + dims + struct.pack("<iQ", type_, offset)


def gguf_bytes(
    kvs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_kvs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file: preamble, entries, padding to `alignment`, data. Counts are true unless given."""
    counts = (
        len(infos) if n_tensors is None else n_tensors,
        len(kvs) if n_kvs is None else n_kvs,
    )
    head = magic + struct.pack("<IQQ", version, *(n % 2**64 for n in counts))
    head += b"".join((*kvs, *infos))
    return head + b"\0" * (-len(head) % alignment) + data


def finite_bytes(n_bytes: int, seed: int = 0) -> bytes:
    """Random data; bytes below 64 make no NaN and no infinity in any type but F64."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 64, n_bytes, dtype=np.uint8).tobytes()


def write_shards(folder: Path, layouts: Sequence[ShardLayout]) -> dict[str, bytes]:
    """Put the files of a layout on disk, filled with random finite data; returns it by tensor."""
    data: dict[str, bytes] = {}
    for layout in layouts:
        content = bytearray(layout.n_bytes)
        content[: layout.data_begin] = layout.header
        for place in layout.tensors:
            data[place.name] = finite_bytes(place.n_bytes, seed=len(data))
            content[place.begin : place.end] = data[place.name]
        (folder / layout.file_name).write_bytes(content)
    return data


def write_manifest(
    folder: Path,
    stem: str,
    layouts: Sequence[ShardLayout],
    data: Mapping[str, bytes],
    *,
    n_slabs: int = 1,
    chunk_rows: int = 1,
) -> Manifest:
    """Record a set as the writer would, with tiles of `chunk_rows` rows."""

    def tensor(place: TensorPlace) -> TensorRecord:
        chunk_bytes = chunk_rows * place.type.row_bytes(place.shape[-1])
        raw = data[place.name]
        chunks = chunk_ranges(place.n_bytes, n_slabs, chunk_bytes)
        return TensorRecord(
            name=place.name,
            type=place.type.name,
            begin=place.begin,
            n_bytes=place.n_bytes,
            n_slabs=n_slabs,
            chunk_bytes=chunk_bytes,
            sha256=tensor_digest(hashlib.sha256(raw[b:e]).digest() for b, e in chunks),
        )

    manifest = Manifest(
        quantkit_version="0",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        plan="0" * 64,
        source=SourceRecord(name="source", fingerprint="0"),
        recipe=RecipeRecord(name="recipe", digest="0", text=""),
        shards=tuple(
            ShardRecord(
                file=layout.file_name,
                n_bytes=layout.n_bytes,
                header_sha256=hashlib.sha256(layout.header).hexdigest(),
                tensors=tuple(map(tensor, layout.tensors)),
            )
            for layout in layouts
        ),
    )
    manifest_path(folder, stem).write_bytes(dump_manifest(manifest))
    return manifest
