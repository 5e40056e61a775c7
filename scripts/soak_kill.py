"""Kill a conversion at random moments until it is done, and compare with an undisturbed one.

    python scripts/soak_kill.py MODEL --recipe q4_x --kills 30

Prints one line per kill: when, and how many tiles the next run found done. Exit code 1 if a byte
differs, if a final name appears early, or if finished tiles were lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(model: Path, recipe: str, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "quantkit", "convert", str(model), "--recipe", recipe),
        *("-o", str(out), "--max-shard-size", "5MB", "--threads", "2", "--json"),
    ]


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
            journal = path.read_bytes()
        except FileNotFoundError:  # finished just now
            continue
        count += len(re.findall(rb"^tile \d+ \d+ [0-9a-f]{64}\n", journal, re.MULTILINE))
    return count


def tiles_of(folder: Path) -> int:
    """Tiles of the finished files, from their manifests."""
    count = 0
    for path in folder.glob("*.manifest.json"):
        for shard in json.loads(path.read_text("utf-8"))["shards"]:
            for tensor in shard["tensors"]:
                slab = tensor["n_bytes"] // tensor["n_slabs"]
                count += tensor["n_slabs"] * -(-slab // tensor["chunk_bytes"])
    return count


def run_until(process: subprocess.Popen[bytes], out: Path, n_tiles: int, seconds: float) -> bool:
    """Let it run until so many tiles are recorded or so long, then SIGKILL its whole group.

    True if it ended by itself.
    """
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if recorded(out) >= n_tiles or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        time.sleep(0.001)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="q4_x")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        golden = Path(scratch) / "golden"
        start = time.monotonic()
        subprocess.run(
            command(options.model, options.recipe, golden), check=True, capture_output=True
        )
        whole = time.monotonic() - start
        expected = digests(golden)
        print(f"undisturbed: {whole:.2f} s, {len(expected)} files")
        n_tiles = tiles_of(golden)
        n_kills = n_bad = round_ = 0
        while n_kills < options.kills:
            out = Path(scratch) / f"run-{round_}"
            round_ += 1
            kills, bad = one_conversion(options, out, expected, (n_tiles, whole), rng)
            n_kills, n_bad = n_kills + kills, n_bad + bad
        print(f"{n_kills} kills over {round_} conversions, {n_bad} failures")
        return 1 if n_bad else 0


def one_conversion(
    options: argparse.Namespace,
    out: Path,
    expected: dict[str, str],
    length: tuple[int, float],
    rng: random.Random,
) -> tuple[int, int]:
    """Kill one conversion up to five times, then let it finish. Gives (kills, failures).

    Most kills come when a random number of tiles is done, some at a random time: while planning,
    between the files, or while they get their names.
    """
    kills = bad = 0
    n_tiles, whole = length
    while True:
        before = recorded(out)
        process = subprocess.Popen(
            command(options.model, options.recipe, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        at_tile, at_time = sys.maxsize, 600.0
        if kills < 5 and rng.random() < 0.7:
            at_tile = rng.randint(1, n_tiles)
        elif kills < 5:
            at_time = rng.uniform(0.0, whole)
        if run_until(process, out, at_tile, at_time):
            if process.returncode:
                print(process.stderr.read().decode() if process.stderr else "")
            break
        kills += 1
        after = recorded(out)
        print(f"killed: {before} tiles before, {after} of {n_tiles} after")
        if after < before and list(out.glob("*.partial")):
            print("tiles were lost")
            bad += 1
    if process.returncode or digests(out) != expected or list(out.glob("*.partial")):
        print(f"{out.name}: the result differs")
        bad += 1
    return kills, bad


if __name__ == "__main__":
    sys.exit(main())
