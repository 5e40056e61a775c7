"""Where a forward pass gets its weights: rows of GGUF-named tensors, as f32, on demand.

A checkpoint is read through its family's description and a GGUF file through its codecs, so the
blocks above see one kind of model: GGUF names, GGUF metadata, llama.cpp's row order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from quantkit.arch.base import Model
from quantkit.container.layout import TensorPlace
from quantkit.container.reader import GgufFile
from quantkit.container.shardset import ShardSet
from quantkit.errors import GgufError, NonFiniteError
from quantkit.quantize.codec import codec_of, encodable
from quantkit.source.checkpoint import Checkpoint
from quantkit.source.slabs import read_rows
from quantkit.types import GgmlType, Kv, KvType

Tile = npt.NDArray[np.float32]  # [rows, cols]
_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class Weights(Protocol):
    """A model's tensors under GGUF names. Reading is safe from any thread."""

    @property
    def kvs(self) -> Mapping[str, Kv]:
        """GGUF metadata."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first, the reverse of ggml's `ne`."""

    def type(self, name: str) -> GgmlType:
        """How it is stored; F32 for a checkpoint, whose weights count as exact."""

    def read(self, name: str, begin: int, end: int) -> Tile:
        """Rows `begin .. end` with leading axes flattened, f32[rows, cols]."""


class CheckpointWeights:
    """The weights of a checkpoint, expanded exactly."""

    def __init__(self, checkpoint: Checkpoint, model: Model) -> None:
        self.kvs: Mapping[str, Kv] = {
            **model.kvs,
            "general.architecture": Kv(KvType.STRING, model.arch),
        }
        self._checkpoint = checkpoint
        self._specs = {spec.name: spec for spec in model.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self._specs[name].shape

    def type(self, name: str) -> GgmlType:
        """See `Weights`."""
        return GgmlType.F32

    def read(self, name: str, begin: int, end: int) -> Tile:
        """See `Weights`. A vector is one row."""
        spec = self._specs[name]
        if len(spec.shape) == 1:
            return read_rows(self._checkpoint, spec, 0, spec.shape[0]).reshape(1, -1)[begin:end]
        return read_rows(self._checkpoint, spec, begin, end)


class GgufWeights:
    """The weights of a GGUF file or shard set, decoded."""

    def __init__(self, shards: ShardSet) -> None:
        self.kvs: Mapping[str, Kv] = shards.kvs
        self._places: dict[str, tuple[GgufFile, TensorPlace]] = {}
        self._fds: dict[str, int] = {}
        for file, tensor in shards.tensors():
            if tensor.type not in encodable():
                raise GgufError(
                    f"tensor {tensor.name} is {tensor.type.name}, which cannot be decoded",
                    where=str(file.path),
                )
            self._places[tensor.name] = (file, tensor)
        for file in shards.files:
            if file.remote is None:
                self._fds[str(file.path)] = os.open(file.path, _FLAGS)

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self._places[name][1].shape

    def type(self, name: str) -> GgmlType:
        """See `Weights`."""
        return self._places[name][1].type

    def read(self, name: str, begin: int, end: int) -> Tile:
        """See `Weights`. Raises `NonFiniteError` where a block decodes to NaN or infinity."""
        file, tensor = self._places[name]
        row_bytes = tensor.type.row_bytes(tensor.shape[-1])
        n_bytes = (end - begin) * row_bytes
        offset = tensor.begin + begin * row_bytes
        if file.remote is not None:
            data = file.remote.read(offset, offset + n_bytes)
        else:
            data = os.pread(self._fds[str(file.path)], n_bytes, offset)
        if len(data) != n_bytes:
            raise GgufError(f"ends inside {tensor.name}", where=str(file.path))
        blocks = np.frombuffer(data, np.uint8).reshape(end - begin, row_bytes)
        tile = codec_of(tensor.type).decode(blocks)
        if not (np.isfinite(tile.min()) and np.isfinite(tile.max())):
            raise NonFiniteError(f"{tensor.name} holds NaN or infinity", where=str(file.path))
        return tile
