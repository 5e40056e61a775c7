"""The local Hub as a whole: its repositories, its two servers and the log of its requests."""

from __future__ import annotations

import hmac
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.localhub import handler
from tests.localhub.faults import Faults
from tests.localhub.repos import Blob, Repo

_SECRET = b"signs the URLs of the CDN"


@dataclass
class Logged:
    """One request and what was answered. Bytes are those of bodies."""

    server: str  # hub or cdn
    method: str
    path: str  # with the query
    range: str | None = None
    authorization: str | None = None
    if_match: str | None = None
    status: int = 0
    n_sent: int = 0
    n_received: int = 0
    fault: str | None = None
    content: bool = False  # whether the body is a file's

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    hub: LocalHub
    kind: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what tests are about."""


class LocalHub:
    """Two servers: the Hub, and the CDN that it redirects to for LFS files.

    `users` maps tokens to names. `lifetime` is how many seconds a signed URL works, `rate` the
    most bytes of content per second and connection, `page` how many entries a listing's page has.
    """

    def __init__(
        self,
        HubHandler: type[handler.HubHandler] = handler.HubHandler,
        CdnHandler: type[handler.CdnHandler] = handler.CdnHandler,
    ) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, Blob] = {}  # by sha256
        self.users: dict[str, str] = {}
        self.faults = Faults()
        self.log: list[Logged] = []
        self.lifetime = 3600.0
        self.rate: float | None = None
        self.page = 1000
        self.lock = threading.Lock()
        self._servers = {
            "hub": _Server(("127.0.0.1", 0), HubHandler),
            "cdn": _Server(("127.0.0.1", 0), CdnHandler),
        }
        for kind, server in self._servers.items():
            server.hub, server.kind = self, kind

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return self.url_of("hub")

    @property
    def cdn(self) -> str:
        return self.url_of("cdn")

    def url_of(self, kind: str) -> str:
        return f"http://127.0.0.1:{self._servers[kind].server_port}"

    def env(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment for a client in a subprocess, with `home` as HF_HOME."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        proxies = ("http_proxy", "https_proxy", "all_proxy")
        kept = {k: v for k, v in kept.items() if k.lower() not in proxies}
        made = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return kept | made | ({"HF_TOKEN": token} if token else {})

    def add_repo(self, name: str, files: Path | Mapping[str, bytes | Path], **options: Any) -> Repo:
        """A repository with one commit of these files."""
        if isinstance(files, Path):
            files = {
                str(path.relative_to(files)): path for path in files.rglob("*") if path.is_file()
            }
        repo = Repo(name, **options)
        repo.commit(files, "first")
        self.repos[name] = repo
        return repo

    def add_user(self, name: str, token: str) -> None:
        self.users[token] = name

    def blob(self, sha256: str) -> Blob | None:
        """A blob that was uploaded or is in some commit."""
        if sha256 not in self.blobs:
            self.blobs |= {
                blob.sha256: blob
                for repo in self.repos.values()
                for commit in repo.commits
                for blob in commit.files.values()
                if blob.is_lfs
            }
        return self.blobs.get(sha256)

    def sign(self, path: str) -> str:
        """A URL at the CDN that works for `lifetime` seconds."""
        expires = f"{time.time() + self.lifetime:.3f}"
        return f"{self.cdn}{path}?Expires={expires}&Signature={self._signature(path, expires)}"

    def is_signed(self, path: str, query: Mapping[str, str]) -> bool:
        expires = query.get("Expires", "0")
        sound = hmac.compare_digest(query.get("Signature", ""), self._signature(path, expires))
        return sound and time.time() < float(expires)

    def _signature(self, path: str, expires: str) -> str:
        return "signed" + hmac.new(_SECRET, f"{path} {expires}".encode(), "sha256").hexdigest()

    def n_content_bytes(self) -> int:
        """Bytes of files that have gone out."""
        with self.lock:
            return sum(entry.n_sent for entry in self.log if entry.content)

    def __enter__(self) -> Self:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()
