"""Peak anonymous memory of a conversion, sampled from /proc: what `RssAnon` reached.

python benchmarks/memory.py MODEL --recipe q4_x [--threads 2] [--rounding feedback ...]

What it does not know goes to `quantkit convert`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def rss_anon(pid: int) -> int:
    """Anonymous resident bytes of a process; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="q4_x")
    parser.add_argument("--threads", default="2")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=options.model.resolve().parent) as out:
        start = time.monotonic()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "quantkit", "convert", str(options.model)),
                *("--recipe", options.recipe, "-o", out, "--threads", options.threads, "--quiet"),
                *more,
            ]
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, rss_anon(process.pid))
            time.sleep(0.005)
        seconds = time.monotonic() - start
        n_bytes = sum(path.stat().st_size for path in Path(out).glob("*.gguf"))
    print(
        f"{options.model.name} {options.recipe}: exit {process.returncode}, "
        f"peak RssAnon {peak / 2**20:,.0f} MiB, {n_bytes / 1e9:.2f} GB in {seconds:.1f} s"
    )
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
