"""Servers that are broken or hostile: one clear error, no byte believed, no secret told."""

from __future__ import annotations

import http.server
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import HubError, QuantkitError, SourceError
from quantkit.hub.client import Caller, Passing, Patience, retry_after
from quantkit.hub.fetch import Fetcher
from quantkit.hub.ref import HubRef
from quantkit.hub.repo import Repo, commit_of, open_repo
from tests.hub.conftest import CANARY, QUICK
from tests.localhub import Blob, Fault, HubHandler, LocalHub, route
from tests.localhub.faults import PASSING

CONTENT = bytes(range(251)) * 4000
FILES = {"w.safetensors": CONTENT, "config.json": b"{}"}


def opened(hub: LocalHub, patience: Patience = QUICK) -> tuple[Repo, Fetcher]:
    ref, caller = HubRef("me/it"), Caller("me/it", patience)
    repo = open_repo(caller, ref, commit_of(caller, ref))
    return repo, Fetcher(repo, caller)


def read(hub: LocalHub, begin: int = 1000, end: int = 900_000) -> bytes:
    repo, fetcher = opened(hub)
    return bytes(fetcher.read(repo.entries["w.safetensors"], begin, end))


@pytest.mark.parametrize("fault", [*PASSING, Fault.WRONG_RANGE, Fault.NO_RANGE, Fault.TOO_MUCH])
def test_a_fault_that_passes_is_survived(hub: LocalHub, fault: Fault) -> None:
    hub.add_repo("me/it", FILES)
    hub.faults.set([fault], every=2, where="w.safetensors|/blobs", limit=4)
    assert read(hub) == CONTENT[1000:900_000]
    assert hub.faults.given


def test_a_body_that_breaks_off_is_taken_up_where_it_ended(hub: LocalHub) -> None:
    hub.add_repo("me/it", FILES)
    hub.faults.set([Fault.SHORT], every=1, where="/blobs", limit=3)
    assert read(hub, 0, 800_000) == CONTENT[:800_000]
    begins = [int(e.range[6:].split("-")[0]) for e in hub.log if e.server == "cdn" and e.range]
    assert begins == [0, 400_000, 600_000, 700_000]
    assert hub.n_content_bytes() == 800_000


@pytest.mark.parametrize(
    ("fault", "where", "says", "kind"),
    [
        (Fault.RESET, "/blobs", "the connection broke off|no connection", HubError),
        (Fault.BROKEN, "/blobs", "HTTP 500", HubError),
        (Fault.BUSY, "/api/models", "asking for the revision failed .*HTTP 429", HubError),
        (Fault.SHORT, "/blobs", "broke off|ends early", HubError),
        (Fault.WRONG_RANGE, "/blobs", "other bytes than were asked for", SourceError),
        (Fault.NO_RANGE, "/blobs", "not the range asked for", HubError),
        (Fault.ENDLESS, "/blobs", "longer than the range", HubError),
        (Fault.TOO_MUCH, "/blobs", "another length than the range", HubError),
        (Fault.CHANGED, "/resolve/", "another commit than the pinned one", SourceError),
        (Fault.STALE_ETAG, "/resolve/", "another content on the Hub", SourceError),
    ],
)
def test_a_fault_that_stays_is_one_clear_error(
    hub: LocalHub, fault: Fault, where: str, says: str, kind: type[QuantkitError]
) -> None:
    hub.add_repo("me/it", FILES)
    hub.faults.set(always=fault, where=where)
    with pytest.raises(kind, match=says) as caught:
        read(hub)
    text = "".join(traceback.format_exception(caught.value))
    assert "Signature" not in text
    assert caught.value.hint


def test_a_server_that_says_nothing_is_given_up(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.add_repo("me/it", FILES)
    hub.faults.patience = 0.5
    hub.faults.set([Fault.SLOW], every=1, where="GET /blobs", limit=2)
    assert read(hub, 0, 9) == CONTENT[:9]
    hub.faults.set(always=Fault.SLOW, where="GET /blobs")
    repo, fetcher = opened(hub, Patience(tries=2, pause=0.01))
    with pytest.raises(HubError, match="no answer in time"):
        fetcher.read(repo.entries["w.safetensors"], 0, 9)


def test_the_server_is_not_asked_before_the_time_it_names(hub: LocalHub) -> None:
    hub.add_repo("me/it", FILES)
    hub.faults.retry_after = 1
    hub.faults.set([Fault.BUSY], every=1, where="GET /blobs", limit=1)
    begin = time.monotonic()
    assert read(hub, 0, 9) == CONTENT[:9]
    assert time.monotonic() - begin >= 1
    hub.faults.retry_after = 3600
    hub.faults.set(always=Fault.BUSY, where="GET /blobs")
    with pytest.raises(HubError, match="asks to wait 3,600 seconds"):
        read(hub)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "9" * 40}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({}, None),
    ],
)
def test_waiting_times_are_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_a_redirect_to_another_host_does_not_get_the_token(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.add_user("me", CANARY)
    hub.add_repo("me/it", FILES, private=True, members={"me"})
    assert read(hub, 0, 9) == CONTENT[:9]
    repo, fetcher = opened(hub)
    assert fetcher.read(repo.entries["config.json"], 0, 2) == b"{}"
    asked = {(entry.server, entry.authorization) for entry in hub.log}
    assert asked == {("hub", f"Bearer {CANARY}"), ("cdn", None)}


@contextmanager
def stranger(status: int, headers: dict[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """Another server, which answers everything alike and remembers what it was asked with."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_a_file_address_that_leads_on_is_not_followed(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.add_user("me", CANARY)
    hub.add_repo("me/it", FILES)
    with stranger(200, {}) as (address, seen):
        with stranger(302, {"Location": address}) as (first, asked):
            hub.sign = lambda path: first + path  # type: ignore[method-assign]
            with pytest.raises(HubError, match="HTTP 302 from the file's address"):
                read(hub)
        assert asked
        assert all("Authorization" not in headers for headers in asked)
        assert not seen


class Liar(HubHandler):
    """A Hub whose listing is what a test sets."""

    entries: list[dict[str, Any]]

    @route("GET", r"/api/models/me/it/tree/[0-9a-f]{40}")
    def a_lie(self) -> None:
        self.send_json(self.entries)


FILE = {"type": "file", "oid": "0" * 40, "size": 5, "path": "config.json"}
LFS = {"oid": "0" * 64, "size": 5, "pointerSize": 1}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([FILE | {"size": -1}], "impossible size"),
        ([FILE | {"size": 1 << 60}], "impossible size"),
        ([FILE | {"size": 1.5}], "impossible size"),
        ([FILE | {"size": "5"}], "impossible size"),
        ([FILE | {"lfs": LFS | {"size": 6}}], "impossible size"),
        ([FILE | {"oid": "../../x"}], "no sound digest"),
        ([FILE | {"lfs": LFS | {"oid": None}}], "no sound digest"),
        ([FILE, FILE], "lists a file twice"),
        ([FILE | {"path": None}], "without a name"),
        ([{"type": "file"}], "makes no sense"),
        ({"error": 1}, "makes no sense"),
    ],
)
def test_a_listing_that_cannot_be_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, entries: Any, says: str
) -> None:
    class Told(Liar):
        pass

    Told.entries = entries
    with LocalHub(HubHandler=Told) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add_repo("me/it", FILES)
        with pytest.raises(QuantkitError, match=says):
            opened(hub, Patience(tries=2, pause=0.01))


def test_an_unknown_repository_revision_and_token_are_told_apart(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("me/it", FILES)
    for ref, says in (
        (HubRef("me/nothing"), "neither a folder here nor a repository"),
        (HubRef("me/it", "v9"), "no such revision"),
        (HubRef("me/it..x"), "no name that the Hub allows"),
    ):
        with pytest.raises(QuantkitError, match=says):
            commit_of(Caller(ref.repo, QUICK), ref)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(HubError, match="does not know the token"):
        commit_of(Caller("me/it", QUICK), HubRef("me/it"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        commit_of(Caller("me/it", QUICK), HubRef("me/it"))


def test_no_server_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="no connection"):
        commit_of(Caller("me/it", Patience(tries=2, pause=0.01)), HubRef("me/it"))


def test_progress_starts_the_count_of_failures_anew() -> None:
    results = iter([Passing("a"), (None, True), Passing("b"), ("done", False)])

    def work() -> Any:
        result = next(results)
        if isinstance(result, Passing):
            raise result
        return result

    assert Caller("me/it", Patience(tries=2, pause=0.0)).resume(work, "reading") == "done"


def test_an_entry_knows_its_content(hub: LocalHub) -> None:
    hub.add_repo("me/it", FILES)
    repo, _ = opened(hub)
    for path, content in FILES.items():
        assert repo.entries[path].is_content(content)
        assert not repo.entries[path].is_content(content + b"x")
        assert repo.entries[path].etag == Blob.of(path, content).etag


def test_a_small_file_with_another_content_than_listed_is_refused(
    hub: LocalHub, tmp_path: Path
) -> None:
    from quantkit.hub.session import HubSession
    from quantkit.run.events import Silent

    repo = hub.add_repo("me/it", FILES)
    with HubSession(Silent(), tmp_path, patience=QUICK) as session:
        folder: Any = session.at(HubRef("me/it"))
        assert folder.read_bytes("config.json", 9) == b"{}"
        with pytest.raises(SourceError, match="larger than the 1 bytes"):
            folder.read_bytes("config.json", 1)
        assert folder.read_bytes("nothing", 9) is None
        assert folder.read_bytes("../pin.json", 9) is None
        (folder.root / "config.json").write_bytes(b"[]")  # damaged on disk: fetched again
        assert folder.read_bytes("config.json", 9) == b"{}"
        (folder.root / "config.json").unlink()

    class Other(HubHandler):
        @route("GET", "/api/resolve-cache/.*")
        def resolve_cache(self) -> None:
            self.send_blob(Blob(b"[]"), {}, "x" * 40)

    with LocalHub(HubHandler=Other) as liar, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", liar.endpoint)
        liar.repos["me/it"] = repo
        with (
            HubSession(Silent(), tmp_path / "b", patience=QUICK) as session,
            pytest.raises(QuantkitError, match=r"another digest|another commit|another content"),
        ):
            session.at(HubRef("me/it"))
