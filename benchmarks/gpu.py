"""What a GPU does for quantkit, in one command: copies, encoders, the sweep, and Kimi K2.5's hours.

    python scripts/make_wide_layer.py /tmp/wide --experts 8
    python benchmarks/gpu.py --device cuda --layer /tmp/wide [--types Q4_K,IQ2_XXS] [--json FILE]

* copies: GB/s from and to the host, from plain and from pinned memory;
* encoders: billions of weights a second, of chunks that are on the device already (`kernel`), and
  from the host's rows to the host's blocks by `--threads` threads (`end to end`), as in `convert`;
* K2.5: hours for its 1.01e12 routed weights in each type by what was measured end to end;
* sweep: seconds for a layer of K2.5's width (`--layer`), and what `calibrate` would take of it for
  `--tokens` tokens: 61 layers of attention, 60 of a shared and of 384 routed experts, of which a
  token meets 8.

`--device cpu` runs all of it on CPU tensors, to see that it works; `--quick` takes few rows.
`benchmarks/codecs_torch.py` compares the blocks with the kernels'.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantkit.forward.matrices import Compute, Matrices
from quantkit.forward.rows import RamRows
from quantkit.forward.stream import Sequences, Stream
from quantkit.pipeline.opening import opened
from quantkit.quantize.codec import How
from quantkit.quantize.torch import _HOMES, supported, torch_codec
from quantkit.quantize.torch._run import CHUNK_CPU, CHUNK_GPU
from quantkit.quantize.torch.devices import device_of
from quantkit.types import GgmlType

COLS = 7168
ROUTED = 60 * 384 * 3 * 2048 * 7168  # weights of K2.5's routed experts
N_CTX, N_LAYERS, N_EXPERTS, N_USED = 512, 61, 384, 8


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest of the runs that fit into `seconds`, two at least, after one to warm up."""
    run()
    wait(device)
    shortest, turns, begin = float("inf"), 0, time.perf_counter()
    while turns < 2 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run()
        wait(device)
        shortest = min(shortest, time.perf_counter() - start)
        turns += 1
    return shortest


def copies(device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """GB/s of 256 MiB, by direction and kind of host memory."""
    n_bytes = (16 if args.quick else 256) << 20
    there = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    found = {}
    for kind in ("plain", "pinned") if device.type == "cuda" else ("plain",):
        here = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=kind == "pinned")
        ways = {
            "to": lambda here=here: there.copy_(here, non_blocking=True),
            "from": lambda here=here: here.copy_(there, non_blocking=True),
        }
        for way, run in ways.items():
            found[f"{way} the device, {kind}"] = n_bytes / best(run, device, args.seconds) / 1e9
    return found


def encoder(type_: GgmlType, device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """Gw/s of the search alone, and with rows and blocks on the host."""
    rng = np.random.default_rng(1)
    importance = np.exp(rng.standard_normal(COLS)).astype(np.float32)
    how = How(args.effort)
    height = (CHUNK_CPU if device.type == "cpu" else CHUNK_GPU) // COLS
    if args.quick:
        height = 4
    search = import_module(f"quantkit.quantize.torch.{_HOMES[type_]}").ENCODERS[type_]
    encode = torch_codec(type_, str(device)).encode
    tiles = [rng.standard_normal((height, COLS), np.float32) for _ in range(2 * args.threads)]
    chunk = torch.from_numpy(tiles[0]).to(device)
    with torch.inference_mode():
        alone = best(lambda: search(chunk, importance, how), device, args.seconds)
    with ThreadPoolExecutor(args.threads) as pool:
        whole = best(
            lambda: list(pool.map(lambda x: encode(x, importance, how), tiles)),
            device,
            args.seconds,
        )
    n = chunk.numel() / 1e9
    found = {"kernel": n / alone, "end to end": n * len(tiles) / whole}
    if device.type == "cuda":
        found["peak MiB"] = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
    return found


def sweep(device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """Seconds for a layer's parts with `--tokens` tokens, and for all of K2.5."""
    n_tok = args.tokens // N_CTX * N_CTX or N_CTX
    own = max(1, n_tok * N_USED // N_EXPERTS)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    with opened(args.layer, "llama.cpp") as model, torch.inference_mode():
        matrices = Matrices(model.weights, Compute(device, dtype))
        ids = np.zeros((n_tok // N_CTX, N_CTX), np.int64)
        stream = Stream(matrices, model.hyper, Sequences.of(ids), RamRows)
        h = torch.randn(min(n_tok, 4 * N_CTX), COLS)
        lengths, n_experts = [N_CTX] * (len(h) // N_CTX), model.hyper.moe.n_experts

        def attend() -> torch.Tensor:
            return stream.attention(1, h.to(device), lengths).cpu()

        def experts() -> None:
            for expert in range(n_experts):
                matrices.swiglu("blk.1.ffn", "_exps", torch.randn(own, COLS).to(device), expert)

        def shared() -> torch.Tensor:
            return matrices.swiglu("blk.1.ffn", "_shexp", h.to(device)).cpu()

        times = {
            "attention": best(attend, device, args.seconds) * n_tok / len(h),
            "routed experts": best(experts, device, args.seconds) * N_EXPERTS / n_experts,
            "shared expert": best(shared, device, args.seconds) * n_tok / len(h),
        }
    total = N_LAYERS * times["attention"] + (N_LAYERS - 1) * (
        times["routed experts"] + times["shared expert"]
    )
    return {**times, "K2.5, hours": total / 3600, "K2.5, tokens/s": n_tok / total}


def main() -> None:
    """Print what was measured and, if asked, keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layer", type=Path, help="of scripts/make_wide_layer.py")
    parser.add_argument("--types", help="comma-separated; all by default")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--threads", type=int, default=4, help="that encode")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a calibration")
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--seconds", type=float, default=2.0, help="timing of each figure")
    parser.add_argument("--quick", action="store_true", help="see that it works")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = device_of(args.device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU tensors"
    print(f"{named}, torch {torch.__version__}, {torch.get_num_threads()} threads of torch")
    kept: dict[str, object] = {"device": named, "copies": copies(device, args)}
    for name, speed in kept["copies"].items():
        print(f"copy {name}: {speed:.1f} GB/s")
    print("\n| type | kernel, Gw/s | end to end, Gw/s | K2.5, hours |\n|---|---|---|---|")
    names = args.types.split(",") if args.types else sorted(t.name for t in supported())
    for name in names:
        found = encoder(GgmlType[name], device, args)
        hours = ROUTED / found["end to end"] / 1e9 / 3600
        print(
            f"| {name} | {found['kernel']:.4f} | {found['end to end']:.4f} | {hours:.1f} |",
            flush=True,
        )
        kept[name] = found
    if args.layer:
        kept["sweep"] = sweep(device, args)
        print(f"\ncalibrating with {args.tokens:,} tokens, {args.dtype}, for one layer:")
        for name, figure in kept["sweep"].items():
            print(f"{name}: {figure:.3f}{'' if 'K2.5' in name else ' s'}")
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
