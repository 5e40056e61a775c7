"""What the first tile of a type costs: compiling its kernels once, loading them afterwards.

Seconds are CPU seconds of one thread: on an idle machine the same as waiting, and other load does
not show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLD_SECONDS = 30.0
WARM_SECONDS = 1.0

# First encode less the second: what is left is importing the kernels, compiling or loading them,
# and building their tables. numba itself, a third of a second, is there already.
FIRST_TILE = """
import sys, time
import numba
import numpy as np
from quantkit.quantize import encode
x = (np.random.default_rng(1).standard_normal((4, 1024)) * 0.02).astype(np.float32)
importance = np.ones(1024, np.float32)
spent = []
for _ in range(2):
    begin = time.process_time()
    encode(x, sys.argv[1], importance)
    spent.append(time.process_time() - begin)
print(spent[0] - spent[1])
"""


def first_tile_seconds(type_name: str, cache: Path) -> float:
    """What a fresh process's first tile costs above its second, with compiled code in `cache`."""
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(cache),
        "OPENBLAS_NUM_THREADS": "1",  # waiting threads would count as work
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", FIRST_TILE, type_name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["Q2_K", "IQ1_M", "IQ2_XXS"])
def test_kernels_compile_in_half_a_minute_and_load_in_a_second(
    type_name: str, tmp_path: Path
) -> None:
    cold = first_tile_seconds(type_name, tmp_path)
    assert any(tmp_path.rglob("*.nbi")), "nothing was kept: the next process compiles again"
    warm = first_tile_seconds(type_name, tmp_path)
    assert warm < WARM_SECONDS < cold < COLD_SECONDS
