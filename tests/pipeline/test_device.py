"""Encoding by torch instead of numba, chosen with --device."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from quantkit.container.reader import read_gguf
from quantkit.errors import UsageError
from quantkit.pipeline import Job, Output, convert
from quantkit.quantize import decode
from quantkit.run.events import Silent
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.packed import read_tile
from quantkit.types import GgmlType

RECIPE = """
name: dev
default: bf16
rules:
  - {tensor: blk.1.attn_output, type: q4_k}
  - {tensor: blk.2.attn_output, type: iq2_xxs}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory, fixture_model) -> Job:
    path = tmp_path_factory.mktemp("recipe") / "dev.yaml"
    path.write_text(RECIPE)
    return Job(fixture_model, str(path), name="m", mmproj=None, corpus=None)


def test_torch_writes_what_numba_writes_but_for_ties(job, tmp_path):
    for device, folder in (("cpu", "numba"), ("cpu:0", "torch")):
        convert(job, Output(tmp_path / folder, 1, device=device), Silent())
    files = [read_gguf(tmp_path / folder / "m-dev.gguf") for folder in ("numba", "torch")]
    assert files[0].kvs == files[1].kvs
    stored = [np.memmap(file.path, np.uint8, "r") for file in files]
    for tensor in files[0].tensors:
        ours, theirs = (data[tensor.begin : tensor.end] for data in stored)
        if tensor.type.block_size == 1:
            np.testing.assert_array_equal(ours, theirs)
            continue
        differ = (ours != theirs).reshape(-1, tensor.type.block_bytes).any(1)
        assert differ.mean() < 0.05, tensor.name
        errors = [_error(job, tensor.name, blocks, tensor.type) for blocks in (ours, theirs)]
        assert errors[1] == pytest.approx(errors[0], rel=1e-4), tensor.name


def _error(job: Job, name: str, blocks: np.ndarray, type_: GgmlType) -> float:
    layer = name.split(".")[1]
    with open_checkpoint(job.model) as checkpoint:
        source = f"language_model.model.layers.{layer}.self_attn.o_proj.weight"
        weight = checkpoint.weights[source]
        x = read_tile(checkpoint, weight, 0, weight.n_rows)
    decoded = decode(blocks.reshape(weight.n_rows, -1), type_.name)
    return float(((x - decoded).astype(np.float64) ** 2).sum())


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(job, tmp_path):
    with pytest.raises(UsageError, match="device"):
        convert(job, Output(tmp_path, 1, device="cuda:77"), Silent())
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_it_with_2(fixture_model, tmp_path):
    command = ["convert", str(fixture_model), "-r", "q8_0", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *command, "--device", "nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr
