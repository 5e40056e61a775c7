"""Calibration and rounding with feedback go through the same forward pass for every family."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from quantkit.calibrate.imatrix import read_imatrix
from quantkit.cli import cli
from quantkit.container.reader import read_gguf
from quantkit.errors import UnsupportedError
from quantkit.pipeline import Job, Output, convert
from quantkit.run.events import Silent
from quantkit.types import GgmlType

QUIET = ["--budget", "512", "--ctx-size", "256", "-t", "1", "-q"]


@pytest.mark.parametrize("name", ["phi3", "gemma3", "gpt-oss"])
def test_every_matrix_of_the_layers_gets_statistics(name, tiny, file_of, tmp_path):
    folder, out = tiny(name), tmp_path / "imatrix.gguf"
    done = CliRunner().invoke(cli, ["calibrate", str(folder), "-o", str(out), *QUIET])
    assert done.exit_code == 0, done.output
    measured = read_imatrix(out)
    kept = {"ffn_gate_inp", "attn_sinks"}
    matrices = {
        tensor.name
        for tensor in read_gguf(file_of(folder)).tensors
        if len(tensor.shape) > 1
        and tensor.name.startswith("blk.")
        and tensor.name.endswith(".weight")
        and tensor.name.split(".")[2] not in kept
    }
    assert matrices <= set(measured.sums)
    assert all(measured.mean(tensor).max() > 0 for tensor in matrices)


def rounded(folder, out):
    job = Job(folder, "q4_0", name="m", mmproj=None, budget=1024, rounding="feedback")
    convert(job, Output(out, 1), Silent())
    return read_gguf(out / "m-Q4_0.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gpt-oss", "glm4-moe"])
def test_feedback_rounds_every_quantised_tensor_of_families_that_it_knows(
    name, tiny, file_of, tmp_path
):
    folder = tiny(name)
    ours = rounded(folder, tmp_path)
    nearest = read_gguf(file_of(folder, "q4_0"))
    data = [path.read_bytes() for path in (tmp_path / "m-Q4_0.gguf", file_of(folder, "q4_0"))]
    layout = [[(t.name, t.type, t.shape) for t in file.tensors] for file in (ours, nearest)]
    assert layout[0] == layout[1]
    for mine, theirs in zip(ours.tensors, nearest.tensors, strict=True):
        same = data[0][mine.begin :][: mine.n_bytes] == data[1][theirs.begin :][: theirs.n_bytes]
        if mine.type is not GgmlType.F32 and mine.name != "token_embd.weight":
            assert not same, mine.name
        elif "ffn_gate_inp" not in mine.name:  # routers follow their inputs
            assert same, mine.name


@pytest.mark.parametrize("name", ["phi3", "gemma2", "gemma3"])
def test_feedback_is_refused_where_it_does_not_know_the_layers(name, tiny, tmp_path):
    with pytest.raises(UnsupportedError, match="does not know the layers") as caught:
        rounded(tiny(name), tmp_path)
    assert "nearest" in caught.value.hint
