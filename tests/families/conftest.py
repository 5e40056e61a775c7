"""Checkpoints and their files, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.pipeline import Job, Output, convert
from quantkit.plan.build import Limits
from quantkit.run.events import Silent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(name, dtype) -> the folder of a checkpoint."""
    models = pytest.importorskip("tests.families.models")
    root = tmp_path_factory.mktemp("tiny")

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        # A name with "phi3" in it would make llama.cpp look for that model's special tokens.
        folder = root / f"model-{sorted(models.TINY).index(name)}-{dtype.itemsize}"
        return folder if folder.exists() else models.make(name, folder, dtype)

    return get


@pytest.fixture(scope="session")
def file_of(tmp_path_factory):
    """file_of(folder, recipe) -> the GGUF file."""
    made: dict[tuple[Path, str], Path] = {}

    def get(folder: Path, recipe: str = "f32") -> Path:
        if (folder, recipe) not in made:
            out = tmp_path_factory.mktemp("file")
            convert(
                Job(folder, recipe, Limits(), name="m", mmproj=None, corpus=None),
                Output(out, 1),
                Silent(),
            )
            made[folder, recipe] = out / f"m-{recipe.upper()}.gguf"
        return made[folder, recipe]

    return get
