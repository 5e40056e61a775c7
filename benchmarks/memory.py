"""Peak anonymous memory of a conversion and, if asked, its speed beside that of its kernels.

    python benchmarks/memory.py MODEL --recipe q4_x [--threads 2] [--memory 1GB] [--kernels 20]
                                [--keep OUT]

`RssAnon` is sampled from /proc. `--kernels SECONDS` stops the conversion for a moment every so
often and lets its encoders run on the model's own tiles, in memory, on as many threads: on a
machine with other work, both meet the same weather. The time of the conversion, stops left out, is
compared with weights / speed summed over types. What is not known here goes to `quantkit convert`.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantkit.pipeline import Job
from quantkit.pipeline.planning import planned
from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.gain import encode_rows
from quantkit.run.events import Silent
from quantkit.run.executor import run_threaded
from quantkit.source.slabs import read_slab
from quantkit.types import GgmlType

F32 = npt.NDArray[np.float32]
_TURN_S = 0.5  # for each type at a stop


def rss_anon(pid: int) -> int:
    """Anonymous resident bytes of a process; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


@dataclass
class Kernels:
    """Encoders of the types that a plan is made of, and what they reached."""

    how: How
    n_threads: int
    tiles: dict[GgmlType, F32] = field(default_factory=dict)
    n_weights: dict[GgmlType, int] = field(default_factory=lambda: defaultdict(int))
    speeds: dict[GgmlType, list[float]] = field(default_factory=lambda: defaultdict(list))

    def measure(self) -> None:
        """One more speed of each type."""
        for type_, x in self.tiles.items():
            encode = partial(encode_rows, codec_of(type_), x, None, self.how)
            run = partial(run_threaded, lambda _, encode=encode: encode(), range(4), self.n_threads)
            n, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < _TURN_S:
                n += sum(x.size for _ in run())
            self.speeds[type_].append(n / (time.perf_counter() - begun))

    def seconds(self) -> float:
        """Of all weights by the mean time per weight at the stops."""
        return sum(
            n * statistics.fmean(1 / s for s in self.speeds[type_])
            for type_, n in self.n_weights.items()
            if type_ in self.speeds
        )


def kernels_of(model: Path, recipe: str, n_threads: int) -> Kernels:
    """A tile of each type that the model is encoded to, as it is read."""
    job = Job(model, recipe, mmproj=None, corpus=None, rounding="nearest")
    with planned(job, Silent()) as (checkpoint, decided):
        kernels = Kernels(decided.how, n_threads)
        for tensor in sorted(decided.plans[-1].tensors, key=lambda t: -t.spec.n_weights):
            if tensor.repack or not tensor.spec.slabs or tensor.type.block_size == 1:
                continue
            kernels.n_weights[tensor.type] += tensor.spec.n_weights
            if tensor.type not in kernels.tiles:
                x = read_slab(checkpoint, tensor.spec, *tensor.tile(0))
                kernels.tiles[tensor.type] = x[: max(1, (1 << 19) // x.shape[1])].copy()
    kernels.measure()  # compiles
    kernels.speeds.clear()
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="q4_x")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", type=float, metavar="SECONDS")
    parser.add_argument("--keep", type=Path, help="where to leave the files")
    options, more = parser.parse_known_args()
    with ExitStack() as stack:
        beside = options.model.resolve().parent
        out = options.keep or stack.enter_context(tempfile.TemporaryDirectory(dir=beside))
        kernels = None
        if options.kernels:
            kernels = kernels_of(options.model, options.recipe, options.threads)
        start = time.monotonic()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "quantkit", "convert", str(options.model), "-o", str(out)),
                *("--recipe", options.recipe, "--threads", str(options.threads), "--quiet", *more),
            ]
        )
        peak, stopped, last = 0, 0.0, time.monotonic()
        while process.poll() is None:
            peak = max(peak, rss_anon(process.pid))
            time.sleep(0.005)
            if kernels and time.monotonic() - last > options.kernels:
                begun = time.monotonic()
                process.send_signal(signal.SIGSTOP)
                kernels.measure()
                process.send_signal(signal.SIGCONT)
                last = time.monotonic()
                stopped += last - begun
        seconds = time.monotonic() - start - stopped
        n_bytes = sum(path.stat().st_size for path in Path(out).glob("*.gguf"))
    print(
        f"{options.model.name} {options.recipe}: exit {process.returncode}, "
        f"peak RssAnon {peak / 2**20:,.0f} MiB, {n_bytes / 1e9:.2f} GB in {seconds:.1f} s"
    )
    if kernels and kernels.speeds:
        for type_, speeds in kernels.speeds.items():
            print(
                f"  {type_.name}: {kernels.n_weights[type_] / 1e9:.2f} G weights, "
                f"{statistics.harmonic_mean(speeds) / 1e6:.1f} M/s ({len(speeds)} stops)"
            )
        print(f"  kernels alone {kernels.seconds():.1f} s: {seconds / kernels.seconds():.2f} x")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
