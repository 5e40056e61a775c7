"""The fixture checkpoint, converted once per recipe and layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.pipeline import Job, Output, convert
from quantkit.plan.build import Limits
from quantkit.run.events import Silent

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"


@pytest.fixture(scope="session")
def fixture_model() -> Path:
    return FIXTURE


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """converted(recipe, max_shard_bytes=None, model=FIXTURE) -> folder with the files."""
    cache = {}

    def make(recipe: str, max_shard_bytes: int | None = None, model: Path = FIXTURE) -> Path:
        key = (recipe, max_shard_bytes, model)
        if key not in cache:
            folder = tmp_path_factory.mktemp(recipe)
            job = Job(model, recipe, Limits(max_shard_bytes), name="m")
            convert(job, Output(folder, 2), Silent())
            cache[key] = folder
        return cache[key]

    return make
