"""Speed of rounding with feedback, beside that of nearest rounding.

    python benchmarks/feedback.py [--types Q2_K,IQ2_XXS] [--cols 512,2048,7168] [--threads 1,2]
                                  [--rows 256] [--passes 0,1] [--json out.json]

Rows are Gaussian, neighbouring columns correlate by 0.9. Times are wall time, the best of two runs,
once the metric is factored: its n^3 is paid once per matrix of inputs, not per weight.
`error` is tr(D H D') over that of nearest rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantkit.quantize.codec import Blocks, Codec, How, codec_of
from quantkit.quantize.feedback import Feedback, Metric, encode_with_feedback, supports
from quantkit.quantize.gain import encode_rows
from quantkit.types import GgmlType

F32 = npt.NDArray[np.float32]
TYPES = "IQ1_S,IQ1_M,IQ2_XXS,IQ2_XS,IQ2_S,IQ3_XXS,IQ3_S,Q2_K,Q3_K,Q4_K,Q6_K,IQ4_XS,MXFP4"
HOW = How("default", "importance", 0.0)


@dataclass
class Result:
    """One type at one width; speeds in million weights per second."""

    type: str
    cols: int
    threads: int
    passes: int
    nearest: float
    feedback: float
    error: float


def inputs(n: int) -> torch.Tensor:
    """The Gram matrix of inputs whose neighbours correlate by 0.9."""
    at = torch.arange(n)
    size = torch.from_numpy(np.exp(0.5 * np.random.default_rng(1).standard_normal(n))).float()
    return 0.9 ** (at[:, None] - at).abs() * torch.outer(size, size)


def timed(run: Callable[[], Blocks]) -> tuple[Blocks, float]:
    """What a run gives, and the shorter of two runs in seconds."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        blocks = run()
        best = min(best, time.perf_counter() - start)
    return blocks, best


@dataclass
class Case:
    """Weights f32[rows, n] of one type under one metric."""

    codec: Codec
    x: F32
    metric: Metric

    def error(self, blocks: Blocks) -> float:
        """tr(D H D')."""
        lost = torch.from_numpy(self.codec.decode(blocks) - self.x)
        return float(((lost @ self.metric.gram) * lost).sum(dtype=torch.float64))

    def nearest(self, threads: int) -> Blocks:
        """The codec's own search."""
        with ThreadPoolExecutor(threads) as pool:
            parts = np.array_split(self.x, threads)
            return np.concatenate(list(pool.map(self._plain, parts)))

    def _plain(self, part: F32) -> Blocks:
        return encode_rows(self.codec, part, self.metric.importance, HOW)

    def fed(self, threads: int, passes: int) -> Blocks:
        """Rounding with feedback."""
        return encode_with_feedback(self.codec, self.x, self.metric, HOW, Feedback(passes), threads)


def results(args: argparse.Namespace) -> Iterator[Result]:
    """Every type at every width, number of threads and number of passes."""
    for n in args.cols:
        metric = Metric(inputs(n), 0.01)
        x = (np.random.default_rng(2).standard_normal((args.rows, n)) * 0.02).astype(np.float32)
        for name in args.types.split(","):
            case = Case(codec_of(GgmlType[name]), x, metric)
            if not supports(case.codec.type) or n % case.codec.type.block_size:
                continue
            encode_with_feedback(case.codec, x[:1], metric, HOW, Feedback(1))  # compile, factor
            for threads in args.threads:
                plain, plain_time = timed(partial(case.nearest, threads))
                for passes in args.passes:
                    blocks, fed_time = timed(partial(case.fed, threads, passes))
                    speeds = x.size / plain_time / 1e6, x.size / fed_time / 1e6
                    ratio = case.error(blocks) / case.error(plain)
                    yield Result(name, n, threads, passes, *speeds, ratio)


def numbers(text: str) -> list[int]:
    """Comma-separated whole numbers."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Print the table and, if asked, keep the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--cols", type=numbers, default="512,2048,7168")
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--passes", type=numbers, default="0,1")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| type | columns | threads | later passes | nearest Mw/s | feedback Mw/s | error |")
    print("|---|---|---|---|---|---|---|")
    kept = []
    for r in results(args):
        cells = [r.type, r.cols, r.threads, r.passes]
        cells += [f"{r.nearest:.1f}", f"{r.feedback:.2f}", f"{r.error:.3f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        kept.append(asdict(r))
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
