"""Kill a conversion at random moments until it is done, and compare with an undisturbed one.

    python scripts/soak_kill.py MODEL --recipe q4_x --kills 30

Prints one line per kill: when, and how many tiles the next run found done. Exit code 1 if a byte
differs, if a final name appears early, or if finished tiles were lost.
"""

from __future__ import annotations

import argparse
import hashlib
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
    """Tiles that the journals of unfinished files hold."""
    lines = (line for path in out.glob(".*.journal") for line in path.read_bytes().splitlines(True))
    return sum(bool(re.fullmatch(rb"tile \d+ \d+ [0-9a-f]{64}\n", line)) for line in lines)


def run_until(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Let it run that long, then SIGKILL its whole group; True if it ended by itself."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
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
        subprocess.run(command(options.model, options.recipe, golden), check=True, capture_output=True)
        whole = time.monotonic() - start
        expected = digests(golden)
        print(f"undisturbed: {whole:.2f} s, {len(expected)} files")
        n_kills = n_bad = round_ = 0
        while n_kills < options.kills:
            out = Path(scratch) / f"run-{round_}"
            round_ += 1
            kills, bad = one_conversion(options, out, expected, whole, rng)
            n_kills, n_bad = n_kills + kills, n_bad + bad
        print(f"{n_kills} kills over {round_} conversions, {n_bad} failures")
        return 1 if n_bad else 0


def one_conversion(
    options: argparse.Namespace,
    out: Path,
    expected: dict[str, str],
    whole: float,
    rng: random.Random,
) -> tuple[int, int]:
    """Kill one conversion up to five times, then let it finish. Gives (kills, failures)."""
    kills = bad = 0
    while True:
        before = recorded(out)
        process = subprocess.Popen(
            command(options.model, options.recipe, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        limit = rng.uniform(0.0, whole) if kills < 5 else 600.0
        if run_until(process, limit):
            if process.returncode:
                print(process.stderr.read().decode() if process.stderr else "")
            break
        kills += 1
        after = recorded(out)
        print(f"killed after {limit:.2f} s: {before} tiles before, {after} after")
        if after < before and list(out.glob("*.partial")):
            print("tiles were lost")
            bad += 1
    if process.returncode or digests(out) != expected or list(out.glob("*.partial")):
        print(f"{out.name}: the result differs")
        bad += 1
    return kills, bad


if __name__ == "__main__":
    sys.exit(main())
