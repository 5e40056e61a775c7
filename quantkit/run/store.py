"""Objects in a store that several machines reach, through fsspec: a folder, a bucket, anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError, UsageError


class Store:
    """Objects below `url`, such as `s3://BUCKET/PREFIX` or `file:///mnt/shared/staging`.

    Raises `UsageError` for a URL of no known kind, or of one whose package is not installed, and
    `OutputError` where the store refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        local = {"auto_mkdir": True} if "://" not in url or url.startswith("file:") else {}
        try:
            # For those who use one: it is quick to import, but what it brings may not be.
            self._fs, root = import_module("fsspec.core").url_to_fs(self.url, **local)
        except (ValueError, ImportError) as error:
            raise UsageError(
                f"no store that can be used: {error}",
                where=url,
                hint="s3:// needs the package s3fs, gs:// gcsfs; see fsspec's list",
            ) from None
        self._root = str(root)

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Make an object, or replace it."""
        with self._refusing(name):
            self._fs.pipe_file(self._path(name), bytes(data))

    def get(self, name: str) -> bytes:
        """All of an object."""
        with self._refusing(name):
            data: bytes = self._fs.cat_file(self._path(name))
        return data

    def put_file(self, name: str, path: Path) -> None:
        """Make an object of a file."""
        with self._refusing(name):
            self._fs.put_file(str(path), self._path(name))

    def get_file(self, name: str, path: Path) -> None:
        """Copy an object into a file."""
        with self._refusing(name):
            self._fs.get_file(self._path(name), str(path))

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with self._refusing(name):
            if self._fs.exists(self._path(name)):
                self._fs.rm_file(self._path(name))

    def clear(self) -> None:
        """Remove everything below the URL."""
        with self._refusing(""):
            if self._fs.exists(self._root):
                self._fs.rm(self._root, recursive=True)

    def below(self, name: str) -> Store:
        """The store whose objects all begin with `name`/."""
        return Store(f"{self.url}/{name}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _refusing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any library, by the kind of store
            raise OutputError(
                f"the store refuses: {type(error).__name__}: {_first_line(error)}",
                where=f"{self.url}/{name}".rstrip("/"),
            ) from None


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
