"""The folder of a checkpoint, an untrusted place: which names are opened, how much is read.

Everything in here may come from a stranger's repository. Names that a file mentions must be plain
names of this folder; only regular files are opened, so that a FIFO cannot hang a run nor a device
be touched; every read has a cap.

Links. The Hub's cache keeps a snapshot as links into `../../blobs`, so links must work. A link to a
shard may lead anywhere: its target is either sound safetensors, which is what the user asked to
convert, or refused without a byte of it being shown. The other files (chat template, tokenizer)
are copied into what gets published, so a link that leads out of the folder and out of the cache
would let a repository publish a file of the user's; it is refused.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from quantkit.errors import SourceError
from quantkit.run.json_size import parsed_bytes
from quantkit.run.names import is_plain_name

MAX_JSON_DEPTH = 64
MAX_PARSED_BYTES = 256 << 20


class Place(Protocol):
    """Where a checkpoint's files are: a local folder, or a repository on the Hub."""

    @property
    def root(self) -> Path:
        """A local folder that bears the model's name and holds, or will hold, small files."""

    @property
    def version(self) -> str:
        """What names the state of all files together; empty where nothing does."""

    def names(self) -> list[str]:
        """Names of everything in the folder, sorted."""

    def read_bytes(self, name: str, max_bytes: int) -> bytes | None:
        """All of a small file; None if there is none; `SourceError` above `max_bytes`."""


def check_name(name: object, *, where: str, suffix: str = "") -> str:
    """`name` if it is a plain file name that cannot lead out of the folder, on any platform.

    Refuses what `is_plain_name` does, and another `suffix`.
    """
    if not isinstance(name, str):
        raise SourceError(f"a file name must be a string, got {type(name).__name__}", where=where)
    if not is_plain_name(name) or not name.endswith(suffix) or name == suffix:
        raise SourceError(
            f"{name[:80]!r} is not a plain {suffix or 'file'} name inside the folder",
            where=where,
            hint="the checkpoint's index was not made by a sound tool; do not trust its files",
        )
    return name


@contextmanager
def json_errors(where: str) -> Iterator[None]:
    """What goes wrong inside while JSON is read, as a `SourceError`."""
    try:
        yield
    except RecursionError:
        raise SourceError("JSON is nested too deeply", where=where) from None
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 at byte {error.start}", where=where) from None
    except ValueError as error:
        raise SourceError(f"not sound JSON: {str(error)[:200]}", where=where) from None


def parse_json(raw: bytes, *, where: str) -> Any:
    """JSON from a stranger: UTF-8, at most 64 levels deep.

    Refuses what would take more than 256 MiB of memory.
    """
    if parsed_bytes(raw) > MAX_PARSED_BYTES:
        raise SourceError("takes too much memory, unlike any checkpoint's", where=where)
    with json_errors(where):
        value = json.loads(raw.decode())
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return value
    raise SourceError(f"JSON is nested deeper than {MAX_JSON_DEPTH} levels", where=where)


def _children(node: Any) -> list[Any]:
    """Containers directly inside a JSON value."""
    if isinstance(node, dict):
        node = node.values()
    elif not isinstance(node, list):
        return []
    return [child for child in node if isinstance(child, (dict, list))]


def read_json(place: Place, name: str, max_bytes: int) -> dict[str, Any] | None:
    """A JSON object from a small file; None if there is none."""
    raw = place.read_bytes(name, max_bytes)
    if raw is None:
        return None
    where = str(place.root / name)
    value = parse_json(raw, where=where)
    if not isinstance(value, dict):
        raise SourceError(f"a JSON object is expected, got {type(value).__name__}", where=where)
    return value


class Folder:
    """Confined access to the files directly inside one folder."""

    version = ""

    def __init__(self, path: Path) -> None:
        if path.is_file():
            raise SourceError(
                "is a file",
                where=str(path),
                hint="name the checkpoint's folder, the one that holds config.json",
            )
        if not path.is_dir():
            raise SourceError(
                "no such folder",
                where=str(path),
                hint="MODEL is a local folder, or OWNER/NAME of a model on the Hub",
            )
        self.root = path.resolve()

    def names(self) -> list[str]:
        """Names of everything in the folder, sorted."""
        try:
            return sorted(os.listdir(self.root))  # noqa: PTH208  (names, not paths)
        except OSError as error:
            raise _io_error("listed", self.root, error) from error

    def open_shard(self, name: str) -> int:
        """A read-only descriptor of a safetensors file; the caller closes it."""
        return self._open(check_name(name, where=str(self.root), suffix=".safetensors"))

    def read_bytes(self, name: str, max_bytes: int) -> bytes | None:
        """All of a small file; None if there is none; `SourceError` above `max_bytes`."""
        where = str(self.root / check_name(name, where=str(self.root)))
        if not os.path.lexists(where):
            return None
        self._check_link(name)
        fd = self._open(name)
        try:
            with os.fdopen(fd, "rb") as file:
                raw = file.read(max_bytes + 1)
        except OSError as error:
            raise _io_error("read", Path(where), error) from error
        if len(raw) > max_bytes:
            raise SourceError(f"is larger than the {max_bytes:,} bytes allowed", where=where)
        return raw

    def read_json(self, name: str, max_bytes: int) -> dict[str, Any] | None:
        """A JSON object from a small file; None if there is none."""
        return read_json(self, name, max_bytes)

    def _check_link(self, name: str) -> None:
        path = self.root / name
        if not path.is_symlink():
            return
        allowed = [self.root]
        if self.root.parent.name == "snapshots":
            allowed.append(self.root.parent.parent / "blobs")
        if Path(os.path.realpath(path)).parent not in allowed:
            raise SourceError(
                "is a link that leads out of the checkpoint",
                where=str(path),
                hint="replace the link by a copy of the file if you trust it",
            )

    def _open(self, name: str) -> int:
        path = self.root / name
        try:
            # Looked at before opening: opening a device can already have an effect.
            mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    return fd
                os.close(fd)
        except OSError as error:
            raise _io_error("opened", path, error) from error
        raise SourceError("is not a regular file", where=str(path))


def _io_error(verb: str, path: Path, error: OSError) -> SourceError:
    return SourceError(f"cannot be {verb}: {error.strerror or error}", where=str(path))
