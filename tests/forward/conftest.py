"""Checkpoints and GGUF files, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.pipeline import Job, Output, convert
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from tests.forward.support import FIXTURE


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> its folder; the trained one for "fixture"."""
    from make_hf_checkpoint import make

    folder = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        if family == "fixture":
            return FIXTURE
        if not (folder / family).exists():
            make(family, folder / family)
        return folder / family

    return get


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """converted(recipe, model) -> the text file, made without importance."""
    made = {}

    def get(recipe: str, model: Path = FIXTURE) -> Path:
        if (recipe, model) not in made:
            folder = tmp_path_factory.mktemp("converted")
            job = Job(model, recipe, Limits(), name="m", mmproj=None, corpus=None)
            convert(job, Output(folder, 1), Silent())
            made[recipe, model] = folder / f"m-{recipe.upper()}.gguf"
        return made[recipe, model]

    return get
