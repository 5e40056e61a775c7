"""Sending files through every failure that one request can have, exactly once each."""

from __future__ import annotations

import hashlib

import pytest

from quantkit.errors import HubError, OutputError, UsageError
from quantkit.publish import remote as remote_module
from quantkit.publish.layout import Item, State
from quantkit.publish.remote import Remote, check_repo
from tests.localhub import Fault
from tests.publish.conftest import REPO, TOKEN

# The client's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = b"---\nlicense: mit\n---\n# A card\n"


def item(path: str, data: bytes, batch: str = "files", *, derived: bool = False) -> Item:
    return Item(path, data, len(data), hashlib.sha256(data).hexdigest(), batch, derived)


ITEMS = [item("a/one.gguf", b"1" * 3000), item("two.gguf", b"2" * 1000), item("README.md", CARD)]


@pytest.fixture
def remote(api, monkeypatch) -> Remote:
    """One whose attempts follow each other at once."""
    monkeypatch.setattr(remote_module, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return Remote(REPO, api)


def publish(remote: Remote, items=ITEMS, **options) -> None:
    remote.refresh()
    if not remote.exists:
        remote.create(private=True)
    remote.commit(items, "Add files", **options)
    remote.check(items)


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.RESET, Fault.BUSY])
@pytest.mark.parametrize(
    "where",
    [
        "GET /api/models/me/Tiny-GGUF$", "GET .*/tree/", "POST /api/repos/create",
        "POST .*/preupload/", "POST .*/objects/batch", "PUT /store/", "POST .*/objects/verify",
        "POST /api/validate-yaml", "POST .*/commit/",
    ],
)  # fmt: skip
def test_each_request_may_fail_once(remote, hub, where, fault):
    hub.faults.set((fault,), where=where, limit=1)
    publish(remote)
    assert len(hub.faults.given) == 1
    repo = hub.repos[REPO]
    assert [commit.title for commit in repo.commits] == ["initial", "Add files"]
    assert {path: repo.head.files[path].read() for path in ("a/one.gguf", "two.gguf")} == {
        "a/one.gguf": b"1" * 3000,
        "two.gguf": b"2" * 1000,
    }


def test_a_commit_whose_answer_is_lost_is_not_made_twice(remote, hub):
    hub.loses_answer = True
    publish(remote)
    assert len(hub.repos[REPO].commits) == 2


def test_a_hub_that_stays_away_is_one_clear_error(remote, hub):
    hub.faults.set(always=Fault.RESET)
    with pytest.raises(HubError, match="cannot be reached") as told:
        publish(remote)
    assert TOKEN not in str(told.value)
    assert told.value.exit_code == 8


def test_a_hub_that_refuses_is_asked_no_more(remote, hub):
    remote.refresh()
    remote.create(private=True)
    hub.read_only.add("me")
    n_before = len(hub.log)
    with pytest.raises(HubError, match="may not write here"):
        remote.commit(ITEMS, "Add files")
    assert len(hub.log) == n_before + 1


def test_a_file_that_somebody_adds_while_we_send_is_not_overwritten(remote, hub, monkeypatch):
    real = Remote.send

    def racing(self, sent):
        operation = real(self, sent)
        if len(hub.repos[REPO].commits) == 1:
            hub.repos[REPO].commit({"two.gguf": b"theirs"})
        return operation

    monkeypatch.setattr(Remote, "send", racing)
    with pytest.raises(OutputError, match=r"other content under the same name: two\.gguf"):
        publish(remote)
    assert hub.repos[REPO].head.files["two.gguf"].read() == b"theirs"


def test_an_unrelated_commit_meanwhile_is_built_upon(remote, hub, monkeypatch):
    real = Remote.send

    def racing(self, sent):
        operation = real(self, sent)
        if len(hub.repos[REPO].commits) == 1:
            hub.repos[REPO].commit({"notes.txt": b"theirs"})
        return operation

    monkeypatch.setattr(Remote, "send", racing)
    publish(remote)
    assert {"notes.txt", "two.gguf"} <= set(hub.repos[REPO].head.files)


def test_what_the_hub_keeps_is_compared_afterwards(remote, hub):
    publish(remote)
    hub.repos[REPO].commit({"two.gguf": b"x" * 1000})
    with pytest.raises(OutputError, match="is not what was sent"):
        remote.check(ITEMS)
    hub.repos[REPO].commit({"two.gguf": None})
    with pytest.raises(OutputError, match="is missing"):
        remote.check(ITEMS)


def test_how_files_stand_to_what_is_there(remote, hub):
    publish(remote)
    states = {
        State.SAME: ITEMS[0],
        State.NEW: item("new.gguf", b"n"),
        State.DIFFERS: item("two.gguf", b"other"),
        State.UPDATE: item("README.md", CARD + b"more\n", derived=True),
    }
    for state, one in states.items():
        assert remote.state(one) is state


def test_a_file_that_changes_after_it_was_read_is_not_sent(remote, hub, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"before")
    one = Item("x.gguf", path, 6, hashlib.sha256(b"before").hexdigest(), "files")
    path.write_bytes(b"after it")
    remote.refresh()
    remote.create(private=True)
    with pytest.raises(OutputError, match="changed since it was read"):
        remote.commit([one], "Add files")


def test_errors_hold_neither_token_nor_signature(remote, hub, monkeypatch):
    """Whatever the client says: of a URL only what is before its query."""
    url = f"https://cdn.example/x?X-Amz-Signature=SECRET Bearer {TOKEN} {TOKEN}"

    def refuse(*arguments, **options):
        raise RuntimeError("Error while uploading") from ValueError(url)

    remote.refresh()
    remote.create(private=True)
    monkeypatch.setattr(remote._api, "preupload_lfs_files", refuse)
    with pytest.raises(HubError) as told:
        remote.commit(ITEMS, "Add files")
    assert "SECRET" not in str(told.value)
    assert TOKEN not in str(told.value)
    assert told.value.__cause__ is None
    assert told.value.__suppress_context__


@pytest.mark.parametrize("name", ["me", "me/", "/x", "a/b/c", "me/..", "me/a b", "me/x.git", "é/x"])
def test_what_is_no_repository_is_refused(name):
    with pytest.raises(UsageError, match="owner/name is meant"):
        check_repo(name)
