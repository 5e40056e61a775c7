"""Speed and error of the torch encoders on a device, beside the numba kernels.

    python benchmarks/codecs_torch.py [--device cuda] [--types Q4_K,IQ2_XXS] [--efforts default]
                                      [--rows 4096] [--json out.json]

Both sides encode the same Gaussian rows of 7168 weights with the same log-normal importance. The
torch side's time is that of whole calls, tile to the device and blocks back; the best of several
counts. The kernels run on one thread, on as many rows as the comparison takes. `error` is torch's
sum w (x - x^)^2 over the kernels', `same` the share of equal blocks, both on those rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantkit.quantize.codec import Blocks, Codec, Effort, How, codec_of
from quantkit.quantize.torch import supported, torch_codec
from quantkit.types import GgmlType

F32 = npt.NDArray[np.float32]
COLS = 7168


@dataclass
class Result:
    """One type at one effort."""

    type: str
    effort: str
    gweights: float  # per second, torch
    kernel_gweights: float  # per second, numba on one thread
    error: float
    same: float


def best_time(run: Callable[[], Blocks], seconds: float) -> float:
    """Shortest of the calls that fit into `seconds`, two at least, after one to warm up."""
    run()
    best, turns, begin = float("inf"), 0, time.perf_counter()
    while turns < 2 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        turns += 1
    return best


def error(x: F32, blocks: Blocks, codec: Codec, importance: F32) -> float:
    """sum w (x - x^)^2."""
    return float((importance * np.square(x.astype(np.float64) - codec.decode(blocks))).sum())


def measure(type_: GgmlType, effort: Effort, args: argparse.Namespace) -> Result:
    """Time and compare one type at one effort."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((args.rows, COLS), np.float32) * np.float32(0.02)
    q = np.exp(rng.standard_normal(COLS)).astype(np.float32)
    how = How(effort)
    ours, kernels = torch_codec(type_, args.device), codec_of(type_)
    seconds = best_time(lambda: ours.encode(x, q, how), args.seconds)
    few = x[: args.compare]
    kernel_seconds = best_time(lambda: kernels.encode(few, q, how), args.seconds)
    a, b = kernels.encode(few, q, how), ours.encode(few, q, how)
    same = (a == b).reshape(-1, type_.block_bytes).all(axis=1).mean()
    return Result(
        type_.name,
        effort,
        x.size / seconds / 1e9,
        few.size / kernel_seconds / 1e9,
        error(few, b, kernels, q) / error(few, a, kernels, q),
        float(same),
    )


def main() -> None:
    """Print the table and, if asked, keep the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--types", help="comma-separated; all by default")
    parser.add_argument("--efforts", default="default")
    parser.add_argument("--rows", type=int, default=4096, help="of the timed tile")
    parser.add_argument("--compare", type=int, default=64, help="rows that the kernels encode too")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing per side")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| type | effort | Gw/s | kernels, 1 thread | error | same |\n|---|---|---|---|---|---|")
    kept = []
    for name in args.types.split(",") if args.types else sorted(t.name for t in supported()):
        for effort in args.efforts.split(","):
            r = measure(GgmlType[name], effort, args)
            cells = f"{r.gweights:.4f} | {r.kernel_gweights:.4f} | {r.error:.6f} | {r.same:.2%}"
            print(f"| {r.type} | {r.effort} | {cells} |", flush=True)
            kept.append(asdict(r))
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
