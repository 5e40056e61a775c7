"""Where the time of a conversion goes, and how near it comes to its disk and to its kernels.

    python benchmarks/pipeline.py MODEL --recipe ud-q2_k_xl [--threads 2] [--turns 7] [--mib 96]
                                  [--kind repacked] [--warm]

First stage by stage: CPU time of one thread per weight, by type and source format, over a few tiles
of each. Then three runs over the same tiles of one kind, taking turns: the pipeline (read, expand,
encode, digest, write, journal), the kernels alone (the same tiles, already in memory, encoded by as
many threads) and the disk alone (the same ranges read and as many bytes written, by as many
threads). Source pages are dropped before each and everything is flushed after it. `reached` is the
time of the slower of the two over the pipeline's; the median of all turns counts.

Where INT4 is repacked to Q4_0, `cp` and a flush of the bytes that the pipeline reads is the
measure; `--warm` leaves source and result in the page cache, where the disk does not hide what the
CPU does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantkit.pipeline import Job
from quantkit.pipeline.planning import planned
from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.gain import encode_rows
from quantkit.quantize.tiles import Encoding, encode_tile
from quantkit.run.events import Silent
from quantkit.run.executor import run_threaded
from quantkit.source.checkpoint import Checkpoint
from quantkit.source.files import Bytes
from quantkit.source.packed import repack
from quantkit.source.slabs import read_slab
from quantkit.types import Plan, PlannedTensor, TensorRef, Weight
from quantkit.write.writer import ShardWriter

Key = tuple[int, int]
STAGES = ("read", "expand", "encode", "gain", "digest", "write")


class Recorder:
    """A checkpoint that remembers what is read, with its CPU time, and can answer from memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.config, self.tensors = checkpoint.config, checkpoint.tensors
        self.shapes_checked = checkpoint.shapes_checked
        self.seconds = 0.0
        self.ranges: dict[tuple[TensorRef, int, int], Bytes] = {}

    def pread(self, ref: TensorRef, offset: int, n_bytes: int) -> Bytes:
        key = (ref, offset, n_bytes)
        if key not in self.ranges:
            start = time.thread_time()
            self.ranges[key] = self._checkpoint.pread(ref, offset, n_bytes)
            self.seconds += time.thread_time() - start
        return self.ranges[key]


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    checkpoint: Checkpoint
    plan: Plan
    how: How
    n_threads: int
    work: Path
    warm: bool

    def n_weights(self, keys: list[Key]) -> int:
        tiles = ((self.plan.tensors[t], self.plan.tensors[t].tile(k)) for t, k in keys)
        return sum((last - first) * t.spec.grid[1] for t, (_, first, last) in tiles)

    def weights(self, keys: list[Key]) -> Iterator[Weight]:
        """What these tiles are made of, in their order."""
        slabs = ((self.plan.tensors[t], self.plan.tensors[t].tile(k)[0]) for t, k in keys)
        for weight, _ in groupby(t.spec.slabs[n].weight for t, n in slabs):
            yield weight

    def recorded(self, keys: list[Key]) -> Recorder:
        """What reading these tiles reads."""
        recorder = Recorder(self.checkpoint)
        for tensor, tile in keys:
            _read(recorder, self.plan.tensors[tensor], tile)
        return recorder

    def forget_source(self) -> None:
        """Drop the source's pages, so that the next reader meets the disk."""
        for path in [] if self.warm else self.checkpoint.root.glob("*.safetensors"):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def pipeline(self, writer: ShardWriter, keys: list[Key]) -> None:
        encoding = Encoding(self.how)
        self.checkpoint.will_read(self.weights(keys))

        def make(key: Key) -> None:
            tile = encode_tile(self.checkpoint, self.plan.tensors, key, encoding)
            writer.write(*key, tile.data, tile.digest)

        with closing(run_threaded(make, keys, self.n_threads)) as made:
            for _ in made:
                pass
        if not self.warm:
            writer.sync()

    def kernels(self, inputs: list[Callable[[], object]]) -> None:
        for _ in run_threaded(lambda run: run(), inputs, self.n_threads):
            pass

    def disk(self, ranges: list[tuple[TensorRef, int, int]], n_out: int, file: Path) -> None:
        data = memoryview(bytes(1 << 20))
        with file.open("wb") as out:
            for _ in run_threaded(lambda r: self.checkpoint.pread(*r), ranges, self.n_threads):
                out.write(data[: -(-n_out // len(ranges))])
            out.flush()
            if not self.warm:
                os.fsync(out.fileno())
        file.unlink()


def _read(source: Recorder, planned_: PlannedTensor, tile: int) -> object:
    slab, first, last = planned_.tile(tile)
    if not planned_.repack:
        return read_slab(source, planned_.spec, slab, first, last)  # type: ignore[arg-type]
    rows = planned_.spec.slabs[slab]
    begin = rows.row_begin
    return repack(source, rows.weight, begin + first, begin + last)  # type: ignore[arg-type]


def by_kind(plan: Plan) -> dict[str, list[int]]:
    """Numbers of the tensors that are made alike, largest kinds first."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, tensor in enumerate(plan.tensors):
        if tensor.spec.slabs and len(tensor.spec.shape) > 1:
            source = tensor.spec.slabs[0]
            kind = f"{source.weight.format} {source.op}" + (" repacked" if tensor.repack else "")
            kinds[f"{kind} -> {tensor.type.name}"].append(number)
    weight = {k: sum(plan.tensors[n].spec.n_weights for n in v) for k, v in kinds.items()}
    return dict(sorted(kinds.items(), key=lambda item: -weight[item[0]]))


def stages(bench: Bench, numbers: list[int], writer: ShardWriter, n_tiles: int) -> Counter[str]:
    """CPU nanoseconds per weight of each stage, over the first tiles of a few tensors."""
    spent: Counter[str] = Counter()
    keys = [(n, k) for n in numbers[:3] for k in range(min(n_tiles, bench.plan.tensors[n].n_tiles))]
    for turn in range(2):  # the first compiles and warms up
        spent.clear()
        for number, tile in keys if turn else keys[:1]:
            tensor, source = bench.plan.tensors[number], Recorder(bench.checkpoint)
            begun = time.thread_time()
            made = _read(source, tensor, tile)
            spent["read"] += source.seconds
            spent["expand"] += time.thread_time() - begun - source.seconds
            begun = time.thread_time()
            if tensor.repack:
                blocks = made[0]  # type: ignore[index]
            else:
                blocks = codec_of(tensor.type).encode(made, None, bench.how)  # type: ignore[arg-type]
                plain = time.thread_time() - begun
                spent["encode"] += plain
                begun = time.thread_time()
                encode_rows(codec_of(tensor.type), made, None, bench.how)  # type: ignore[arg-type]
                spent["gain"] += max(0.0, time.thread_time() - begun - plain)
                begun = time.thread_time()
            digest = hashlib.sha256(blocks.data).digest()
            spent["digest"] += time.thread_time() - begun
            begun = time.thread_time()
            writer.write(number, tile, blocks.data.cast("B"), digest)
            spent["write"] += time.thread_time() - begun
    return Counter({stage: 1e9 * s / bench.n_weights(keys) for stage, s in spent.items()})


def slices(bench: Bench, kind: list[int], mib: int) -> Iterator[list[Key]]:
    """Runs of tiles of the largest kind that make about so many MiB."""
    keys: list[Key] = []
    n_bytes = 0
    for number in kind:
        tensor = bench.plan.tensors[number]
        for tile in range(tensor.n_tiles):
            keys.append((number, tile))
            n_bytes += tensor.tile_rows * tensor.row_bytes
            if n_bytes >= mib << 20:
                yield keys
                keys, n_bytes = [], 0


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def turn(bench: Bench, writer: ShardWriter, keys: list[Key]) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of the pipeline and of what bounds it."""
    source = bench.recorded(keys)
    if all(bench.plan.tensors[t].repack for t, _ in keys):
        inputs = [partial(_read, source, bench.plan.tensors[t], k) for t, k in keys]
        copied = bench.work / "source"
        copied.write_bytes(b"".join(data.data for data in source.ranges.values()))
    else:
        tiles = [(bench.plan.tensors[t], _read(source, bench.plan.tensors[t], k)) for t, k in keys]
        inputs = [
            partial(encode_rows, codec_of(t.type), np.asarray(x), None, bench.how) for t, x in tiles
        ]
        copied = None
    n_out = sum(bench.plan.tensors[t].tile_rows * bench.plan.tensors[t].row_bytes for t, _ in keys)
    runs: dict[str, Callable[[], object]] = {
        "kernels": partial(bench.kernels, inputs),
        "disk": partial(bench.disk, list(source.ranges), n_out, bench.work / "scratch"),
        "pipeline": partial(bench.pipeline, writer, keys),
    }
    if copied is not None:
        runs["cp"] = partial(copy, copied, bench.work / "copy", flushed=not bench.warm)
    times = {}
    for name, run in runs.items():
        bench.forget_source()
        times[name] = timed(run)
    return times


def copy(source: Path, target: Path, *, flushed: bool) -> None:
    """`cp`, cold and to the disk, or in the page cache."""
    fd = os.open(source, os.O_RDWR)
    if flushed:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    subprocess.run(["/bin/cp", "--reflink=never", str(source), str(target)], check=True)
    if flushed:
        fd = os.open(target, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
    target.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="q4_x")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--mib", type=int, default=96, help="written per turn")
    parser.add_argument("--tiles", type=int, default=4, help="of each tensor, stage by stage")
    parser.add_argument("--kind", default="", help="part of a line of the table, for the turns")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--work", type=Path, help="default: beside MODEL")
    args = parser.parse_args()
    job = Job(args.model, args.recipe, mmproj=None, corpus=None, rounding="nearest")
    work = Path(tempfile.mkdtemp(dir=args.work or args.model.resolve().parent))
    try:
        with planned(job, Silent()) as (checkpoint, decided):
            recipe, plan = decided.recipe, decided.plans[-1]
            how = How(recipe.effort, recipe.weighting, recipe.gain)
            bench = Bench(checkpoint, plan, how, args.threads, work, args.warm)
            kinds = by_kind(plan)
            with ShardWriter(work, plan) as writer:
                tell_stages(bench, kinds, writer, args.tiles)
                kind = next(kind for kind in kinds if args.kind in kind)
                where = "page cache" if args.warm else "disk"
                print(f"\n{kind}: {args.turns} turns of {args.mib} MiB, {where}\n")
                tell_turns(bench, writer, kinds[kind], args)
    finally:
        shutil.rmtree(work)


def tell_stages(bench: Bench, kinds: dict[str, list[int]], writer: ShardWriter, n: int) -> None:
    print("CPU ns per weight, one thread\n")
    print(f"| {'kind':40} | {' | '.join(f'{s:>6}' for s in STAGES)} | encode of all |")
    print("|---" * (len(STAGES) + 2) + "|")
    for kind, numbers in kinds.items():
        ns = stages(bench, numbers, writer, n)
        share = (ns["encode"] + ns["gain"]) / max(1e-9, sum(ns.values()))
        cells = " | ".join(f"{ns[stage]:6.2f}" for stage in STAGES)
        print(f"| {kind:40} | {cells} | {share:.0%} |", flush=True)


def tell_turns(
    bench: Bench, writer: ShardWriter, kind: list[int], args: argparse.Namespace
) -> None:
    found = defaultdict(list)
    for n, keys in enumerate(slices(bench, kind, args.mib)):
        if n > args.turns:
            break
        times = turn(bench, writer, keys)
        if n == 0:  # warms up
            continue
        wall = {name: seconds for name, (seconds, _) in times.items()}
        slower = max(wall["kernels"], wall["disk"])
        found["reached"].append(slower / wall["pipeline"])
        found["of kernels"].append(wall["kernels"] / wall["pipeline"])
        found["of disk"].append(wall["disk"] / wall["pipeline"])
        found["CPU of kernels"].append(times["kernels"][1] / times["pipeline"][1])
        found["Mweights/s"].append(bench.n_weights(keys) / wall["pipeline"] / 1e6)
        if "cp" in wall:
            found["of cp"].append(wall["cp"] / wall["pipeline"])
    for name, values in found.items():
        low, high = min(values), max(values)
        print(f"{name:15} {statistics.median(values):8.2f}   ({low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
