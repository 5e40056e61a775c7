"""What a command has of the Hub: opened repositories, one spool, and what it all came to."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from quantkit.errors import UsageError
from quantkit.hub.client import Caller, Patience
from quantkit.hub.fetch import Fetcher
from quantkit.hub.folder import PIN, HubFile, HubFolder, open_folder
from quantkit.hub.ref import HubRef
from quantkit.hub.spool import Spool
from quantkit.run import fs
from quantkit.run.events import Reporter, size

DEFAULT_SPOOL = 30 * 10**9
FOLDER = ".hub"
Place = Path | HubFolder | HubFile


def ref_of(place: Place) -> Path | HubRef:
    """How another process opens the same content: a whole path, or a place pinned to its commit."""
    if isinstance(place, Path):
        return place.resolve()
    folder = place if isinstance(place, HubFolder) else place.folder
    path = None if isinstance(place, HubFolder) else place.path
    return HubRef(folder.repo.ref.repo, folder.repo.commit, path)


def spool_of(place: Place) -> int:
    """Most bytes on disk of what is fetched of a place; 0 for what is here."""
    if isinstance(place, Path):
        return 0
    return (place if isinstance(place, HubFolder) else place.folder).spool_limit


class HubSession:
    """A context manager; nothing happens before something on the Hub is asked for.

    `work` is where a run that can be continued keeps its spool and the commits that it reads, in
    `.hub`; without it they are in a temporary folder. `restart` forgets what is there. `revision`
    is for what `at` opens.
    """

    def __init__(
        self,
        reporter: Reporter,
        work: Path | None = None,
        *,
        spool: int = DEFAULT_SPOOL,
        restart: bool = False,
        revision: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._reporter = reporter
        self._work = work
        self._limit = spool
        self._restart = restart
        self._revision = revision
        self._patience = patience
        self._stack = ExitStack()
        self._spool: Spool | None = None
        self._folders: dict[tuple[str, str | None], tuple[HubFolder, Fetcher, Caller]] = {}
        self._since = 0.0

    def at(self, place: Path | HubRef) -> Place:
        """A local path as it is; of a place on the Hub the repository, or the file that it names.

        A repository without a config.json but with one GGUF model is that file.
        """
        if isinstance(place, HubRef):
            return self._at(place.pinned_to(self._revision))
        if self._revision is not None:
            raise UsageError("is on this machine and has no --revision", where=str(place))
        return place

    def file(self, place: Path | HubRef) -> Path | HubFile:
        """As `at`, but a GGUF file: a repository must hold exactly one model."""
        if isinstance(place, Path):
            return place
        found = self._at(place)
        return found.only_gguf() if isinstance(found, HubFolder) else found

    def _at(self, place: HubRef) -> HubFolder | HubFile:
        key = (place.repo, place.revision)
        folder = self._folders[key][0] if key in self._folders else self._open(place)
        if place.path is not None:
            return folder.file(place.path)
        if "config.json" not in folder.names() and folder.ggufs():
            return folder.only_gguf()
        folder.mirror()
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            for _, _, caller in self._folders.values():
                caller.stop.set()
            for folder, _, _ in self._folders.values():
                folder.files.close()
            if self._folders and error is None:
                self._tell()
                self._clear()

    def _open(self, ref: HubRef) -> HubFolder:
        spool = self._opened_spool()
        plain = HubRef(ref.repo, ref.revision)
        caller = Caller(ref.repo, self._patience)
        work = spool.folder / plain.repo.replace("/", "--")
        if ref.revision is not None and any(repo == ref.repo for repo, _ in self._folders):
            work = work.with_name(f"{work.name}@{len(self._folders)}")
        if self._restart:
            fs.remove(work / PIN)
        notes: list[str] = []
        folder, fetcher = open_folder(plain, caller, work, spool, notes)
        self._folders[ref.repo, ref.revision] = (folder, fetcher, caller)
        self._reporter.stage("hub", f"{ref.repo} at commit {folder.repo.commit[:12]}")
        for note in notes:
            self._reporter.warn(note)
        return folder

    def _opened_spool(self) -> Spool:
        if self._spool is None:
            self._since = time.monotonic()
            if self._work is None:
                parent = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                parent = self._work
            self._stack.enter_context(fs.claimed(parent / FOLDER))
            self._spool = Spool(parent / FOLDER, self._limit)
        return self._spool

    def _clear(self) -> None:
        """All is done: remove the spool and forget the commits."""
        for folder, *_ in self._folders.values():
            _discard(folder.root.parent)
        if self._spool is not None:
            self._spool.clear()

    def _tell(self) -> None:
        seconds = max(1e-3, time.monotonic() - self._since)
        for folder, fetcher, caller in self._folders.values():
            again = f", {caller.n_retries:,} tried again" if caller.n_retries else ""
            self._reporter.stage(
                "fetch",
                f"{size(fetcher.n_bytes)} of {folder.repo} in {fetcher.n_requests:,} requests"
                f"{again}, {size(fetcher.n_bytes / seconds)}/s",
            )


def _discard(work: Path) -> None:
    """Remove a repository's small files and its pin; all of them are ours."""
    for folder in [path for path in work.glob("*") if path.is_dir()] + [work]:
        fs.empty_folder(folder)
        fs.remove_folder(folder)
