"""A checkpoint of the size of Kimi K2.5 opens from its headers alone."""

from __future__ import annotations

import sys
from collections import Counter
from subprocess import run

from quantkit.source.checkpoint import open_checkpoint
from quantkit.types import WeightFormat
from tests.source.kimi_sized import N_TENSORS, write_kimi_sized


def test_kimi_k2_5_opens_with_all_its_tensors_in_little_memory(tmp_path):
    folder = write_kimi_sized(tmp_path)
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.tensors) == N_TENSORS
        assert Counter(weight.format for weight in checkpoint.weights.values()) == {
            WeightFormat.INT4_G32: 60 * 384 * 3,
            WeightFormat.BF16: N_TENSORS - 9 * 60 * 384 - 60,
            WeightFormat.F32: 60,
        }
        assert 595.1e9 < checkpoint.n_bytes < 595.3e9
    code = (
        "import pathlib, resource, sys; from quantkit.source.checkpoint import open_checkpoint; "
        "checkpoint = open_checkpoint(pathlib.Path(sys.argv[1])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    result = run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 500 * 1024
