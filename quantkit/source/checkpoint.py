"""A checkpoint as one object: its config, what tensors it holds, and their bytes on demand."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError
from quantkit.hub.folder import HubFolder
from quantkit.run.closing import Closing
from quantkit.source.files import Bytes, ShardFiles, Shards
from quantkit.source.folder import Folder, Place, read_json
from quantkit.source.header import parse_header, read_header
from quantkit.source.index import add_tensors, check_against_index, find_shards
from quantkit.source.packed import group_weights
from quantkit.source.remote import HubShards
from quantkit.types import TensorRef, Weight

CONFIG_NAME = "config.json"
MAX_JSON_BYTES = 4 * 2**20


class Checkpoint(Closing):
    """An open checkpoint; reading it is safe from any thread. Made by `open_checkpoint`.

    `origin` names it in records: OWNER/NAME@COMMIT, or a local folder's name.
    `tensors` is everything that is stored, `weights` what it means: see `group_weights`.
    """

    def __init__(
        self,
        folder: Place,
        files: Shards,
        config: dict[str, Any],
        tensors: dict[str, TensorRef],
        fingerprint: str,
    ) -> None:
        self.root: Path = folder.root
        self.origin = f"{folder}" if isinstance(folder, HubFolder) else folder.root.name
        self.config = config
        self.tensors = tensors
        self.shapes_checked: set[str] = set()  # weights whose stored shape has been read
        self._folder = folder
        self._files = files
        self._fingerprint = fingerprint
        self.weights: dict[str, Weight] = group_weights(tensors, config, self.pread)

    @property
    def n_bytes(self) -> int:
        """Size of all shards together."""
        return self._files.n_bytes

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the config, the headers and each shard's name, size and time.

        Two runs with the same fingerprint read the same weights, short of someone forging times.
        On the Hub a shard's digest stands in the place of its time, and the commit is in it.
        """
        return self._fingerprint

    def pread(self, ref: TensorRef, offset: int, n_bytes: int) -> Bytes:
        """Bytes `offset .. offset + n_bytes` of a tensor, as u8[n_bytes] of the caller's own.

        Raises `SourceError` if the file has changed or cannot be read.
        """
        if offset < 0 or n_bytes < 0 or offset + n_bytes > ref.n_bytes:
            raise ValueError(f"{n_bytes} bytes at {offset} of {ref.name}, which has {ref.n_bytes}")
        return self._files.read(ref.file, ref.begin + offset, n_bytes)

    def read_bytes(self, name: str, max_bytes: int) -> bytes | None:
        """A side file of the folder; None if there is none, `SourceError` above `max_bytes`."""
        return self._folder.read_bytes(name, max_bytes)

    def read_text(self, name: str, max_bytes: int) -> str | None:
        """A UTF-8 side file with its line ends as they are; None if there is none."""
        raw = self.read_bytes(name, max_bytes)
        try:
            return None if raw is None else raw.decode()
        except UnicodeDecodeError as error:
            where = str(self.root / name)
            raise SourceError(f"not UTF-8 at byte {error.start}", where=where) from None

    def read_json(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
        """A side file that holds a JSON object; None if there is none."""
        return read_json(self._folder, name, max_bytes)

    def will_read(self, weights: Iterable[Weight]) -> None:
        """Tell which weights are read from now on and in which order, to have them at hand."""
        self._files.will_read(
            ref
            for weight in weights
            for ref in (weight.data, weight.scale, *weight.others)
            if ref is not None
        )

    def close(self) -> None:
        """Close the shards. What has been read stays valid."""
        self._files.close()


def open_checkpoint(path: Path | HubFolder) -> Checkpoint:
    """Open a folder of safetensors shards with a config.json, reading headers only.

    The folder is a local one or a repository on the Hub.

    Raises `SourceError` if the files contradict each other or the index, `UnsupportedError` for
    pickles and for quantised formats that are not known.
    """
    folder = Folder(path) if isinstance(path, Path) else path
    config = read_json(folder, CONFIG_NAME, MAX_JSON_BYTES)
    if config is None:
        raise SourceError(
            f"holds no {CONFIG_NAME}",
            where=str(folder.root if isinstance(folder, Folder) else folder),
            hint="name the folder that holds config.json and the model's shards",
        )
    files = ShardFiles(folder) if isinstance(folder, Folder) else HubShards(folder)
    try:
        with _collector_paused():
            tensors, digests = _read_headers(folder, files)
            digests[CONFIG_NAME] = hashlib.sha256(_canonical(config)).hexdigest()
            said = [digests, dict(files.stamps), *([folder.version] if folder.version else [])]
            fingerprint = hashlib.sha256(_canonical(said)).hexdigest()
            return Checkpoint(folder, files, config, tensors, fingerprint)
    except BaseException:
        files.close()
        raise


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _read_headers(folder: Place, files: Shards) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """All tensors, and the SHA-256 of each shard's header."""
    tensors: dict[str, TensorRef] = {}
    digests: dict[str, str] = {}
    shards = find_shards(folder)
    files.will_open(shards)
    for file, expected in shards.items():
        n_file_bytes = files.size(file)
        raw = read_header(partial(_read, files, file), n_file_bytes, file)
        refs = parse_header(raw, n_file_bytes, file)
        if expected is not None:
            check_against_index(file, refs, expected)
        add_tensors(tensors, refs)
        files.lay_out(file, refs)
        digests[file] = hashlib.sha256(raw).hexdigest()
    return tensors, digests


def _read(files: Shards, file: str, offset: int, n_bytes: int) -> bytes:
    return files.read(file, offset, n_bytes).tobytes()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Hundreds of thousands of small objects, none of them garbage: passes double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
