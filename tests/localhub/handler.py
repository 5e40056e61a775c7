"""How the local Hub answers: information, trees, files; and the CDN's signed URLs."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, TypeVar
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

from tests.localhub.faults import Fault
from tests.localhub.listing import as_entry, as_sibling, tree_of
from tests.localhub.repos import Blob, Commit, Repo

F = TypeVar("F", bound=Callable[..., None])
REPO = r"(?P<name>[\w.-]+/[\w.-]+)"
_PIECE = 1 << 16


def route(method: str, pattern: str) -> Callable[[F], F]:
    """Mark a handler's method as the answer to `method` on paths that match `pattern` wholly.

    Groups see the path unquoted, except for `%2F`, which stays inside its group.
    """

    def mark(answer: F) -> F:
        answer.route = (method, re.compile(pattern))  # type: ignore[attr-defined]
        return answer

    return mark


class Refused(Exception):  # noqa: N818
    """An answer that ends the request."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """What both servers have in common: routes, faults, the log, bodies and ranges."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr; `hub.log` has it all."""

    @property
    def hub(self) -> Any:
        return self.server.hub

    def _answer(self) -> None:
        from tests.localhub.hub import Logged

        parts = urlsplit(self.path)
        self.url_path = parts.path
        self.query = dict(parse_qsl(parts.query))
        self._body: bytes | None = None
        self.logged = Logged(
            self.server.kind,
            self.command,
            self.path,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            self.headers.get("If-Match"),
        )
        self.fault = self.hub.faults.take(self.logged.line)
        self.logged.fault = self.fault
        with self.hub.lock:
            self.hub.log.append(self.logged)
        if self._fails_at_once():
            return
        try:
            self._dispatch()
        except Refused as refused:
            self.fail(refused.status, refused.code, refused.message)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _dispatch(self) -> None:
        path = unquote(self.url_path.replace("%2F", "%252F"))
        method = "GET" if self.command == "HEAD" else self.command
        for attribute in dir(type(self)):
            answer = getattr(type(self), attribute)
            wanted, pattern = getattr(answer, "route", (None, None))
            if wanted == method and (match := pattern.fullmatch(path)):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value}
                answer(self, **groups)
                if self._body is None and self.command in ("POST", "PUT"):
                    self.body()
                return
        self.body()
        raise Refused(404, "", f"no such endpoint: {self.command} {self.url_path}")

    def _fails_at_once(self) -> bool:
        if self.fault is Fault.RESET:
            self.reset()
        elif self.fault is Fault.SLOW:
            time.sleep(self.hub.faults.patience)
            self.reset()
        elif self.fault in (Fault.BUSY, Fault.BROKEN, Fault.UNAVAILABLE):
            self.body()
            headers = {}
            if self.fault is Fault.BUSY:
                headers = {"Retry-After": str(self.hub.faults.retry_after)}
            self.send_json({"error": "injected"}, int(self.fault), headers)
        else:
            return False
        return True

    def reset(self) -> None:
        """Close the connection so that the client sees a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def body(self) -> bytes:
        """The whole body of the request, with its length or chunked."""
        if self._body is None:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while n := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(n))
                    self.rfile.readline()
                    self.logged.n_received += n
                self.rfile.readline()
                self._body = b"".join(parts)
            else:
                parts, n_left = [], int(self.headers.get("Content-Length", 0))
                while n_left and (part := self.rfile.read(min(_PIECE, n_left))):
                    parts.append(part)
                    n_left -= len(part)
                    self.logged.n_received += len(part)
                self._body = b"".join(parts)
                if n_left:
                    raise ConnectionError("the client went away")
        return self._body

    def json_body(self) -> Any:
        return json.loads(self.body() or b"{}")

    def form_body(self) -> dict[str, list[str]]:
        return parse_qs(self.body().decode())

    def send_json(
        self, value: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        raw = json.dumps(value).encode()
        self._begin(
            status,
            {"Content-Type": "application/json", "Content-Length": str(len(raw))} | (headers or {}),
        )
        self._write(raw)

    def fail(self, status: int, code: str = "", message: str = "") -> None:
        """An error as the Hub words it."""
        headers = {"X-Error-Message": message} if message else {}
        if code:
            headers["X-Error-Code"] = code
        self.send_json({"error": message}, status, headers)

    def send_redirect(self, status: int, to: str, headers: dict[str, str]) -> None:
        self._begin(status, headers | {"Location": to, "Content-Length": "0"})

    def send_blob(self, blob: Blob, headers: dict[str, str], etag: str) -> None:
        """A file or the range of it that is asked for, with whatever fault is due."""
        self.logged.content = True
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if_range, if_match = self.headers.get("If-Range"), self.headers.get("If-Match")
        if self.fault is Fault.STALE_ETAG:
            etag = "0" * len(etag)
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **headers}
        if if_match not in (None, "*", f'"{etag}"'):
            self._begin(412, {"ETag": f'"{etag}"', "Content-Length": "0"})
            return
        is_range = (
            found
            and self.fault is not Fault.NO_RANGE
            and (if_range is None or if_range == f'"{etag}"')
        )
        begin, end, status = 0, blob.size, 200
        if is_range:
            begin = int(found[1])
            end = min(int(found[2]) + 1 if found[2] else blob.size, blob.size)
            if begin >= end:
                self._begin(416, {"Content-Range": f"bytes */{blob.size}", "Content-Length": "0"})
                return
            shift = 7 if self.fault is Fault.WRONG_RANGE else 0
            headers["Content-Range"] = f"bytes {begin + shift}-{end - 1 + shift}/{blob.size}"
            status = 206
        n_bytes = end - begin
        if self.fault is Fault.TOO_MUCH:
            n_bytes += 1 << 20
        if self.fault is Fault.ENDLESS:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(n_bytes)
        self._begin(status, headers)
        self._send_content(blob, begin, end)

    def _send_content(self, blob: Blob, begin: int, end: int) -> None:
        if self.command == "HEAD":
            return
        if self.fault is Fault.ENDLESS:
            self._send_endlessly()
            return
        stop = begin + (end - begin) // 2 if self.fault is Fault.SHORT else end
        for at in range(begin, stop, _PIECE):
            piece = blob.read(at, min(at + _PIECE, stop))
            self._write(piece)
            if self.hub.rate:
                time.sleep(len(piece) / self.hub.rate)
        if self.fault is Fault.SHORT:
            self.wfile.flush()
            self.close_connection = True
        if self.fault is Fault.TOO_MUCH:
            self._write(bytes(1 << 20))

    def _send_endlessly(self) -> None:
        piece = b"10000\r\n" + bytes(_PIECE) + b"\r\n"
        while True:
            self.wfile.write(piece)
            self.logged.n_sent += _PIECE

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.logged.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _write(self, data: bytes) -> None:
        if self.command != "HEAD":
            # First: a client may have the last byte, and ask, before this thread runs again.
            self.logged.n_sent += len(data)
            self.wfile.write(data)


class CdnHandler(Handler):
    """Signed URLs of blobs. What carries a token here has lost it."""

    @route("GET", r"/blobs/(?P<sha256>[0-9a-f]{64})")
    def get_blob(self, sha256: str) -> None:
        if not self.hub.is_signed(self.url_path, self.query):
            raise Refused(403, "", "the URL has expired")
        blob = self.hub.blob(sha256)
        if blob is None:
            raise Refused(404, "", "no such blob")
        self.send_blob(blob, {"Content-Type": "application/octet-stream"}, "cdn-" + sha256[:32])


class HubHandler(Handler):
    """The Hub's reading side."""

    def user(self) -> str | None:
        """Who asks; a token that nobody has is refused."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        name: str | None = self.hub.users.get(header.removeprefix("Bearer "))
        if name is None:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return name

    def repo(self, name: str, *, files: bool = False) -> Repo:
        """A repository that the asker may see, and whose `files` he may have."""
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and user not in repo.members):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if files and repo.gated and user not in repo.members:
            message = f"Access to model {name} is restricted. You must have access to it."
            raise Refused(403 if user else 401, "GatedRepo", message)
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        try:
            return repo.at(revision)
        except KeyError:
            message = f"Invalid rev id: {revision}"
            raise Refused(404, "RevisionNotFound", message) from None

    def sign(self, path: str) -> str:
        return str(self.hub.sign(path))

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        self.send_json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {}}})

    @route("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
    def model_info(self, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        commit = self.commit_of(repo, revision)
        with_blobs = self.query.get("blobs", "").lower() == "true"
        self.send_json(
            {
                "_id": "0" * 24, "id": name, "modelId": name, "author": name.partition("/")[0],
                "sha": commit.sha, "private": repo.private, "disabled": False, "downloads": 0,
                "gated": "manual" if repo.gated else False, "likes": 0, "tags": [],
                "lastModified": "2026-11-22T00:00:00.000Z",
                "createdAt": "2026-11-22T00:00:00.000Z",
                "siblings": [
                    {"rfilename": path} | (as_sibling(blob) if with_blobs else {})
                    for path, blob in sorted(commit.files.items())
                ],
            }
        )  # fmt: skip

    @route("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
    def tree(self, name: str, revision: str, folder: str = "") -> None:
        commit = self.commit_of(self.repo(name), revision)
        entries = tree_of(
            commit, folder.strip("/"), self.query.get("recursive", "").lower() == "true"
        )
        if not entries and folder:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        begin = int(self.query.get("cursor", 0))
        headers, n_page = {}, self.hub.page
        if begin + n_page < len(entries):
            more = "&".join(
                f"{key}={quote(value)}"
                for key, value in (self.query | {"cursor": str(begin + n_page)}).items()
            )
            headers["Link"] = f'<{self.hub.endpoint}{self.url_path}?{more}>; rel="next"'
        self.send_json(entries[begin : begin + n_page], 200, headers)

    @route("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, name: str, revision: str) -> None:
        commit = self.commit_of(self.repo(name), revision)
        is_form = "form" in self.headers.get("Content-Type", "")
        asked = self.form_body() if is_form else self.json_body()
        found = [p for p in asked.get("paths", []) if p in commit.files]
        self.send_json([as_entry(path, commit.files[path]) for path in found])

    @route("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name, files=True)
        commit = self.commit_of(repo, revision)
        blob = self._blob(commit, path)
        etag = "0" * len(blob.etag) if self.fault is Fault.STALE_ETAG else blob.etag
        sha = "f" * 40 if self.fault is Fault.CHANGED else commit.sha
        headers = {"X-Repo-Commit": sha, "X-Linked-Size": str(blob.size)}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"'}
            self.send_redirect(302, self.sign(f"/blobs/{blob.sha256}"), headers)
        else:
            to = f"/api/resolve-cache/models/{name}/{commit.sha}/{quote(path, safe='')}"
            self.send_redirect(307, to, headers | {"X-Linked-Etag": f'"{etag}"'})

    @route("GET", rf"/api/resolve-cache/models/{REPO}/(?P<revision>[^/]+)/(?P<path>[^/]+)")
    def resolve_cache(self, name: str, revision: str, path: str) -> None:
        commit = self.commit_of(self.repo(name, files=True), revision)
        blob = self._blob(commit, path)
        self.send_blob(blob, {"X-Repo-Commit": commit.sha}, blob.git_oid)

    @route("GET", rf"/{REPO}/raw/(?P<revision>[^/]+)/(?P<path>.+)")
    def raw(self, name: str, revision: str, path: str) -> None:
        commit = self.commit_of(self.repo(name, files=True), revision)
        blob = self._blob(commit, path)
        content = Blob(blob.pointer) if blob.is_lfs else blob
        self.send_blob(content, {"X-Repo-Commit": commit.sha}, blob.git_oid)

    def _blob(self, commit: Commit, path: str) -> Blob:
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on this revision")
        return commit.files[path]
