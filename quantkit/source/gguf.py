"""A GGUF file or shard set as a source of weights: what it holds, and its blocks on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from quantkit.container.content import first_nonfinite
from quantkit.container.names import escaped, parse_shard_file_name, shard_file_name, shown
from quantkit.container.reader import GgufFile
from quantkit.container.shardset import ShardSet, open_shards
from quantkit.errors import GgufError, NonFiniteError, SourceError
from quantkit.hub.folder import HubFile
from quantkit.run.closing import Closing
from quantkit.source.files import Bytes, ShardFiles, Shards
from quantkit.source.folder import Folder, check_name
from quantkit.source.remote import HubShards
from quantkit.types import GgmlType, KvType, TensorRef, TensorSpec, Weight, WeightFormat

MODEL, MMPROJ = "model", "mmproj"
_KINDS = {"imatrix": "an imatrix", "adapter": "an adapter"}


class GgufSource(Closing):
    """An open GGUF model; reading it is safe from any thread. Made by `open_gguf`.

    `root` is the file that was named, `weights` has every tensor in order, `kind` is `model` or
    `mmproj`.
    """

    def __init__(self, root: Path, shards: ShardSet, files: Shards, fingerprint: str) -> None:
        if not shards.n_tensors:
            raise GgufError("holds no tensors", where=escaped(str(root)))
        self.root = root
        first = shards.files[0].remote
        self.origin = str(first) if first is not None else root.name
        self.shards = shards
        self.kvs = shards.kvs
        self.kind = _kind(shards)
        self.arch = _text(shards, "general.architecture")
        self.weights = {
            tensor.name: Weight(
                tensor.name,
                WeightFormat.GGUF,
                tensor.shape,
                TensorRef(
                    tensor.name, tensor.type.name, tensor.shape, file.path.name,
                    tensor.begin, tensor.end,
                ),
            )
            for file, tensor in shards.tensors()
        }  # fmt: skip
        self.tensors = {name: weight.data for name, weight in self.weights.items()}
        self._files = files
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        """SHA-256 (hex) of each file's header, name, size and time."""
        return self._fingerprint

    def read_blocks(self, spec: TensorSpec, slab: int, first: int, last: int) -> Bytes:
        """Rows `first .. last` of slab number `slab` as they are stored, u8[rows, row_bytes].

        Raises `NonFiniteError` where a float or a block's scale is NaN or infinite, `SourceError`
        if the file has changed or cannot be read.
        """
        source = spec.slabs[slab]
        ref = source.weight.data
        type_ = GgmlType[ref.dtype]
        row_bytes = type_.row_bytes(spec.grid[1])
        begin, n_rows = source.row_begin + first, last - first
        data = self._files.read(ref.file, ref.begin + begin * row_bytes, n_rows * row_bytes)
        if (bad := first_nonfinite(type_, data.data)) is not None:
            row = begin + bad * type_.block_bytes // row_bytes
            raise NonFiniteError(
                f"holds NaN or infinity in row {row}",
                where=f"{ref.file}: {shown(ref.name)}",
                hint="download the file again; if its checksum is right, the model is broken",
            )
        return data.reshape(n_rows, row_bytes)

    def will_read(self, weights: Iterable[Weight]) -> None:
        """Tell which weights are read from now on and in which order, to have them at hand."""
        self._files.will_read(weight.data for weight in weights)

    def close(self) -> None:
        """Close the files. What has been read stays valid."""
        self._files.close()


def open_gguf(path: Path | HubFile) -> GgufSource:
    """Open a GGUF model, or the whole shard set that `path` belongs to, reading headers only.

    Raises `GgufError` for a file that breaks the format or holds no model, `SourceError` for one
    that cannot be read or changes meanwhile.
    """
    if not (path.is_file() if isinstance(path, Path) else path.exists()):
        raise GgufError("no such file", where=escaped(str(path)))
    files: Shards
    if isinstance(path, Path):
        root, files = path, ShardFiles(_GgufFolder(path.parent))
    else:
        root, files = path.display, HubShards(path.folder, path.prefix)
    try:
        for name in _names(path):
            files.size(name)  # holds the file to what it is now, before its header is read
        shards = open_shards(path)
        headers = {file.path.name: _header_digest(files, file) for file in shards.files}
        said = json.dumps([headers, dict(files.stamps)], sort_keys=True)
        return GgufSource(root, shards, files, hashlib.sha256(said.encode()).hexdigest())
    except BaseException:
        files.close()
        raise


class _GgufFolder(Folder):
    """The folder of a GGUF file."""

    def open_shard(self, name: str) -> int:
        """A read-only descriptor of a GGUF file; the caller closes it."""
        return self._open(check_name(name, where=str(self.root), suffix=".gguf"))


def _names(path: Path | HubFile) -> list[str]:
    """File names of the set that are there; whether it is complete is for `open_shards` to say."""
    named = parse_shard_file_name(path.name)
    if named is None:
        return [path.name]
    stem, _, count = named
    names = [shard_file_name(stem, no, count) for no in range(count)]
    return [name for name in names if path.with_name(name).exists()]


def _header_digest(files: Shards, file: GgufFile) -> str:
    """SHA-256 of a header, read again from the file that weights will be read from."""
    name, stamp = file.path.name, file.stamp()
    if stamp != files.stamps.get(name) or stamp[0] != file.n_bytes:
        raise SourceError("has changed while it was opened", where=name, hint="run again")
    if file.remote is not None:
        return file.remote.etag  # of the whole file, header and all
    return hashlib.sha256(files.read(name, 0, file.data_begin).data).hexdigest()


def _kind(shards: ShardSet) -> str:
    kind = _text(shards, "general.type", MODEL)
    if _text(shards, "general.architecture", "") == "clip":
        return MMPROJ
    if kind not in (MODEL, MMPROJ):
        raise GgufError(
            f"is {_KINDS.get(kind, f'a file of type {shown(kind)}')}, not a model",
            where=escaped(str(shards.files[0].path)),
        )
    return kind


def _text(shards: ShardSet, key: str, default: str | None = None) -> str:
    kv = shards.kvs.get(key)
    if kv is None and default is not None:
        return default
    if kv is None or kv.type is not KvType.STRING:
        raise GgufError(f"{key} is missing or no text", where=escaped(str(shards.files[0].path)))
    return str(kv.value)
