"""Going through a large imatrix takes the memory of a weight or two, not of the file."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from quantkit.calibrate.coverage import coverage, filled
from quantkit.calibrate.dat import write_dat
from quantkit.calibrate.imatrix import read_imatrix, write_imatrix
from quantkit.calibrate.lookup import Lookup
from quantkit.calibrate.statistics import LazySums, Statistics, Sums, figures, merged
from quantkit.types import TensorSpec

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak"
)

WIDTHS = {"gate": 7168, "up": 7168, "down": 2048}
N_EXPERTS, N_LAYERS = 384, 8
SHAPES = {
    f"blk.{layer}.ffn_{part}_exps.weight": (N_EXPERTS, n)
    for layer in range(N_LAYERS)
    for part, n in WIDTHS.items()
}


def made(seed: int, name: str) -> Sums:
    rng = np.random.default_rng([seed, *name.encode()])
    sum2 = np.resize(rng.gamma(0.5, 2, 10007), SHAPES[name])
    return Sums(sum2, np.full(N_EXPERTS, 100.0 + seed))


def write_parts(folder: Path) -> None:
    downs = {name: shape for name, shape in SHAPES.items() if "down" in name}
    for seed in (1, 2):
        make = partial(made, seed)
        stats = Statistics(sums=LazySums(SHAPES, make), priors=LazySums(downs, make))
        write_imatrix(folder / f"{seed}.gguf", stats)


def look_up(folder: Path) -> None:
    tensors = [TensorSpec(name, "", None, (m, 8, n)) for name, (m, n) in SHAPES.items()]
    lookup = Lookup(read_imatrix(folder / "1.gguf"), tensors)
    for tensor in tensors:
        assert lookup.get(tensor.name).shape == (N_EXPERTS, tensor.shape[-1])


def merge(folder: Path) -> None:
    parts = [read_imatrix(folder / f"{seed}.gguf") for seed in (1, 2)]
    write_imatrix(folder / "merged.gguf", merged(parts))


def fill(folder: Path) -> None:
    stats, missing = filled(read_imatrix(folder / "1.gguf"))
    assert missing == ()
    write_imatrix(folder / "filled.gguf", stats)


def legacy(folder: Path) -> None:
    write_dat(folder / "m.dat", read_imatrix(folder / "1.gguf"))
    write_imatrix(folder / "back.gguf", read_imatrix(folder / "m.dat"))


def show(folder: Path) -> None:
    stats = read_imatrix(folder / "1.gguf")
    assert len(figures(stats)) == len(SHAPES)
    assert len(coverage(stats).layers) == N_LAYERS


STEPS = {"look up": look_up, "merge": merge, "fill": fill, "legacy": legacy, "show": show}
# Bytes; the largest weight has 22 MB in f64. Figures sort out values and sum their logarithms.
LIMITS = {"show": 200_000_000}


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def growth(step: str, folder: Path) -> int:
    """How far resident memory rises while a step runs."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak begins anew
    before = resident("RssAnon:") + resident("RssFile:")
    STEPS[step](folder)
    return resident("VmHWM:") - before


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write_parts(folder)
    assert (folder / "1.gguf").stat().st_size > 200e6
    return folder


@pytest.mark.parametrize("step", STEPS)
def test_a_large_file_is_gone_through_weight_by_weight(parts, step):
    told = subprocess.run(
        [sys.executable, "-m", __name__, step, str(parts)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(told.stdout) < LIMITS.get(step, 100_000_000)


if __name__ == "__main__":
    print(json.dumps(growth(sys.argv[1], Path(sys.argv[2]))))
