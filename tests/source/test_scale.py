"""A checkpoint of the size of Kimi K2.5 opens from its headers alone."""

from __future__ import annotations

import json
import sys
from subprocess import run

from tests.source.kimi_sized import N_TENSORS, write_kimi_sized

# In a process of its own, whose memory is not that of the test suite.
OPEN = r"""
import collections, json, pathlib, re, sys
from quantkit.source.checkpoint import open_checkpoint
with open_checkpoint(pathlib.Path(sys.argv[1])) as checkpoint:
    formats = collections.Counter(weight.format for weight in checkpoint.weights.values())
    n_kib = int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
    print(json.dumps([len(checkpoint.tensors), formats, checkpoint.n_bytes, n_kib]))
"""


def test_kimi_k2_5_opens_with_all_its_tensors_in_little_memory(tmp_path):
    folder = write_kimi_sized(tmp_path)
    result = run([sys.executable, "-c", OPEN, folder], capture_output=True, text=True, check=True)
    n_tensors, formats, n_bytes, n_kib = json.loads(result.stdout)
    assert n_tensors == N_TENSORS
    assert formats == {
        "int4-g32": 60 * 384 * 3,
        "bf16": N_TENSORS - 9 * 60 * 384 - 60,
        "f32": 60,
    }
    assert 595.1e9 < n_bytes < 595.3e9
    assert n_kib < 400 * 1024
