"""A local Hub with the tiny model on it, and clients of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import HubError
from quantkit.hub.client import Patience
from quantkit.hub.ref import parse_ref
from quantkit.hub.session import HubSession
from quantkit.pipeline import Job, Output, convert
from quantkit.run.events import Silent
from tests.localhub import Fault, LocalHub

REPO_ROOT = Path(__file__).parents[2]
FIXTURE = REPO_ROOT / "tests/fixtures/tiny-kimi-k2.5"
MODEL = "me/tiny-kimi-k2.5"
CANARY = "hf_CANARYcanaryCANARYcanaryCANARY"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def here(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as a client of the Hub, without a token and without what the machine has."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")


class Told(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.text = ""

    def stage(self, name: str, detail: str) -> None:
        self.text += f"{name} {detail}\n"

    def warn(self, text: str) -> None:
        self.text += f"{text}\n"


QUICK = Patience(pause=0.01, longest=0.05)


def convert_here(out: Path, *, model: str = MODEL, n_threads: int = 1, **options: Any) -> str:
    """Convert in this process, as `quantkit convert` does; what it tells."""
    options.setdefault("patience", QUICK)
    told = Told()
    with HubSession(told, out, **options) as session:
        place = parse_ref(model)
        output = Output(out, n_threads, restart=options.get("restart", False))
        convert(Job(session.at(place), "q4_x"), output, told)
    return told.text


def break_off(hub: LocalHub, out: Path, n_ranges: int = 12, **options: Any) -> None:
    """A conversion that loses its connection for good at the so many-th range of a shard."""
    hub.faults.set([Fault.RESET], n_ranges, for_good=True, where="GET /blobs")
    options = {"patience": Patience(tries=1), "spool": 8_000_000} | options
    with pytest.raises(HubError):
        convert_here(out, **options)
    hub.faults.set()
    assert list(out.glob(".hub/*.piece"))


@dataclass
class Client:
    """`quantkit` in a subprocess that knows one Hub; what it said is in `said`."""

    hub: LocalHub
    folder: Path
    token: str | None = None
    said: list[str] = field(default_factory=list)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        env = self.hub.env(self.folder / "home", self.token)
        return subprocess.Popen(
            [sys.executable, "-m", "quantkit", *map(str, arguments)],
            cwd=self.folder,
            env=env | {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, expect: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        self.said += [out, err]
        assert process.returncode == expect, f"{process.returncode}: {out}\n{err}"
        return out + err


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture converted from its local folder."""
    folder = tmp_path_factory.mktemp("local")
    convert(Job(FIXTURE, "q4_x"), Output(folder, 1), Silent())
    return folder


def assert_same_ggufs(folder: Path, local: Path) -> None:
    names = sorted(path.name for path in local.glob("*.gguf"))
    assert names
    assert sorted(path.name for path in folder.glob("*.gguf")) == names
    for name in names:
        assert (folder / name).read_bytes() == (local / name).read_bytes(), name


@dataclass
class Peak:
    """The most bytes that files below a folder had together."""

    n_bytes: int = 0


@pytest.fixture
def watch() -> Iterator[Callable[[Path], Peak]]:
    """Looks at a folder's size a hundred times a second."""
    stop = threading.Event()
    threads = []

    def begin(folder: Path) -> Peak:
        peak = Peak()

        def look() -> None:
            while not stop.is_set():
                peak.n_bytes = max(peak.n_bytes, size_of(folder))
                time.sleep(0.01)

        threads.append(threading.Thread(target=look, daemon=True))
        threads[-1].start()
        return peak

    yield begin
    stop.set()
    for thread in threads:
        thread.join()


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, which may be changing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
