"""Converting with importance statistics: given, measured first, or done without."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantkit.calibrate.coverage import importance
from quantkit.calibrate.imatrix import read_imatrix, write_imatrix
from quantkit.calibrate.statistics import Statistics, Sums
from quantkit.container.reader import read_gguf
from quantkit.errors import GgufError, UsageError
from quantkit.pipeline import Job, Output, convert
from quantkit.quantize import encode
from quantkit.run.events import Silent
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.packed import read_tile
from quantkit.types import KvType

IMATRIX = Path(__file__).parents[1] / "calibrate" / "tiny-kimi-k2.5.imatrix.gguf"
EXPERTS = "blk.2.ffn_down_exps.weight"


class Heard(Silent):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.stages: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def stage(self, name: str, detail: str) -> None:
        self.stages.append(f"{name} {detail}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """Routed experts' down projections at 2 bits, everything else quick to write."""
    path = tmp_path_factory.mktemp("recipe") / "low.yaml"
    path.write_text(
        "name: low\ndefault: bf16\nrules:\n  - {role: routed_expert.down, type: iq2_xxs}\n"
    )
    return str(path)


def _tensor(folder: Path, name: str) -> np.ndarray:
    (path,) = folder.glob("m-low.gguf")
    tensor = next(t for t in read_gguf(path).tensors if t.name == name)
    with path.open("rb") as file:
        file.seek(tensor.begin)
        return np.frombuffer(file.read(tensor.n_bytes), np.uint8)


def _job(model: Path, recipe: str, **options) -> Job:
    return Job(model, recipe, name="m", mmproj=None, **options)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory, fixture_model, recipe) -> Path:
    folder = tmp_path_factory.mktemp("weighted")
    convert(_job(fixture_model, recipe, imatrix=IMATRIX), Output(folder, 2), Silent())
    return folder


def test_every_expert_is_encoded_with_its_own_importance(weighted, fixture_model):
    blocks = _tensor(weighted, EXPERTS).reshape(8, 512, -1)
    rows = importance(read_imatrix(IMATRIX), EXPERTS, (8, 512, 256)).values
    with open_checkpoint(fixture_model) as checkpoint:
        for expert in (0, 7):
            name = f"language_model.model.layers.2.mlp.experts.{expert}.down_proj.weight"
            x = read_tile(checkpoint, checkpoint.weights[name], 0, 512)
            expected = encode(x, "IQ2_XXS", rows[expert], weighting="blend", gain=0.75)
            np.testing.assert_array_equal(blocks[expert], expected)


def test_the_file_says_what_it_was_weighted_with(weighted):
    kvs = read_gguf(weighted / "m-low.gguf").kvs
    said = {key: (kv.type, kv.value) for key, kv in kvs.items() if key.startswith("quantize.")}
    assert said == {
        "quantize.imatrix.file": (KvType.STRING, IMATRIX.name),
        "quantize.imatrix.dataset": (KvType.STRING, "tiny-kimi.calibration.txt"),
        "quantize.imatrix.entries_count": (KvType.U32, 49),
        "quantize.imatrix.chunks_count": (KvType.U32, 60),
    }


def test_an_imatrix_of_another_model_is_refused(tmp_path, fixture_model, recipe):
    sums = Sums(np.ones((1, 64)), np.array([512.0]))
    statistics = Statistics(n_tokens=512, sums={"blk.77.attn_q.weight": sums})
    write_imatrix(tmp_path / "other.gguf", statistics)
    job = _job(fixture_model, recipe, imatrix=tmp_path / "other.gguf")
    with pytest.raises(UsageError, match="none of the model's tensors"):
        convert(job, Output(tmp_path / "out", 1), Silent())
    assert not list(tmp_path.glob("out/*.gguf"))


def test_statistics_of_another_shape_are_refused_before_a_name_is_given(
    tmp_path, fixture_model, recipe
):
    sums = Sums(np.ones((8, 96)), np.full(8, 64.0))
    statistics = Statistics(n_tokens=512, sums={EXPERTS: sums})
    write_imatrix(tmp_path / "narrow.gguf", statistics)
    job = _job(fixture_model, recipe, imatrix=tmp_path / "narrow.gguf")
    with pytest.raises(GgufError, match="ffn_down_exps"):
        convert(job, Output(tmp_path / "out", 1), Silent())
    assert not list(tmp_path.glob("out/*.gguf"))


def test_without_one_the_model_is_calibrated_first_and_the_result_kept(
    tmp_path, fixture_model, recipe
):
    text = tmp_path / "some.txt"
    text.write_text("Every expert deserves a few tokens, and this is a short text.\n" * 200)
    job = _job(fixture_model, recipe, corpus=str(text), budget=1024)
    heard = Heard()
    convert(job, Output(tmp_path / "out", 2), heard)
    assert any("calibrating first, 1,024 tokens" in warning for warning in heard.warnings)
    made = tmp_path / "out" / "m.imatrix.gguf"
    assert read_imatrix(made).n_tokens == 1024
    assert (
        read_gguf(tmp_path / "out" / "m-low.gguf").kvs["quantize.imatrix.file"].value == made.name
    )

    again = Heard()
    convert(job, Output(tmp_path / "out", 2), again)
    assert sum("nothing to do" in stage for stage in again.stages) == 2


def test_a_recipe_of_many_bits_needs_no_calibration(tmp_path, fixture_model):
    heard = Heard()
    convert(_job(fixture_model, "q8_0"), Output(tmp_path, 2), heard)
    assert not heard.warnings
    assert not list(tmp_path.glob("*.imatrix.gguf"))


def test_doing_without_says_so_and_loads_no_torch(tmp_path, fixture_model, recipe):
    code = (
        "import sys; from quantkit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    model = shutil.copytree(fixture_model, tmp_path / "model")
    command = ["convert", str(model), "-r", recipe, "--no-imatrix", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    assert "IQ2_XXS without importance statistics" in done.stderr
    assert done.stdout.endswith("False\n")


def test_imatrix_and_no_imatrix_exclude_each_other(fixture_model):
    command = ["convert", str(fixture_model), "-r", "q2_k", "-o", "x", "--no-imatrix"]
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *command, "--imatrix", str(IMATRIX)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "exclude each other" in done.stderr
