"""What a hostile or broken Hub can make a client hold: answers, pages, and room on the disk."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import HubError, OutputError
from quantkit.hub import bounded
from quantkit.hub.client import Caller, Patience
from quantkit.hub.ref import HubRef
from quantkit.hub.repo import commit_of, open_repo
from quantkit.hub.room import require_room
from quantkit.hub.session import HubSession
from quantkit.run.events import Silent
from tests.hub.conftest import FIXTURE, MODEL, convert_here
from tests.localhub import LocalHub, route
from tests.localhub.handler import REPO, HubHandler

REF = HubRef("me/model")
Answer = Callable[[HubHandler], None]


def json_of(handler: HubHandler, body: bytes, **headers: str) -> None:
    handler._begin(200, {"Content-Length": str(len(body)), **headers})
    handler._write(body)


def endless(handler: HubHandler) -> None:
    handler._begin(200, {"Transfer-Encoding": "chunked"})
    handler._send_endlessly()


def a_long_list(handler: HubHandler) -> None:
    json_of(handler, b"[" + b"{}," * (3 << 20) + b"{}]")


def packed(handler: HubHandler) -> None:
    body = gzip.compress(b"[" + b" " * (64 << 20) + b"]")
    json_of(handler, body, **{"Content-Encoding": "gzip"})


def pages_without_end(handler: HubHandler) -> None:
    again = f'<{handler.hub.endpoint}{handler.url_path}?more=1>; rel="next"'
    json_of(handler, b"[]", Link=again)


def dripping(handler: HubHandler) -> None:
    handler._begin(200, {"Transfer-Encoding": "chunked"})
    for _ in range(500):
        handler.wfile.write(b"1\r\n \r\n")
        time.sleep(0.01)


def silent(handler: HubHandler) -> None:
    handler._begin(200, {"Content-Length": "100"})
    time.sleep(5)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], LocalHub]]:
    """answering(f): a Hub on which f answers what is asked of a repository."""
    hubs: list[LocalHub] = []

    def start(answer: Answer) -> LocalHub:
        class Hostile(HubHandler):
            @route("GET", rf"/api/models/{REPO}/tree/.+")
            def tree(self, name: str, **rest: Any) -> None:
                answer(self)

            @route("GET", rf"/api/models/{REPO}")
            def model_info(self, name: str) -> None:
                answer(self)

        hub = LocalHub(HubHandler=Hostile)
        hubs.append(hub)
        hub.__enter__()
        hub.add_repo("me/model", {"config.json": b"{}"})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        return hub

    yield start
    for hub in hubs:
        hub.__exit__(None, None, None)


def listed(hub: LocalHub, name: str = "me/model") -> Any:
    caller = Caller(name, Patience(tries=1))
    return open_repo(caller, HubRef(name), hub.repos[name].head.sha)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (endless, "answers with more than 8.4 MB"),
        (a_long_list, "answers with more than 8.4 MB"),
        (packed, "in an encoding that was not asked for"),
        (pages_without_end, "pages without end"),
    ],
)
def test_an_answer_that_would_fill_memory_or_never_end_is_refused(
    answering: Callable[[Answer], LocalHub],
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    said: str,
) -> None:
    monkeypatch.setattr("quantkit.hub.repo._MAX_PAGES", 20)
    hub = answering(answer)
    with pytest.raises(HubError, match=said):
        listed(hub)
    # What the sockets hold comes on top.
    assert sum(entry.n_sent for entry in hub.log) < 4 * bounded.MAX_ANSWER_BYTES
    assert len(hub.log) < 25


@pytest.mark.parametrize("answer", [dripping, silent])
def test_an_answer_that_hardly_comes_is_given_up(
    answering: Callable[[Answer], LocalHub], monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(bounded, "_GRACE_S", 0.1)
    monkeypatch.setattr(bounded, "_SILENCE_S", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
    answering(answer)
    begun = time.monotonic()
    with pytest.raises(HubError, match="no answer in time"):
        commit_of(Caller("me/model", Patience(tries=1)), REF)
    assert time.monotonic() - begun < 4


def test_a_repository_of_ten_thousand_files_is_listed(hub: LocalHub) -> None:
    files = {f"Q4_K_M/part-{n:05d}-{'x' * 60}.gguf": b"x" for n in range(10_000)}
    repo = hub.add_repo("me/model", files)
    assert commit_of(Caller("me/model"), REF) == repo.head.sha
    assert listed(hub).entries.keys() == files.keys()


def test_files_are_fetched_whatever_their_size(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "MAX_ANSWER_BYTES", 20_000)
    hub.add_repo("me/model", {"config.json": json.dumps({"a": "x" * 200_000}).encode()})
    with HubSession(Silent(), tmp_path) as session:
        folder = session.at(REF)
        assert len(folder.read_bytes("config.json", 1 << 20)) > 200_000


def test_output_and_spool_have_to_fit_together(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(MODEL, FIXTURE)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr("quantkit.hub.room.shutil.disk_usage", lambda folder: usage)
    with HubSession(Silent(), tmp_path, spool=400_000_000) as session:
        place = session.at(HubRef(MODEL))
        require_room(place, tmp_path, 600_000_000, 300_000_000)  # no more than there is to read
        require_room(tmp_path, tmp_path, 10**12, 10**12)
        with pytest.raises(OutputError, match=r"700\.0 MB of output and 400\.0 MB of spool, 1\.10"):
            require_room(place, tmp_path, 700_000_000, 500_000_000)


def test_a_conversion_that_the_disk_cannot_hold_is_refused_before_it_fetches_weights(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(MODEL, FIXTURE)
    usage = shutil.disk_usage(tmp_path)._replace(free=40_000_000)
    monkeypatch.setattr("quantkit.hub.room.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match=r"of output and .* of spool, .* together, are needed"):
        convert_here(tmp_path, spool=30_000_000)
    assert hub.n_content_bytes() < 5_000_000
    assert not list(tmp_path.glob("*.partial"))
    convert_here(tmp_path, spool=4_000_000)
