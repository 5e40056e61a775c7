"""What is written beside the shards: `STEM.manifest.json`, the digests of everything in them.

A tensor's digest does not need the tensor in one piece: its bytes are `n_slabs` equal slabs, each
cut into chunks of `chunk_bytes` (the last of a slab may be shorter), and the digest is the sha256
of the chunks' sha256s, one after the other. So tiles can be hashed in any order, as they are made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from quantkit.container.names import MAX_SHARDS, MAX_TENSOR_NAME_BYTES, check_name, escaped, shown
from quantkit.errors import GgufError
from quantkit.run.json_size import parsed_bytes
from quantkit.types import GgmlType

SUFFIX = ".manifest.json"
MAX_MANIFEST_BYTES = 8 << 20  # some 300 bytes per tensor
_MAX_PARSED_BYTES = 24 << 20
MAX_CHUNKS = 1 << 20  # per tensor; bounds the work of verifying it

_FILE_NAME = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,249}\.gguf")


def _is_shard_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError("no plain name of a GGUF file")
    return name


def _is_tensor_name(name: str) -> str:
    try:
        check_name(name, max_bytes=MAX_TENSOR_NAME_BYTES, where="")
    except GgufError as error:
        raise ValueError(error.message) from error
    return name


def _is_type(name: str) -> str:
    if name not in GgmlType.__members__:
        raise ValueError("no tensor type")
    return name


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Size = Annotated[int, Field(ge=0, lt=1 << 63)]
_Positive = Annotated[int, Field(ge=1, lt=1 << 63)]
_Text = Annotated[str, Field(max_length=1 << 12)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourceRecord(_Record):
    """The checkpoint: how the user named it and what its bytes were."""

    name: _Text
    fingerprint: _Text


class RecipeRecord(_Record):
    """The recipe: `digest` is that of its canonical form, `text` what was read."""

    name: _Text
    digest: _Text
    text: Annotated[str, Field(max_length=1 << 20)]


class TensorRecord(_Record):
    """A tensor's place in its file and the digest of its bytes.

    `repacked` says that codes were copied, not encoded, but for blocks that the log counts.
    """

    name: Annotated[str, AfterValidator(_is_tensor_name)]
    type: Annotated[str, AfterValidator(_is_type)]
    begin: _Size
    n_bytes: _Positive
    n_slabs: _Positive
    chunk_bytes: _Positive
    sha256: _Sha256
    repacked: bool = False

    @model_validator(mode="after")
    def _cuts_fit(self) -> Self:
        slab_bytes, rest = divmod(self.n_bytes, self.n_slabs)
        block_bytes = GgmlType[self.type].block_bytes
        if rest or slab_bytes % block_bytes:
            raise ValueError("slabs are not equal and of whole blocks")
        if self.chunk_bytes < slab_bytes and self.chunk_bytes % block_bytes:
            raise ValueError("chunks are not of whole blocks")
        if self.n_slabs * -(-slab_bytes // self.chunk_bytes) > MAX_CHUNKS:
            raise ValueError(f"more than {MAX_CHUNKS} chunks")
        return self


class ShardRecord(_Record):
    """A file: its size, the digest of its header, its tensors in order."""

    file: Annotated[str, AfterValidator(_is_shard_name)]
    n_bytes: _Positive
    header_sha256: _Sha256
    tensors: tuple[TensorRecord, ...]

    @model_validator(mode="after")
    def _tensors_fit(self) -> Self:
        end = 0
        for tensor in self.tensors:
            if tensor.begin < end or tensor.begin + tensor.n_bytes > self.n_bytes:
                raise ValueError("tensors overlap or leave the file")
            end = tensor.begin + tensor.n_bytes
        return self


class Manifest(_Record):
    """The whole record; `calibration` is what the file's metadata say of it."""

    format_version: Literal[1] = 1
    quantkit_version: _Text
    created: Annotated[AwareDatetime, Field(strict=False)]
    plan: _Sha256
    source: SourceRecord
    recipe: RecipeRecord
    calibration: Annotated[dict[_Text, _Text | int], Field(max_length=64)] = Field(
        default_factory=dict
    )
    shards: Annotated[tuple[ShardRecord, ...], Field(min_length=1, max_length=MAX_SHARDS)]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        files = [shard.file for shard in self.shards]
        tensors = [tensor.name for shard in self.shards for tensor in shard.tensors]
        if len(set(files)) < len(files) or len(set(tensors)) < len(tensors):
            raise ValueError("two shards or tensors have one name")
        return self


def manifest_path(folder: Path, stem: str) -> Path:
    """Where the manifest of a shard set lies."""
    return folder / f"{stem}{SUFFIX}"


def dump_manifest(manifest: Manifest) -> bytes:
    """The manifest's file content."""
    return manifest.model_dump_json(indent=1).encode() + b"\n"


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest; `GgufError` for one that is unreadable, too large or wrong."""
    where = escaped(str(path))
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise GgufError(f"larger than {MAX_MANIFEST_BYTES} bytes", where=where)
        raw = path.read_bytes()
    except OSError as error:
        raise GgufError(f"cannot be read: {error.strerror}", where=where) from error
    if parsed_bytes(raw) > _MAX_PARSED_BYTES:
        raise GgufError("takes too much memory, unlike any manifest", where=where)
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise GgufError(
            f"not a manifest of this version: {shown(place or 'file')}: {shown(first['msg'])}",
            where=where,
        ) from error


def chunk_ranges(n_bytes: int, n_slabs: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of a tensor's chunks, relative to its first byte, in digest order.

    `n_bytes` is a multiple of `n_slabs`.
    """
    slab_bytes = n_bytes // n_slabs
    for slab in range(0, n_bytes, slab_bytes):
        for begin in range(slab, slab + slab_bytes, chunk_bytes):
            yield begin, min(begin + chunk_bytes, slab + slab_bytes)


def tensor_digest(chunk_digests: Iterable[bytes]) -> str:
    """A tensor's digest (hex) from the sha256s of its chunks, in order, one by one or joined."""
    digest = hashlib.sha256()
    for chunk in chunk_digests:
        digest.update(chunk)
    return digest.hexdigest()
