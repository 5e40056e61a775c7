"""Quantise a GGUF file with llama.cpp's own quantiser, as llama-quantize does.

    python scripts/llama_quantize.py IN.gguf OUT.gguf IQ2_XXS --imatrix imatrix.gguf
        [--tensor-type PATTERN=TYPE ...]

Needs llama-cpp-python. What comes out is what quantkit's files of the same preset are compared
with. Means are made of the imatrix as llama-quantize makes them: f32 division by the count, ones
for an expert without tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
from numpy.typing import NDArray

from quantkit.calibrate.imatrix import read_imatrix
from quantkit.calibrate.statistics import Statistics
from quantkit.recipe import FILE_TYPES
from quantkit.types import GgmlType

_MAX_TEXT = 127  # bytes of a text in llama.cpp's override struct


def means(statistics: Statistics) -> dict[str, NDArray[np.float32]]:
    """What llama-quantize makes of a GGUF imatrix: f32[m * n] by weight name."""
    made = {}
    for name, sums in sorted(statistics.sums.items()):
        counts = sums.counts.astype(np.float32)[:, np.newaxis]
        mean = sums.sum2.astype(np.float32) / np.maximum(counts, 1)
        made[name] = np.where(counts > 0, mean, np.float32(1)).ravel()
    return made


def quantize(
    source: Path,
    out: Path,
    preset: str,
    imatrix: Path | None = None,
    *,
    n_threads: int = 1,
    tensor_types: Mapping[str, GgmlType] | None = None,
) -> None:
    """Write `out`; raises RuntimeError with llama.cpp's words where it fails.

    `tensor_types` overrules the preset by regular expressions searched for in a tensor's name, the
    first that is found.
    """
    params = api.llama_model_quantize_default_params()
    params.nthread, params.ftype = n_threads, FILE_TYPES[preset.upper()]
    alive: list[Any] = []  # what the parameters point to
    if tensor_types:
        params.tt_overrides = _types(tensor_types, alive)
    if imatrix is not None:
        statistics = read_imatrix(imatrix)
        params.imatrix = _entries(means(statistics), alive)
        params.kv_overrides = _overrides(imatrix, statistics)
    said: list[bytes] = []

    listen = api.llama_log_callback(lambda _level, text, _data: said.append(text))
    api.llama_log_set(listen, None)
    try:
        failed = api.llama_model_quantize(
            os.fsencode(source), os.fsencode(out), ctypes.byref(params)
        )
    finally:
        api.llama_log_set(api._logger.llama_log_callback, None)
    if failed:
        raise RuntimeError(b"".join(said[-20:]).decode(errors="replace"))


def _entries(values: dict[str, NDArray[np.float32]], alive: list[Any]) -> Any:
    entries = (api.llama_model_imatrix_data * (len(values) + 1))()  # the last one stays null
    for entry, (name, mean) in zip(entries, values.items(), strict=False):
        data = np.ascontiguousarray(mean)
        alive.append(data)
        entry.name = name.encode()
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = data.size
    alive.append(entries)
    return entries


def _types(tensor_types: Mapping[str, GgmlType], alive: list[Any]) -> Any:
    types = (api.llama_model_tensor_override * (len(tensor_types) + 1))()  # the last stays null
    for override, (pattern, wanted) in zip(types, tensor_types.items(), strict=False):
        override.pattern, override.type = pattern.encode(), wanted
    alive.append(types)
    return types


def _overrides(imatrix: Path, statistics: Statistics) -> Any:
    """The metadata that llama-quantize leaves about its imatrix."""
    texts = {"quantize.imatrix.file": str(imatrix)}
    if statistics.datasets:
        texts["quantize.imatrix.dataset"] = statistics.datasets[0]
    numbers = {"quantize.imatrix.entries_count": len(statistics.sums)}
    if statistics.n_chunks:
        numbers["quantize.imatrix.chunks_count"] = statistics.n_chunks
    overrides = (api.llama_model_kv_override * (len(texts) + len(numbers) + 1))()
    for override, (key, value) in zip(overrides, (texts | numbers).items(), strict=False):
        override.key = key.encode()
        if isinstance(value, int):
            override.tag, override.value.val_i64 = api.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            override.tag = api.LLAMA_KV_OVERRIDE_TYPE_STR
            override.value.val_str = value.encode()[:_MAX_TEXT]
    return overrides


def _tensor_type(text: str) -> tuple[str, GgmlType]:
    pattern, _, name = text.rpartition("=")
    if not pattern or name.upper() not in GgmlType.__members__:
        raise argparse.ArgumentTypeError(f"{text!r} is no PATTERN=TYPE")
    return pattern, GgmlType[name.upper()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("preset", choices=FILE_TYPES, type=str.upper)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument(
        "--tensor-type", type=_tensor_type, action="append", default=[], metavar="PATTERN=TYPE"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    quantize(
        args.source,
        args.out,
        args.preset,
        args.imatrix,
        n_threads=args.threads,
        tensor_types=dict(args.tensor_type),
    )
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
