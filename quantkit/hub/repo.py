"""A repository at one commit: what it holds, by name, size and digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.errors import SourceError
from quantkit.hub.bounded import at_most
from quantkit.hub.client import Caller, api
from quantkit.hub.ref import HubRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_ENTRIES = 100_000  # what the Hub advises as the most files of a repository
_MAX_PAGES = MAX_ENTRIES // 50  # the Hub gives at least twice as many entries on one
MAX_FILE_BYTES = 1 << 44  # 16 TiB; the Hub takes 500 GB
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the repository. `etag` is the sha256 of an LFS file, git's id of any other."""

    path: str
    size: int
    etag: str

    def is_content(self, data: bytes | bytearray | memoryview) -> bool:
        """Whether these are the file's bytes, by their digest."""
        if len(self.etag) == 64:
            return hashlib.sha256(data).hexdigest() == self.etag
        git = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
        git.update(data)
        return git.hexdigest() == self.etag


@dataclass(frozen=True)
class Repo:
    """A repository pinned to a commit. `entries` holds its files by path."""

    ref: HubRef
    commit: str
    entries: dict[str, Entry]

    @property
    def name(self) -> str:
        """The name without the owner."""
        return self.ref.repo.partition("/")[2]

    def __str__(self) -> str:
        return f"{self.ref.repo}@{self.commit[:8]}"

    def digest(self) -> str:
        """SHA-256 (hex) of the listing: the same commit must always have the same."""
        listing = sorted((e.path, e.size, e.etag) for e in self.entries.values())
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def commit_of(caller: Caller, ref: HubRef) -> str:
    """The commit that the revision of `ref` means now."""
    client = api()
    sha = caller.call(
        lambda: client.model_info(ref.repo, revision=ref.revision, timeout=_timeout()).sha,
        "asking for the revision",
    )
    if not isinstance(sha, str) or not _COMMIT.fullmatch(sha):
        raise SourceError("the Hub gives no commit for the revision", where=str(ref))
    return sha


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit already, and so cannot move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def open_repo(caller: Caller, ref: HubRef, commit: str) -> Repo:
    """List a repository at a commit. Raises `SourceError` for a listing that cannot be one."""
    client = api()
    with at_most(_MAX_PAGES):
        entries = caller.call(lambda: _listed(client, ref, commit), "listing the files")
    return Repo(ref, commit, entries)


def _listed(client: HfApi, ref: HubRef, commit: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    items: Iterable[Any] = client.list_repo_tree(ref.repo, recursive=True, revision=commit)
    for n_seen, item in enumerate(items):
        if n_seen >= MAX_ENTRIES:
            raise SourceError(f"lists more than {MAX_ENTRIES:,} files", where=str(ref))
        if hasattr(item, "blob_id"):
            entry = Entry(item.path, item.size, item.lfs.sha256 if item.lfs else item.blob_id)
            _check(entry, item.lfs.size if item.lfs else item.size, ref, found)
            found[entry.path] = entry
    return found


def _check(entry: Entry, lfs_size: Any, ref: HubRef, found: dict[str, Entry]) -> None:
    where = f"{ref.repo}: {str(entry.path)[:200]!r}"
    if not isinstance(entry.path, str) or entry.path in found:
        raise SourceError("the Hub lists a file twice, or without a name", where=where)
    size_ok = type(entry.size) is int and 0 <= entry.size <= MAX_FILE_BYTES
    if not size_ok or lfs_size != entry.size:
        raise SourceError(f"the Hub gives an impossible size: {entry.size!r:.40}", where=where)
    if not isinstance(entry.etag, str) or not _ETAG.fullmatch(entry.etag):
        raise SourceError("the Hub gives no sound digest of the file", where=where)


def _timeout() -> float:
    from huggingface_hub import constants  # noqa: PLC0415

    return float(constants.HF_HUB_ETAG_TIMEOUT)
