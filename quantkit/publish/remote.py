"""A repository on the Hub, written to through `huggingface_hub`: content first, then commits.

Content is stored by its digest before any commit names it. So what was sent before a kill is not
sent again, and a repository never shows half a model. Each commit names its parent: what somebody
else has changed meanwhile is looked at, not overwritten.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantkit.container.names import shown
from quantkit.errors import HubError, OutputError, QuantkitError, UsageError
from quantkit.publish.digests import git_oid, stamp
from quantkit.publish.layout import Item, State, Step, refuse_differing

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_SECRETS = re.compile(r"hf_\w+|(?<=\?)\S+|Bearer \S+")
_WAITS = (1.0, 3.0, 9.0)  # seconds between attempts
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_MAX_COMPARED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the Hub says of a file; `sha256` None for one that it keeps in git itself."""

    n_bytes: int
    sha256: str | None
    git_oid: str


def check_repo(name: str) -> str:
    """`owner/name`; `UsageError` for anything else."""
    if not _REPO.fullmatch(name) or ".." in name or "--" in name or name.endswith(".git"):
        raise UsageError(f"{shown(name)!r} is no repository: owner/name is meant", where="--repo")
    return name


def show_bars(shown: bool) -> None:
    """Whether the client shows how far the file in flight is, which only it knows."""
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415
        disable_progress_bars,
        enable_progress_bars,
    )

    (enable_progress_bars if shown else disable_progress_bars)()


class Remote:
    """One model repository as it is on the Hub now, and what it becomes."""

    def __init__(self, repo: str, api: HfApi | None = None) -> None:
        from huggingface_hub import HfApi  # noqa: PLC0415 - a second that publishing alone takes

        self.repo = check_repo(repo)
        self._api = api or HfApi(library_name="quantkit")
        self.head: str | None = None
        self.private: bool | None = None
        self.files: dict[str, RemoteFile] = {}

    @property
    def exists(self) -> bool:
        """Whether there is one that we may see."""
        return self.private is not None

    def require_token(self) -> None:
        """`UsageError` without one; whether it is good for anything the Hub will tell."""
        from huggingface_hub import get_token  # noqa: PLC0415

        if not (self._api.token or get_token()):
            raise UsageError(
                "publishing needs a token, and there is none",
                where=self.repo,
                hint="log in with `hf auth login`, or set HF_TOKEN to a token with write access",
            )

    def refresh(self) -> None:
        """Look at the repository; that there is none is an answer."""
        from huggingface_hub.errors import (  # noqa: PLC0415
            EntryNotFoundError,
            GatedRepoError,
            RepositoryNotFoundError,
        )
        from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415

        def look() -> None:
            info = self._api.model_info(self.repo)
            found = self._list(info.sha, RepoFile) if info.sha else {}
            self.head, self.private, self.files = info.sha, bool(info.private), found

        self.head, self.private, self.files = None, None, {}
        with _telling(self.repo):
            try:
                _patiently(look)
            except EntryNotFoundError:
                return
            except GatedRepoError:
                raise
            except RepositoryNotFoundError as error:
                if _status(error) == 401 and "credentials" in str(error.server_message).lower():
                    raise

    def _list(self, revision: str, kind: type[Any]) -> dict[str, RemoteFile]:
        entries = self._api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {
            entry.path: RemoteFile(
                entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id
            )
            for entry in entries
            if isinstance(entry, kind)
        }

    def create(self, *, private: bool) -> None:
        """Make the repository."""
        with _telling(self.repo):
            _patiently(lambda: self._api.create_repo(self.repo, private=private, exist_ok=True))
        self.refresh()

    def state(self, item: Item) -> State:
        """How a file stands to what is there."""
        there = self.files.get(item.path)
        if there is None:
            return State.NEW
        if _is(there, item):
            return State.SAME
        return State.UPDATE if item.derived else State.DIFFERS

    def steps(self, items: Sequence[Item]) -> list[Step]:
        """All of them, in order."""
        return [Step(item, self.state(item)) for item in items]

    def send(self, item: Item) -> Any:
        """Store a file's content, if the Hub does not have it; gives what `commit` takes.

        No file of the repository changes by that.
        """
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        local = isinstance(item.source, Path)
        before = stamp(item.source) if isinstance(item.source, Path) else None
        if before and before[0] != item.n_bytes:
            raise _changed(item)
        content = str(item.source) if local else item.source
        operation = CommitOperationAdd(item.path, content)
        operation.upload_info.sha256 = bytes.fromhex(item.sha256)  # spares reading it once more
        with _telling(self.repo):
            _patiently(
                lambda: self._api.preupload_lfs_files(
                    self.repo, [operation], num_threads=1, free_memory=False
                )
            )
        if isinstance(item.source, Path) and stamp(item.source) != before:
            raise _changed(item)
        return operation

    def commit(
        self,
        items: Sequence[Item],
        title: str,
        *,
        force: bool = False,
        on_sent: Callable[[Item], None] = lambda item: None,
    ) -> None:
        """One commit of these files; nothing where all of them are there already.

        `on_sent` hears of each whose content has arrived. `OutputError` where one has meanwhile
        become another, unless `force`.
        """
        for wait in (*_WAITS, None):
            todo = [step for step in self.steps(items) if step.state is not State.SAME]
            if not force:
                refuse_differing(todo, self.repo)
            if not todo:
                return
            operations = []
            for step in todo:
                operations.append(self.send(step.item))
                on_sent(step.item)
            with _telling(self.repo):
                try:
                    done = self._api.create_commit(
                        self.repo, operations, commit_message=title, parent_commit=self.head
                    )
                except Exception as error:
                    # Whether it went through is seen when the repository is looked at again.
                    overtaken = _status(error) in (409, 412)
                    if wait is None or not (overtaken or _is_passing(error)):
                        raise
                    time.sleep(0 if overtaken else wait)
                else:
                    self.head = done.oid
                    for step in todo:
                        self.files[step.item.path] = RemoteFile(
                            step.item.n_bytes, step.item.sha256, ""
                        )
                    return
            self.refresh()

    def check(self, items: Sequence[Item]) -> None:
        """Compare the digests that the Hub has with those of the local files."""
        self.refresh()
        for item in items:
            there = self.files.get(item.path)
            if there is None or not _is(there, item):
                raise OutputError(
                    "is missing" if there is None else "is not what was sent",
                    where=f"{self.repo}: {shown(item.path)}",
                    hint="publish again; if that does not help, look at the repository's history "
                    "and its .gitignore",
                )

    def fetch(self, path: str, max_bytes: int) -> Path | None:
        """A small file of the repository in the cache; None if there is none, or a larger one."""
        there = self.files.get(path)
        if there is None or there.n_bytes > max_bytes:
            return None
        with _telling(self.repo):
            return _patiently(lambda: self._download(self.repo, path, self.head))

    def fetch_other(self, repo: str, path: str, max_bytes: int) -> Path | None:
        """A small file of another repository; None where it cannot be had, for whatever reason."""
        try:
            found = self._api.get_paths_info(check_repo(repo), [path])
            if len(found) != 1 or getattr(found[0], "size", max_bytes + 1) > max_bytes:
                return None
            return self._download(repo, path, None)
        except Exception:  # that repository is not ours to complain of
            return None

    def _download(self, repo: str, path: str, revision: str | None) -> Path:
        return Path(self._api.hf_hub_download(repo, path, revision=revision))


def _is(there: RemoteFile, item: Item) -> bool:
    if there.n_bytes != item.n_bytes:
        return False
    if there.sha256 is not None:
        return there.sha256 == item.sha256
    if isinstance(item.source, bytes):
        return there.git_oid == git_oid(item.source)
    small = item.n_bytes <= _MAX_COMPARED_BYTES
    return small and there.git_oid == git_oid(item.source.read_bytes())


def _changed(item: Item) -> OutputError:
    return OutputError("changed since it was read", where=str(item.source), hint="publish again")


def _patiently(call: Callable[[], T]) -> T:
    """Try again what fails for a passing reason; only for what may be done twice."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            if not _is_passing(error):
                raise
        time.sleep(wait)
    return call()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those behind it: uploads wrap what went wrong."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _status(error: BaseException) -> int | None:
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_passing(error: BaseException) -> bool:
    from huggingface_hub import utils  # noqa: PLC0415

    status = _status(error)
    if status is not None:
        return status in _PASSING
    transport = utils.httpx.TransportError  # type: ignore[attr-defined]
    passing = (ConnectionError, TimeoutError, transport)
    return any(isinstance(cause, passing) for cause in _causes(error))


@contextmanager
def _telling(repo: str) -> Iterator[None]:
    """Turn the client's errors into one sentence, without URLs, which may be signed, or tokens."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:
        raise _told(error, repo) from None


_REASONS = {
    401: ("the Hub does not accept the token", "log in with `hf auth login`, or mend HF_TOKEN"),
    403: (
        "the token may not write here",
        "use one with write access to this owner's repositories, and look at the storage quota",
    ),
    404: ("no such repository, or not for this token", "look at the owner's name and the token"),
    413: ("the Hub takes no file of this size", "convert again with a smaller --max-shard-size"),
    429: ("the Hub asks to slow down", "run the same command again in a while: it goes on there"),
}


def _told(error: Exception, repo: str) -> HubError:
    status = _status(error)
    said = next(
        (words for cause in _causes(error) if (words := getattr(cause, "server_message", None))), ""
    )
    again = "run the same command again: what has arrived is not sent twice"
    if status is None:
        kind = next((c for c in _causes(error) if not isinstance(c, RuntimeError)), error)
        if _is_passing(error):
            return HubError(f"the Hub cannot be reached: {_clean(kind)}", where=repo, hint=again)
        return HubError(f"the upload failed: {_clean(kind)}", where=repo, hint=again)
    reason, hint = _REASONS.get(status, (f"the Hub answers {status}", again))
    words = _SECRETS.sub("…", shown(str(said)))
    return HubError(f"{reason}{f' ({words})' if words else ''}", where=repo, hint=hint)


def _clean(error: BaseException) -> str:
    words = _SECRETS.sub("…", shown(" ".join(str(error).split())))
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
