"""How fast stored weights become f32, format by format, a tile of two million weights at a time.

    python benchmarks/formats.py [--seconds 1]

One thread, CPU seconds of the process, file in the page cache. The weight is 11008 x 4096, and
its codes are random bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.packed import read_tile
from tests.builders.formats import bnb_4bit, ct_config, ct_weights, method
from tests.builders.safetensors import int4_config, write_checkpoint

ROWS, COLS, TILE, GROUP = 11008, 4096, 512, 128
X = "x.weight"
RNG = np.random.default_rng(0)


def words(dtype: str, *shape: int) -> Any:
    n_bytes = int(np.prod(shape)) * (4 if dtype == "I32" else 1)
    return dtype, shape, RNG.bytes(n_bytes)


def e4m3(*shape: int) -> Any:
    return "F8_E4M3", shape, RNG.integers(0, 127, shape, np.uint8)


def floats(dtype: str, *shape: int) -> Any:
    values = RNG.uniform(1e-3, 1e-2, shape).astype(np.float32)
    if dtype == "BF16":
        return dtype, shape, (values.view(np.uint32) >> 16).astype(np.uint16)
    return dtype, shape, values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def packed(bits: int, *, symmetric: bool = True, size: int = GROUP) -> tuple[Any, Any]:
    tensors = {
        f"{X}_packed": words("I32", ROWS, COLS * bits // 32),
        f"{X}_scale": floats("BF16", ROWS, COLS // size),
        f"{X}_shape": ("I64", (2,), np.array([ROWS, COLS])),
    }
    if not symmetric:
        tensors[f"{X}_zero_point"] = words("I32", ROWS * bits // 32, COLS // size)
    weights = ct_weights(bits, size=size, symmetric=symmetric)
    return tensors, ct_config(g=(["Linear"], weights, None))


def kimi() -> tuple[Any, Any]:
    return packed(4, size=32)[0], {"quantization_config": int4_config()}


def gptq(bits: int, *, ordered: bool = False) -> tuple[Any, Any]:
    n_groups = COLS // GROUP
    tensors = {
        "x.qweight": words("I32", COLS * bits // 32, ROWS),
        "x.qzeros": words("I32", n_groups, ROWS * bits // 32),
        "x.scales": floats("F16", n_groups, ROWS),
    }
    if ordered:
        order = (RNG.permutation(COLS) // GROUP).astype(np.int32)
        tensors["x.g_idx"] = ("I32", order.shape, order)
    return tensors, method("gptq", bits=bits, group_size=GROUP, desc_act=ordered)


def awq() -> tuple[Any, Any]:
    tensors = {
        "x.qweight": words("I32", COLS, ROWS // 8),
        "x.qzeros": words("I32", COLS // GROUP, ROWS // 8),
        "x.scales": floats("F16", COLS // GROUP, ROWS),
    }
    return tensors, method("awq", bits=4, group_size=GROUP)


def mxfp4() -> tuple[Any, Any]:
    exponents = RNG.integers(100, 126, (ROWS, COLS // 32), np.uint8)
    tensors = {
        f"{X}_packed": words("U8", ROWS, COLS // 2),
        f"{X}_scale": ("U8", exponents.shape, exponents),
    }
    return tensors, ct_config(g=(["Linear"], ct_weights(4, size=32, type="float"), None))


def nvfp4() -> tuple[Any, Any]:
    tensors = {
        X: words("U8", ROWS, COLS // 2),
        f"{X}_scale": e4m3(ROWS, COLS // 16),
        f"{X}_scale_2": floats("F32"),
    }
    return tensors, method("modelopt")


def fp8(*scale: int) -> tuple[Any, Any]:
    suffix = "_scale_inv" if scale == (ROWS // 128, COLS // 128) else "_scale"
    tensors = {X: e4m3(ROWS, COLS), f"{X}{suffix}": floats("F32", *scale)}
    return tensors, method("fp8")


def nf4() -> tuple[Any, Any]:
    n_blocks = ROWS * COLS // 64
    nested = (np.linspace(-1, 1, 256), np.full(n_blocks // 256, 0.01), 256, 0.02)
    codes = RNG.integers(0, 16, (ROWS, COLS), np.uint8)
    absmax = RNG.integers(0, 256, n_blocks, np.uint8)
    return bnb_4bit(X, codes, absmax, 64, nested=nested)[0], method("bitsandbytes")


CASES: dict[str, Any] = {
    "bf16": lambda: ({X: floats("BF16", ROWS, COLS)}, {}),
    "int4-g32 (Kimi)": kimi,
    "int4, groups of 128": lambda: packed(4),
    "int4 with zero points": lambda: packed(4, symmetric=False),
    "int8, groups of 128": lambda: packed(8),
    "int of 3 bits": lambda: packed(3),
    "fp8-block": lambda: fp8(ROWS // 128, COLS // 128),
    "fp8, one scale a row": lambda: fp8(ROWS, 1),
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "gptq, 4 bits": lambda: gptq(4),
    "gptq, 4 bits, desc_act": lambda: gptq(4, ordered=True),
    "gptq, 3 bits": lambda: gptq(3),
    "awq": awq,
    "bnb-4bit, nested": nf4,
}


def measure(case: str, seconds: float) -> float:
    """Weights a CPU second."""
    tensors, config = CASES[case]()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), {"model.safetensors": tensors}, config)
        with open_checkpoint(Path(folder)) as checkpoint:
            weight = checkpoint.weights[X]
            read_tile(checkpoint, weight, 0, TILE)
            n_tiles, begin = 0, time.process_time()
            while time.process_time() - begin < seconds:
                first = n_tiles * TILE % (ROWS - TILE)
                read_tile(checkpoint, weight, first, first + TILE)
                n_tiles += 1
            return n_tiles * TILE * COLS / (time.process_time() - begin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How fast stored weights become f32.")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", default="", help="a part of the format's name")
    arguments = parser.parse_args()
    print(f"{'format':26s} {'1e6 weights/s':>14s} {'GB/s of f32':>12s}")
    for case in filter(lambda name: arguments.only in name, CASES):
        speed = measure(case, arguments.seconds)
        print(f"{case:26s} {speed / 1e6:14.0f} {4 * speed / 1e9:12.2f}", flush=True)
