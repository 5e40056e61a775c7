"""`quantkit publish` and `convert --publish` as programs: killed, continued, read along."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.localhub import Fault
from tests.publish.conftest import BASE, FIXTURE, REPO, TOKEN

TIMEOUT_S = 240


@pytest.fixture
def command(hub, tmp_path):
    """command(*words) -> Popen of quantkit with a token for the Hub on this machine."""

    def start(*words):
        env = hub.env(tmp_path / "home", TOKEN) | {"OMP_NUM_THREADS": "1"}
        argv = [sys.executable, "-m", "quantkit", *map(str, words)]
        return subprocess.Popen(
            argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


@pytest.fixture
def run(command):
    """run(*words, code=0) -> what it printed, both streams together."""

    def run(*words, code=0):
        process = command(*words)
        said, complained = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == code, complained
        return said + complained

    return run


def publish(out, *words):
    return ("publish", out, "--repo", REPO, "--base-model", BASE, "-t", "1", *words)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_sending_it_goes_on_with_the_file_that_was_in_flight(
    command, run, hub, out, number
):
    hub.part_bytes = 1 << 30
    hub.hold_at = 4
    process = command(*publish(out))
    assert hub.held.wait(TIMEOUT_S)
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT_S)
    hub.go_on.set()
    assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM)
    run(*publish(out))
    files = hub.repos[REPO].head.files
    sizes = {blob.sha256: blob.size for blob in files.values() if blob.is_lfs}
    twice = [sha for sha, size in sizes.items() if hub.received[sha] > size]
    assert len(twice) == 1
    assert sum(hub.received.values()) == sum(sizes.values()) + sizes[twice[0]]
    assert len(sizes) == len(list(out.glob("*.gguf")))


def test_a_dry_run_is_a_table_of_what_would_be_sent(run, hub, out):
    said = run(*publish(out, "--dry-run"))
    assert "commit: Add Q4_X\n" in said
    assert "Q4_X/Tiny-Q4_X-00001-of-00004.gguf" in said
    assert f"to a new repository {REPO} (private); nothing was sent" in said
    assert REPO not in hub.repos
    told = json.loads(run(*publish(out, "--dry-run", "--json", "--public")))
    assert not told["private"]
    assert {entry["state"] for entry in told["files"]} == {"new"}


def test_convert_with_publish_ends_in_what_publish_would_have_sent(run, hub, tmp_path):
    convert = ("convert", FIXTURE, "-r", "q4_x", "--max-shard-size", "6MB", "--name", "Tiny")
    one, two = tmp_path / "one", tmp_path / "two"
    run(*convert, "-o", one, "-t", "1", "--publish", "me/One-GGUF")
    run(*convert, "-o", two, "-t", "1")
    run("publish", two, "--repo", "me/Two-GGUF", "-t", "1")

    def content(repo):
        files = hub.repos[repo].head.files.items()
        return {path: blob.sha256 for path, blob in files if path.endswith(".gguf")}

    assert content("me/One-GGUF") == content("me/Two-GGUF")
    assert set(hub.repos["me/One-GGUF"].head.files) == set(hub.repos["me/Two-GGUF"].head.files)
    sizes = sum(path.stat().st_size for path in one.glob("*.gguf"))
    assert hub.n_received() == sizes  # once, for both


def test_the_token_is_in_nothing_that_is_left(run, hub, out, tmp_path):
    said = run(*publish(out, "--dry-run"))
    hub.faults.set((Fault.UNAVAILABLE, Fault.RESET), every=7)
    said += run(*publish(out))
    hub.faults.set()
    hub.read_only.add("me")
    (out / "Tiny-Q8_0.gguf").unlink()
    said += run(*publish(out), code=5)
    said += run("publish", out, "--repo", "you/Tiny", "--token", TOKEN, code=2)
    assert "HF_TOKEN" in said
    left = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert left
    assert TOKEN not in said
    for path in left:
        assert TOKEN.encode() not in path.read_bytes(), path
    for commit in hub.repos[REPO].commits:
        for name, blob in commit.files.items():
            assert TOKEN.encode() not in blob.read(), name
