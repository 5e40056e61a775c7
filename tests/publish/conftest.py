"""The fixture checkpoint, converted twice, measured on paper, and a Hub to publish it on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantkit.evaluate.report import Base, Text, describe, report_json
from quantkit.pipeline import Job, Output, convert
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from tests.localhub.uploads import UploadHub

TESTS = Path(__file__).parents[1]
FIXTURE = TESTS / "fixtures" / "tiny-kimi-k2.5"
IMATRIX = TESTS / "calibrate" / "tiny-kimi-k2.5.imatrix.gguf"
TOKEN = "hf_CANARYcanaryCANARY"  # noqa: S105 - what must appear nowhere
REPO = "me/Tiny-GGUF"
BASE = "moonshotai/Tiny"
BASE_CARD = b"""---
license: other
license_name: modified-mit
license_link: LICENSE
language: [en, zh]
pipeline_tag: image-text-to-text
---
# The original
"""


def report_of(*paths: Path, kld: float = 0.01) -> dict:
    """A report of files, as `quantkit evaluate` writes it, with made-up figures."""
    figures = {"kld_mean_error": 0.001, "kld_p99": 0.2, "same_top_p": 97.5, "ppl": 8.25}
    return report_json(
        model="tiny",
        text=Text(corpus="wiki.test", n_tokens=2048, n_chunks=4, n_ctx=512, digest="ab" * 32),
        engine="quantkit",
        base=Base(ppl=8.0, ppl_error=0.1, path="/home/somebody/tiny"),
        quants=[describe(p, {"kld_mean": kld * (k + 1), **figures}) for k, p in enumerate(paths)],
    )


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with two quants, one of them sharded, vision file, imatrix and report."""
    folder = tmp_path_factory.mktemp("made")
    for recipe, limit in (("q4_x", 6_000_000), ("q8_0", None)):
        job = Job(FIXTURE, recipe, Limits(limit), name="Tiny")
        convert(job, Output(folder, 1), Silent())
    shutil.copy(IMATRIX, folder / "Tiny.imatrix.gguf")
    files = folder / "Tiny-Q8_0.gguf", folder / "Tiny-Q4_X-00001-of-00004.gguf"
    (folder / "report.json").write_text(json.dumps(report_of(*files)))
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A copy of it that a test may change; what is big is linked."""
    folder = tmp_path / "out"
    folder.mkdir()
    for path in made.iterdir():
        if path.name.endswith(".gguf"):
            (folder / path.name).hardlink_to(path)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def hub():
    with UploadHub() as hub:
        hub.add_user("me", TOKEN)
        hub.add_repo(BASE, {"README.md": BASE_CARD})
        yield hub


@pytest.fixture
def api(hub, tmp_path, monkeypatch):
    """The real client, in this process."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    disable_progress_bars()
    return HfApi(endpoint=hub.endpoint, token=TOKEN)
