"""Repositories of the local Hub: commits of blobs, branches, and who may read them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".png", ".dat")
LFS_BYTES = 10 << 20  # what the Hub stores as LFS whatever it is called


@dataclass(frozen=True)
class Blob:
    """Content of a file: bytes, or a local file that is read when it is asked for."""

    data: bytes | Path
    is_lfs: bool = False

    @classmethod
    def of(cls, path: str, data: bytes | Path) -> Blob:
        """With the storage that the Hub would choose for this path."""
        n_bytes = len(data) if isinstance(data, bytes) else data.stat().st_size
        return cls(data, path.endswith(LFS_SUFFIXES) or n_bytes > LFS_BYTES)

    @cached_property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        end = self.size if end is None else min(end, self.size)
        if isinstance(self.data, bytes):
            return self.data[begin:end]
        with self.data.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """Git's id of the file, or of its LFS pointer."""
        content = self.pointer if self.is_lfs else self.read()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324

    @property
    def pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()

    @property
    def etag(self) -> str:
        """Without quotes: sha256 of an LFS file, git's id of any other."""
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Commit:
    """A state of a repository. `files` may be changed by a test that plays a lying server."""

    sha: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """One repository. Gated: files want a token of `members`. Private: everything does."""

    id: str
    private: bool = False
    gated: bool = False
    members: set[str] = field(default_factory=set)  # user names
    commits: list[Commit] = field(default_factory=list)  # oldest first
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit sha

    @property
    def head(self) -> Commit:
        """What `main` points at."""
        return self.at("main")

    def at(self, revision: str) -> Commit:
        """A branch, a tag or a commit's full sha; KeyError."""
        sha = self.refs.get(revision, revision)
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise KeyError(revision)

    def commit(
        self, changes: Mapping[str, Blob | bytes | Path | None], title: str = "a commit"
    ) -> Commit:
        """A new head of `main` with some files added or replaced, and those of None removed."""
        files = dict(self.head.files) if self.commits else {}
        for path, content in changes.items():
            if content is None:
                files.pop(path, None)
            else:
                files[path] = content if isinstance(content, Blob) else Blob.of(path, content)
        seed = repr(
            (self.id, len(self.commits), title, sorted((p, b.etag) for p, b in files.items()))
        )
        sha = hashlib.sha1(seed.encode()).hexdigest()  # noqa: S324
        self.commits.append(Commit(sha, title, files))
        self.refs["main"] = sha
        return self.commits[-1]
