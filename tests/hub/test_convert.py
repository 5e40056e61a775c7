"""Converting what is on the Hub: the same bytes as from disk, whatever the network does."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.errors import HubError, SourceError, UsageError
from tests.hub.conftest import (
    CANARY,
    FIXTURE,
    MODEL,
    Client,
    Peak,
    assert_same_ggufs,
    break_off,
    convert_here,
    size_of,
)
from tests.localhub import Blob, Fault, LocalHub
from tests.localhub.faults import PASSING

NEEDED = size_of(FIXTURE)  # the model uses all of it


def ranges(hub: LocalHub) -> Counter[tuple[str, str]]:
    """How often each range of each blob went out whole."""
    return Counter(
        (entry.path.partition("?")[0], entry.range)
        for entry in hub.log
        if entry.server == "cdn" and entry.status == 206 and entry.fault is None
    )


@pytest.mark.parametrize(
    ("spool", "every", "n_threads"),
    [
        (30_000_000_000, 0, 1),
        (8_000_000, 15, 2),
        (2_500_000, 19, 1),  # less than a layer: two threads might drift apart and read twice
        pytest.param(800_000, 0, 2, marks=pytest.mark.slow),
    ],
)
def test_the_files_are_those_of_a_local_conversion(
    hub: LocalHub,
    tmp_path: Path,
    converted: Path,
    watch: Callable[[Path], Peak],
    spool: int,
    every: int,
    n_threads: int,
) -> None:
    hub.add_repo(MODEL, FIXTURE)
    hub.faults.set(PASSING, every)
    peak = watch(tmp_path / ".hub")
    told = convert_here(tmp_path, spool=spool, n_threads=n_threads)
    assert_same_ggufs(tmp_path, converted)
    assert 0 < peak.n_bytes <= spool
    if spool > 1e6:  # a fifth of a layer cannot hold what is read twice
        assert hub.n_content_bytes() <= 1.05 * NEEDED
    assert not (tmp_path / ".hub").exists()
    if every:
        assert len(hub.faults.given) >= 0.05 * len(hub.log)
        assert {fault for fault, _ in hub.faults.given} == set(PASSING)
        assert "tried again" in told


def test_a_run_killed_while_it_fetches_goes_on_without_fetching_twice(
    client: Client, converted: Path
) -> None:
    hub, out = client.hub, client.folder / "out"
    hub.add_repo(MODEL, FIXTURE)
    hub.rate = 5e5  # of each connection: ten seconds to spare for the kill
    process = client.start("convert", MODEL, "-r", "q4_x", "-o", out, "--spool", "16MB")
    while hub.n_content_bytes() < 9e6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.rate = None
    break_off(hub, out, 9, spool=16_000_000)
    convert_here(out, spool=16_000_000)
    assert_same_ggufs(out, converted)
    # Four connections, pieces of a megabyte: so much may have been in flight, each time.
    assert hub.n_content_bytes() <= NEEDED + 2 * 4 * 1e6
    # The connection that failed may have begun another piece before the run stopped.
    assert sum(n - 1 for n in ranges(hub).values()) <= 2 * 4 + 1
    assert not (out / ".hub").exists()


def test_a_run_goes_on_with_its_commit_when_the_branch_has_moved(
    hub: LocalHub, tmp_path: Path, converted: Path
) -> None:
    repo = hub.add_repo(MODEL, FIXTURE)
    first = repo.head.sha
    break_off(hub, tmp_path)
    config = json.loads((FIXTURE / "config.json").read_text())
    config["text_config"]["rope_theta"] = 1234.0
    repo.commit({"config.json": json.dumps(config).encode()})
    told = convert_here(tmp_path)
    assert f"has moved to {repo.head.sha[:8]}" in told
    assert f"goes on with {first[:8]}" in told
    assert_same_ggufs(tmp_path, converted)


def test_restart_takes_what_the_branch_is_now(hub: LocalHub, tmp_path: Path) -> None:
    repo = hub.add_repo(MODEL, FIXTURE)
    break_off(hub, tmp_path)
    repo.commit({"chat_template.jinja": b"another"})
    told = convert_here(tmp_path, restart=True)
    assert f"at commit {repo.head.sha[:12]}" in told
    assert "moved" not in told


def test_another_revision_than_the_unfinished_run_reads_is_refused(
    hub: LocalHub, tmp_path: Path
) -> None:
    repo = hub.add_repo(MODEL, FIXTURE)
    repo.refs["v1"] = repo.head.sha
    break_off(hub, tmp_path)
    with pytest.raises(UsageError, match="the unfinished run here reads revision main"):
        convert_here(tmp_path, revision="v1")


def test_a_commit_that_is_gone_stops_the_run(hub: LocalHub, tmp_path: Path) -> None:
    repo = hub.add_repo(MODEL, FIXTURE)
    break_off(hub, tmp_path)
    repo.commit({"README.md": b"# Another"})
    del repo.commits[0]
    with pytest.raises(SourceError, match="with which this run began, is gone"):
        convert_here(tmp_path)


def test_a_commit_that_lists_other_files_than_before_stops_the_run(
    hub: LocalHub, tmp_path: Path
) -> None:
    repo = hub.add_repo(MODEL, FIXTURE)
    break_off(hub, tmp_path)
    repo.head.files["README.md"] = Blob(b"# Another")
    with pytest.raises(SourceError, match="lists other files than when this run began"):
        convert_here(tmp_path)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault.STALE_ETAG, "has another content on the Hub than when it was listed"),
        (Fault.CHANGED, "answers with another commit than the pinned one"),
    ],
)
def test_a_file_that_changes_under_its_commit_stops_the_run(
    hub: LocalHub, tmp_path: Path, fault: Fault, says: str
) -> None:
    hub.add_repo(MODEL, FIXTURE)
    hub.faults.set(always=fault, where="HEAD .*00005-of")
    with pytest.raises(SourceError, match=says) as caught:
        convert_here(tmp_path)
    assert "model-00005-of-000007.safetensors" in str(caught.value)
    assert "--restart" in str(caught.value)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_file_is_asked_for_once_while_its_address_works(
    hub: LocalHub, tmp_path: Path, converted: Path
) -> None:
    hub.add_repo(MODEL, FIXTURE)
    convert_here(tmp_path / "a", spool=8_000_000)
    n_heads = sum(entry.method == "HEAD" and "-of-" in entry.path for entry in hub.log)
    assert n_heads == 7, "one for each shard"
    hub.lifetime, hub.rate = 0.2, 30e6
    convert_here(tmp_path / "b", spool=8_000_000)
    assert_same_ggufs(tmp_path / "b", converted)
    assert any(entry.status == 403 for entry in hub.log), "an address had expired"


def test_a_gated_repository_says_what_to_do_and_a_token_opens_it(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(MODEL, FIXTURE, gated=True, members={"me"})
    hub.add_user("me", CANARY)
    hub.add_user("you", "hf_other")
    for token in ("", "hf_other"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match="is gated") as caught:
            convert_here(tmp_path)
        assert f"{hub.endpoint}/{MODEL}" in caught.value.hint
        assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(HubError, match="does not know the token"):
        convert_here(tmp_path)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    convert_here(tmp_path)
    assert {entry.authorization for entry in hub.log if entry.server == "cdn"} == {None}


@pytest.mark.slow
def test_neither_token_nor_signed_address_is_left_anywhere(client: Client) -> None:
    hub, out = client.hub, client.folder / "out"
    repo = hub.add_repo(MODEL, FIXTURE, gated=True, members={"me"})
    hub.add_user("me", CANARY)
    client.token = CANARY
    convert = ("convert", MODEL, "-r", "q4_x", "-o", out)
    hub.rate = 5e6
    process = client.start(*convert)
    while hub.n_content_bytes() < 4e6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    client.said += process.communicate()
    hub.rate = None
    hub.faults.set(always=Fault.WRONG_RANGE, where="GET /blobs")
    client.run(*convert, "--json", expect=3)
    hub.faults.set()
    repo.members.clear()
    assert "is gated" in client.run("plan", f"hf://{MODEL}", "-r", "q4_x", expect=8)
    repo.members.add("me")
    client.run(*convert)
    texts = [text.encode() for text in client.said]
    texts += [path.read_bytes() for path in client.folder.rglob("*") if path.is_file()]
    assert len(texts) > 8
    for text in texts:
        assert CANARY.encode() not in text
        assert b"Signature=" not in text


def test_a_signal_ends_a_run_that_waits_for_the_network(client: Client) -> None:
    hub, out = client.hub, client.folder / "out"
    hub.add_repo(MODEL, FIXTURE)
    hub.faults.retry_after = 500
    hub.faults.set(always=Fault.BUSY, where="GET /blobs.*")
    process = client.start("convert", MODEL, "-r", "q4_x", "-o", out)
    while not hub.faults.given:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert time.monotonic() - begin < 10
