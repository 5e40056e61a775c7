"""Speed and peak memory of a calibration: tokens a second, and what RSS and `RssAnon` reached.

    python benchmarks/calibrate.py MODEL [--tokens 8192] [--corpus core] [--threads 2] [--dtype f32]

Without `--corpus` the tokens are random, so that a checkpoint without a usable tokenizer can be
measured. The run is a process of its own, and its files go to a temporary folder (`--scratch`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantkit.text.tokens import TokenSet


def resident(pid: int) -> dict[str, int]:
    """`VmHWM` (peak) and `RssAnon` (now) of a process, bytes; empty once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return {}
    found = re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", status)
    return {name: int(kb) * 1024 for name, kb in found}


def random_tokens(model: Path, n_tokens: int, path: Path) -> None:
    """Uniform token ids of the model's vocabulary."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    n_vocab = config.get("text_config", config)["vocab_size"]
    ids = np.random.default_rng(0).integers(0, n_vocab, n_tokens).astype(np.int32)
    start = np.zeros(1, np.int64)
    TokenSet(ids, start, {"random": n_tokens}, "random", n_vocab, "", "").save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--corpus")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        result = Path(folder, "m.imatrix.gguf")
        if options.corpus is None:
            saved = Path(folder, "random.safetensors")
            random_tokens(options.model, options.tokens, saved)
            text = ["--corpus", str(saved)]
        else:
            text = ["--corpus", options.corpus, "--budget", str(options.tokens)]
        start = time.monotonic()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "quantkit", "calibrate", str(options.model), "--quiet"),
                *(*text, "-o", str(result), "--threads", options.threads),
                *("--dtype", options.dtype),
            ]
        )
        peaks = {"VmHWM": 0, "RssAnon": 0}
        while process.poll() is None:
            for name, n_bytes in resident(process.pid).items():
                peaks[name] = max(peaks[name], n_bytes)
            time.sleep(0.01)
        seconds = time.monotonic() - start
        n_bytes = result.stat().st_size if result.exists() else 0
    print(
        f"{options.model.name}: exit {process.returncode}, {options.tokens} tokens in"
        f" {seconds:.1f} s ({options.tokens / seconds:.1f}/s), peak VmHWM"
        f" {peaks['VmHWM'] / 2**20:,.0f} MiB, RssAnon {peaks['RssAnon'] / 2**20:,.0f} MiB,"
        f" imatrix {n_bytes / 1e6:.1f} MB"
    )
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
