"""Kill a conversion at random moments until it is done, and compare with an undisturbed one.

    python scripts/soak_kill.py MODEL [--recipe q4_x] [--rounding feedback] [--kills 200]
    python scripts/soak_kill.py MODEL --hours 8

Every conversion is the real command in a process group of its own, killed up to five times. After
each kill: nothing wrong stands under a final name, finished tiles stay finished, and no more tiles
were written in vain than can be in flight. `--hours` goes on that long, whatever `--kills` says.
Prints a line per kill and the sums; exit code 1 if anything failed. A seed repeats the choices, as
far as the machine is as quick.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

N_THREADS = 2
IN_FLIGHT = N_THREADS + 1
_TILE = re.compile(rb"^tile \d+ \d+ [0-9a-f]{64}\n", re.MULTILINE)


@dataclass
class Tally:
    """What came of it."""

    conversions: int = 0
    kills: int = 0
    failures: int = 0
    redone: int = 0
    most_redone: int = 0
    partials: int = 0

    def fail(self, what: str) -> None:
        print(f"FAILED: {what}", flush=True)
        self.failures += 1


@dataclass
class Soak:
    """One model and recipe, what comes of it undisturbed, and the dice."""

    model: Path
    arguments: list[str]
    scratch: Path
    rng: random.Random
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.golden = golden = self.scratch / "golden"
        for name in ("warm", "golden"):  # compiled kernels are cached by the first
            start = time.monotonic()
            subprocess.run(self.command(self.scratch / name), check=True, capture_output=True)
            self.seconds = time.monotonic() - start
        self.expected, self.n_tiles = digests(golden), tiles_of(golden)
        print(
            f"undisturbed: {self.seconds:.2f} s, {len(self.expected)} files, {self.n_tiles} tiles"
        )

    def command(self, out: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "quantkit", "convert", str(self.model), "-o", str(out)),
            *("--max-shard-size", "5MB", "--threads", str(N_THREADS), "--json", *self.arguments),
        ]

    def convert_once(self, out: Path) -> None:
        """Kill one conversion up to five times, then let it finish.

        Most kills come when a random number of tiles is done, some at a random time: while
        planning, between the files, or while they get their names.
        """
        n_kills = 0
        while True:
            before = recorded(out)
            at_tile, at_time = sys.maxsize, 1e9
            if n_kills < 5 and self.rng.random() < 0.7:
                at_tile = self.rng.randint(1, self.n_tiles)
            elif n_kills < 5:
                at_time = self.rng.uniform(0.0, self.seconds)
            code, log = self.run_until(out, at_tile, at_time)
            if code is not None:
                break
            n_kills += 1
            self.tally.kills += 1
            self.check_after_kill(out, before)
        self.tally.conversions += 1
        if code:
            self.tally.fail(f"exit code {code}: {log}")
        if digests(out) != self.expected:
            self.tally.fail(f"{out.name}: the result differs")
        if left := [p.name for p in out.iterdir() if not p.name.endswith((".gguf", ".json"))]:
            self.tally.fail(f"{out.name}: {left} are left over")

    def run_until(self, out: Path, n_tiles: int, seconds: float) -> tuple[int | None, str]:
        """Run until so many tiles are recorded or so long, then SIGKILL the whole group.

        Exit code, None where it was killed, and what was said on stderr.
        """
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                self.command(out), stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
            deadline = time.monotonic() + seconds
            while process.poll() is None:
                if recorded(out) >= n_tiles or time.monotonic() > deadline:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return None, ""
                time.sleep(0.001)
            log.seek(0)
            return process.returncode, log.read().decode(errors="replace")

    def check_after_kill(self, out: Path, before: int) -> None:
        tally, after = self.tally, recorded(out)
        for name, digest in digests(out).items():
            if digest != self.expected.get(name):
                tally.fail(f"{name} has wrong bytes under its final name")
        redone = self.written(out) - after
        tally.redone, tally.most_redone = (
            tally.redone + max(0, redone),
            max(tally.most_redone, redone),
        )
        tally.partials = max(tally.partials, len(list(out.glob("*.partial"))))
        print(f"killed: {before} tiles before, {after} of {self.n_tiles} after, {redone} in vain")
        if after < before:
            tally.fail("finished tiles were lost")
        if redone > IN_FLIGHT:
            tally.fail(f"{redone} tiles were written in vain, {IN_FLIGHT} can be in flight")

    def written(self, out: Path) -> int:
        """Tiles whose bytes are there, recorded or not."""
        count = 0
        for manifest in self.golden.glob("*.manifest.json"):
            for name, tiles in cuts(manifest).items():
                path = out / name if (out / name).exists() else out / f"{name}.partial"
                if path.exists():
                    whole, so_far = (self.golden / name).read_bytes(), path.read_bytes()
                    count += sum(so_far[b:e] == whole[b:e] for b, e in tiles)
        return count


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.gguf"))
    }


def recorded(out: Path) -> int:
    """Tiles that are done: those of finished files, and those that journals hold."""
    count = tiles_of(out)
    for path in out.glob(".*.journal"):
        if (out / f"{path.name[1:].removesuffix('.journal')}.manifest.json").exists():
            continue
        try:
            count += len(set(_TILE.findall(path.read_bytes())))
        except FileNotFoundError:  # finished just now
            continue
    return count


def tiles_of(folder: Path) -> int:
    """Tiles of the finished files, from their manifests."""
    return sum(
        len(tiles) for path in folder.glob("*.manifest.json") for tiles in cuts(path).values()
    )


def cuts(manifest: Path) -> dict[str, list[tuple[int, int]]]:
    """First and last byte of every tile of a manifest's files."""
    found: dict[str, list[tuple[int, int]]] = {}
    for shard in json.loads(manifest.read_text("utf-8"))["shards"]:
        tiles = found.setdefault(shard["file"], [])
        for tensor in shard["tensors"]:
            slab = tensor["n_bytes"] // tensor["n_slabs"]
            for first in range(0, tensor["n_bytes"], slab):
                for begin in range(first, first + slab, tensor["chunk_bytes"]):
                    end = min(begin + tensor["chunk_bytes"], first + slab)
                    tiles.append((tensor["begin"] + begin, tensor["begin"] + end))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="q4_x")
    parser.add_argument("--rounding", choices=["nearest", "feedback"], default="nearest")
    parser.add_argument("--corpus", default="core", help="for rounding with feedback")
    parser.add_argument("--tokens", type=int, default=1024, help="likewise")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--hours", type=float, help="go on for so long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    arguments = ["--recipe", options.recipe, "--rounding", options.rounding]
    if options.rounding == "feedback":
        arguments += ["--corpus", options.corpus, "--calibration-tokens", str(options.tokens)]
    begun = time.monotonic()
    until = begun + 3600 * (options.hours or 0)
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(options.model, arguments, Path(scratch), random.Random(options.seed))
        tally = soak.tally
        while tally.kills < options.kills if options.hours is None else time.monotonic() < until:
            out = soak.scratch / "out"
            soak.convert_once(out)
            shutil.rmtree(out)
    print(
        f"{tally.kills} kills over {tally.conversions} conversions in"
        f" {time.monotonic() - begun:.0f} s: {tally.failures} failures; written in vain"
        f" {tally.redone} tiles, at most {tally.most_redone} by one kill; at most"
        f" {tally.partials} partial files"
    )
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
