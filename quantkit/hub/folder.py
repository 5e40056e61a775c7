"""A repository, pinned to a commit, as a folder: what there is, small files whole, large by range.

The commit is written down beside the spool, so that a run which is continued reads what it began
with, even when the branch has moved on meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import HubError, SourceError, UsageError
from quantkit.hub.client import NO_REVISION, Caller
from quantkit.hub.fetch import Fetcher
from quantkit.hub.files import HubFiles
from quantkit.hub.ref import HubRef
from quantkit.hub.repo import Repo, commit_of, is_commit, open_repo
from quantkit.hub.spool import Spool
from quantkit.run import fs
from quantkit.run.names import is_plain_name

PIN = "pin.json"
_MAX_PIN_BYTES = 4096
_MIRRORED = ("README.md", "config.json", "generation_config.json")  # what others read from disk


class HubFolder:
    """The root of a repository at one commit. Safe from any thread.

    Small files are kept in `root`, a local folder that bears the repository's name.
    """

    def __init__(self, repo: Repo, root: Path, files: HubFiles, spool: Spool) -> None:
        self.repo = repo
        self.root = root
        self.files = files
        self._spool = spool
        self._counted: set[str] = set()  # small files that take their room in the spool
        fs.make_folder(root)

    def __str__(self) -> str:
        return f"{self.repo.ref.repo}@{self.repo.commit}"

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.name

    @property
    def version(self) -> str:
        """The commit."""
        return self.repo.commit

    @property
    def spool_limit(self) -> int:
        """Most bytes that are kept of it on disk."""
        return self._spool.limit

    def still_to_spool(self, n_bytes: int) -> int:
        """Most bytes that the spool will grow by while so many are read."""
        return max(0, min(self._spool.limit, n_bytes) - self._spool.n_bytes)

    def names(self) -> list[str]:
        """Names of the files at the root, sorted; those that are no plain names are left out."""
        return sorted(name for name in self.repo.entries if is_plain_name(name))

    def read_bytes(self, name: str, max_bytes: int) -> bytes | None:
        """All of a small file; None if there is none; `SourceError` above `max_bytes`.

        Its digest is checked, also when it is there from an earlier run.
        """
        entry = self.repo.entries.get(name) if is_plain_name(name) else None
        if entry is None:
            return None
        where = f"{self.repo}: {name}"
        if entry.size > max_bytes:
            raise SourceError(f"is larger than the {max_bytes:,} bytes allowed", where=where)
        path = self.root / name
        if path.is_file() and not path.is_symlink() and path.stat().st_size == entry.size:
            kept = path.read_bytes()
            if entry.is_content(kept):
                if name not in self._counted:  # of an earlier run
                    self._counted.add(name)
                    self._spool.reserve(len(kept))
                return kept
        data = self.files.fetch_whole(name)
        if not entry.is_content(data):
            raise SourceError("has another digest than the Hub lists", where=where)
        if self._spool.reserve(len(data)):
            self._counted.add(name)
            fs.write_whole(path, data)
        return data

    def mirror(self, max_bytes: int = 4 << 20) -> None:
        """Have the files in `root` from which a model's name, license and tags are taken."""
        for name in _MIRRORED:
            self.read_bytes(name, max_bytes)

    def file(self, path: str) -> HubFile:
        """A file by its path; `HubError` that lists what there is if it is not there."""
        if path in self.repo.entries:
            return HubFile(self, path)
        raise HubError(f"has no file {path[:200]!r}", where=str(self.repo), hint=self._choices())

    def only_gguf(self) -> HubFile:
        """The one GGUF model of the repository; `UsageError` with the choice if there are more."""
        found = self.ggufs()
        if len(found) == 1:
            return HubFile(self, found[0])
        raise UsageError(
            "which file of the repository?", where=str(self.repo), hint=self._choices()
        )

    def ggufs(self) -> list[str]:
        """Paths of GGUF files; of a shard set the first."""
        paths = sorted(path for path in self.repo.entries if path.endswith(".gguf"))
        return [p for p in paths if not _is_later_shard(p)]

    def _choices(self) -> str:
        paths = [path for path in self.ggufs() if path.isprintable()]
        if not paths:
            return "it holds no GGUF files"
        listed = "\n    ".join(f"{self.repo.ref.repo}/{path}" for path in paths[:60])
        more = f"\n    and {len(paths) - 60} more" if len(paths) > 60 else ""
        return f"it has\n    {listed}{more}"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, read by range."""

    folder: HubFolder
    path: str

    def __str__(self) -> str:
        return f"{self.folder.repo.ref.repo}/{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def display(self) -> Path:
        """What stands for it where a path is shown."""
        return Path(str(self))

    def exists(self) -> bool:
        """Whether the repository lists it."""
        return self.path in self.folder.repo.entries

    @property
    def prefix(self) -> str:
        """The folder it is in, with a slash behind it; empty at the root."""
        return self.path.removesuffix(self.name)

    def with_name(self, name: str) -> HubFile:
        """A file beside it."""
        return HubFile(self.folder, self.prefix + name)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.folder.files.size(self.path)

    @property
    def etag(self) -> str:
        """Digest of its content."""
        return self.folder.files.etag(self.path)

    def read(self, begin: int, end: int, *, head: bool = False) -> bytes:
        """See `HubFiles.read`."""
        return self.folder.files.read(self.path, begin, end, head=head)

    def lay_out(self, tensors: Iterable[tuple[str, int, int]]) -> None:
        """See `HubFiles.lay_out`."""
        self.folder.files.lay_out(self.path, tensors)


def open_folder(
    ref: HubRef, caller: Caller, work: Path, spool: Spool, notes: list[str]
) -> tuple[HubFolder, Fetcher]:
    """Open a repository at the commit that `work` holds, or else at what `ref` means now.

    A remark for the user is appended to `notes` where a branch has moved since. Raises
    `SourceError` where the pinned commit is gone or lists other files than it did.
    """
    pin = _read_pin(work / PIN)
    if pin is not None and pin["revision"] != ref.revision:
        raise UsageError(
            f"the unfinished run here reads revision {pin['revision'] or 'main'}",
            where=str(ref),
            hint="continue with that one, or pass --restart",
        )
    commit = pin["commit"] if pin else commit_of(caller, ref)
    try:
        repo = open_repo(caller, ref, commit)
    except HubError as error:
        if pin is None or error.message != NO_REVISION:
            raise
        raise SourceError(
            f"the commit {commit[:8]}, with which this run began, is gone from the Hub",
            where=str(ref),
            hint="pass --restart to begin again with what is there now",
        ) from None
    if pin is None:
        fs.make_folder(work)
        _write_pin(work / PIN, repo)
    else:
        _compare(pin, repo, caller, notes)
    spool.reserve(_MAX_PIN_BYTES)  # it lies there too
    fetcher = Fetcher(repo, caller)
    folder = HubFolder(repo, work / repo.name, HubFiles(repo.entries, fetcher, spool), spool)
    return folder, fetcher


def _compare(pin: dict[str, Any], repo: Repo, caller: Caller, notes: list[str]) -> None:
    if pin["listing"] != repo.digest():
        raise SourceError(
            f"commit {repo.commit[:8]} lists other files than when this run began",
            where=str(repo.ref),
            hint="the repository was rewritten; pass --restart to begin again",
        )
    if is_commit(repo.ref.revision):
        return
    now = commit_of(caller, repo.ref)
    if now != repo.commit:
        notes.append(
            f"{repo.ref} has moved to {now[:8]} since this run began; it goes on with "
            f"{repo.commit[:8]} (--restart takes the new one)"
        )


def _read_pin(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            pin = json.loads(file.read(_MAX_PIN_BYTES))
        if is_commit(pin["commit"]) and isinstance(pin["listing"], str) and "revision" in pin:
            return dict(pin)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SourceError(
        "does not say which commit this run began with",
        where=str(path),
        hint="pass --restart to begin again",
    )


def _write_pin(path: Path, repo: Repo) -> None:
    pin = {"revision": repo.ref.revision, "commit": repo.commit, "listing": repo.digest()}
    fs.write_whole(path, json.dumps(pin).encode())


def _is_later_shard(path: str) -> bool:
    stem = path.removesuffix(".gguf")
    head, of, _ = stem.rpartition("-of-")
    return bool(of) and head[-5:].isdigit() and head[-5:] != "00001"
