"""The tiny model, what it is converted to, and text to run it on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.jobs import Work, digests, write_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def nearest(tiny) -> Work:
    """Rounding to the nearest, in several shards."""
    return Work(tiny, "q4_0")


@pytest.fixture(scope="session")
def feedback(tiny, tmp_path_factory) -> Work:
    """Rounding with feedback: the model runs, and saves its state behind every layer."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("Moss grew between the stones of the yard. " * 30)
    options = {"rounding": "feedback", "corpus": str(folder / "text.txt"), "budget": 512}
    return Work(tiny, "q4_0", options=options)


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """expected(work) -> digests of its files when nothing happens."""
    known: dict[int, dict[str, str]] = {}

    def get(work: Work) -> dict[str, str]:
        if id(work) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            work.run(folder)
            known[id(work)] = digests(folder)
        return known[id(work)]

    return get


@pytest.fixture
def always_saved(monkeypatch):
    """A state behind every layer, however long a save takes."""
    monkeypatch.setattr("quantkit.forward.sweep._SHARE", 1e9)
