"""Byte ranges of a pinned repository's files.

A file is resolved once: the Hub names its commit, digest and size, which must be those of the
listing, and a signed URL at a CDN, which serves ranges until it expires. The token goes to the
Hub's own origin and nowhere else. Every answer must be exactly the range that was asked for; what
arrives of one that breaks off is kept, and the rest asked for.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from quantkit.errors import HubError, SourceError
from quantkit.hub.client import Caller, Passing, Stopped, api, endpoint, retry_after
from quantkit.hub.repo import Entry, Repo

if TYPE_CHECKING:
    import httpx2

_PIECE = 1 << 18
_SLOWEST = 16 << 10  # bytes per second; a connection below is given up and opened anew
_GRACE_S = 30.0
_EXPIRED = frozenset((400, 401, 403, 404, 410))  # what CDNs say of a signed URL that is too old
_MAX_MISMATCHES = 3  # answers in a row of another content before the file counts as changed
_CHANGED = (
    "the repository was rewritten while it was read; run again with --restart to begin with what "
    "is there now"
)


@dataclass(slots=True)
class _Source:
    """Where a file's bytes come from. `etag` is the CDN's own, known after its first answer."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""
    etag: str = ""
    n_mismatches: int = 0


class Fetcher:
    """Reads ranges of one repository's files, from any thread, and counts what it fetches."""

    def __init__(self, repo: Repo, caller: Caller) -> None:
        self.n_bytes = 0
        self.n_requests = 0
        self._repo = repo
        self._caller = caller
        self._api = api()
        self._sources: dict[str, _Source] = {}
        self._lock = threading.Lock()

    def read(self, entry: Entry, begin: int, end: int) -> bytearray:
        """Bytes `begin .. end` of a file; the caller has checked them against its size.

        Raises `SourceError` where the file is not what the listing says, `HubError` where the
        Hub stays out of reach or refuses.
        """
        data = bytearray(end - begin)
        n_have = 0

        def attempt() -> tuple[bytearray, bool]:
            nonlocal n_have
            n_before = n_have
            try:
                for piece in self._stream(entry, begin + n_have, end):
                    data[n_have : n_have + len(piece)] = piece
                    n_have += len(piece)
            except (Stopped, HubError, SourceError):
                raise
            except Exception:
                if n_have - n_before < _PIECE:
                    raise
                return data, True  # much has come: go on with the rest at once
            if n_have < len(data):
                raise Passing("a body that ends early")
            return data, False

        return self._caller.resume(attempt, f"reading {entry.path}")

    def _stream(self, entry: Entry, begin: int, end: int) -> Iterator[bytes]:
        """The pieces of a range as they come; never more than the range."""
        if begin == end:
            return
        from huggingface_hub import get_session  # noqa: PLC0415

        source = self._source(entry)
        url, etag = self._resolved(entry, source)
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        if etag:
            headers["If-Match"] = etag  # If-Range would bring the whole of another file
        if _origin(url) == _origin(endpoint()):
            headers |= self._authorisation()
        deadline = time.monotonic() + _GRACE_S + (end - begin) / _SLOWEST
        with self._lock:
            self.n_requests += 1
        with get_session().stream(
            "GET", url, headers=headers, timeout=_timeout(), follow_redirects=False
        ) as response:
            self._check(response, entry, source, url, (begin, end))
            n_left = end - begin
            for piece in response.iter_raw():
                n_left -= len(piece)
                with self._lock:
                    self.n_bytes += len(piece)
                if n_left < 0:
                    raise Passing("a body longer than the range")
                if self._caller.stopped():
                    raise Stopped
                yield piece
                if n_left == 0:
                    return
                if time.monotonic() > deadline:
                    raise Passing("a connection that hardly moves")

    def _source(self, entry: Entry) -> _Source:
        with self._lock:
            return self._sources.setdefault(entry.path, _Source())

    def _resolved(self, entry: Entry, source: _Source) -> tuple[str, str]:
        """The URL to read from and its ETag; asked for once until it is forgotten."""
        with source.lock:
            if not source.url:
                source.url, source.etag = self._resolve(entry, source), ""
            return source.url, source.etag

    def _resolve(self, entry: Entry, source: _Source) -> str:
        from huggingface_hub import hf_hub_url  # noqa: PLC0415

        with self._lock:
            self.n_requests += 1
        repo = self._repo
        url = hf_hub_url(repo.ref.repo, entry.path, revision=repo.commit, endpoint=endpoint())
        found = self._api.get_hf_file_metadata(url=url, timeout=_timeout())
        if found.commit_hash != repo.commit:
            self._mismatch(entry, source, "the Hub answers with another commit than the pinned one")
        if found.etag != entry.etag or found.size != entry.size:
            self._mismatch(entry, source, "has another content on the Hub than when it was listed")
        if not _may_follow(found.location):
            raise HubError("the Hub sends to an address that is not https", where=self._at(entry))
        return str(found.location)

    def _check(
        self,
        response: httpx2.Response,
        entry: Entry,
        source: _Source,
        url: str,
        span: tuple[int, int],
    ) -> None:
        status = response.status_code
        if status in _EXPIRED or 300 <= status < 400:
            _forget(source, url)
            raise Passing(f"HTTP {status} from the file's address")
        if status in (200, 412, 416):
            _forget(source, url)
            raise Passing("an answer that is not the range asked for")
        if status != 206:
            raise Passing(f"HTTP {status}", retry_after(response.headers))
        begin, end = span
        wanted = f"bytes {begin}-{end - 1}/{entry.size}"
        if response.headers.get("content-range", "").strip() != wanted:
            self._mismatch(entry, source, "the server sends other bytes than were asked for")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Passing("an encoded body")
        length = response.headers.get("content-length")
        if length is not None and length != str(end - begin):
            raise Passing("a body of another length than the range")
        self._check_etag(response.headers.get("etag", ""), entry, source, url)
        source.n_mismatches = 0

    def _check_etag(self, etag: str, entry: Entry, source: _Source, url: str) -> None:
        """A CDN's ETag is its own affair, but must stay the same for one URL."""
        with source.lock:
            if source.url != url or not re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag):
                return  # weak or none: nothing to compare
            if not source.etag:
                source.etag = etag
            same = source.etag == etag
        if not same:
            _forget(source, url)
            self._mismatch(entry, source, "its ETag changes while it is read")

    def _mismatch(self, entry: Entry, source: _Source, message: str) -> None:
        """A passing fault the first times: caches answer from the past now and then."""
        source.n_mismatches += 1
        if source.n_mismatches >= _MAX_MISMATCHES:
            raise SourceError(message, where=self._at(entry), hint=_CHANGED)
        raise Passing(message)

    def _authorisation(self) -> dict[str, str]:
        from huggingface_hub import constants, get_token  # noqa: PLC0415

        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _at(self, entry: Entry) -> str:
        return f"{self._repo}: {entry.path}"


def _forget(source: _Source, url: str) -> None:
    with source.lock:
        if source.url == url:
            source.url = source.etag = ""


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port


def _may_follow(url: str | None) -> bool:
    """Only https leads on from https."""
    scheme = urlsplit(url or "").scheme
    return scheme == "https" or (scheme == "http" and endpoint().startswith("http://"))


def _timeout() -> float:
    from huggingface_hub import constants  # noqa: PLC0415

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
