"""The GPU's benchmark runs on CPU tensors, so that it will on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_it_prints_a_line_for_each_type_and_keeps_the_figures(tmp_path):
    kept = tmp_path / "figures.json"
    command = [SCRIPT, "--device", "cpu", "--quick", "--seconds", "0", "--types", "Q8_0,TQ2_0"]
    done = subprocess.run(
        [sys.executable, *command, "--threads", "2", "--json", kept],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| Q8_0 |" in done.stdout
    assert "| TQ2_0 |" in done.stdout
    figures = json.loads(kept.read_text())
    assert figures["Q8_0"]["kernel"] > 0
    assert figures["TQ2_0"]["end to end"] > 0
    assert figures["copies"]["to the device, plain"] > 0
