"""ggml's own encoders and decoders, called through the shared library of libggml-python.

They are the oracle of the codec tests and the opponent of `benchmarks/codecs.py`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.types import GgmlType

_PLAIN: dict[GgmlType, np.dtype[np.floating]] = {
    GgmlType.F32: np.dtype(np.float32),
    GgmlType.F16: np.dtype(np.float16),
}


def library_path(package: str = "libggml") -> Path | None:
    """Where the `libggml-base` of an installed package lies; None without that package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    return min(root.glob("lib*/libggml-base.so*"), default=None, key=lambda p: len(p.name))


@cache
def library(package: str = "libggml") -> ctypes.CDLL:
    """The shared library with its signatures declared."""
    path = library_path(package)
    if path is None:
        raise FileNotFoundError(f"{package} brings no libggml-base")
    lib = ctypes.CDLL(str(path))
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_quantize_init.restype = None
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # f32 source
        ctypes.c_void_p,  # destination
        ctypes.c_int64,  # first weight
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # weights per row
        ctypes.c_void_p,  # importance, f32[weights per row], or null
    ]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return lib


@cache
def _prepare(type_: GgmlType, package: str) -> None:
    """Build the look-up tables that the i-quants need."""
    library(package).ggml_quantize_init(int(type_))


def ggml_encode(
    x: npt.NDArray[np.float32],
    type_: GgmlType,
    importance: npt.NDArray[np.float32] | None = None,
    package: str = "libggml",
) -> npt.NDArray[np.uint8]:
    """`x` f32[rows, cols] -> u8[rows, row_bytes] as llama-quantize would store it.

    IQ1_S, IQ2_XXS and IQ2_XS abort the process without `importance` f32[cols].
    """
    _prepare(type_, package)
    x = np.ascontiguousarray(x, np.float32)
    rows, cols = x.shape
    out = np.zeros((rows, type_.row_bytes(cols)), np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (cols,):
            raise ValueError(f"importance has shape {importance.shape}, expected ({cols},)")
    weights = None if importance is None else importance.ctypes.data
    written = library(package).ggml_quantize_chunk(
        int(type_), x.ctypes.data, out.ctypes.data, 0, rows, cols, weights
    )
    if written != out.nbytes:
        raise ValueError(f"ggml wrote {written} bytes, expected {out.nbytes}")
    return out


def ggml_decode(
    blocks: npt.NDArray[np.uint8], type_: GgmlType, package: str = "libggml"
) -> npt.NDArray[np.float32]:
    """u8[rows, row_bytes] -> f32[rows, cols]."""
    blocks = np.ascontiguousarray(blocks, np.uint8)
    if type_ in _PLAIN:
        plain: npt.NDArray[np.floating] = blocks.view(_PLAIN[type_])
        return plain.astype(np.float32)
    if type_ is GgmlType.BF16:
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    cols = blocks.shape[1] // type_.block_bytes * type_.block_size
    out = np.empty((blocks.shape[0], cols), np.float32)
    name = type_.name.lower().replace("_k", "_K")
    decode = getattr(library(package), f"dequantize_row_{name}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode.restype = None
    decode(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def ggml_valid(blocks: npt.NDArray[np.uint8], type_: GgmlType, package: str = "libggml") -> bool:
    """Whether llama.cpp would load these blocks (finite scales)."""
    blocks = np.ascontiguousarray(blocks, np.uint8)
    check = library(package).ggml_validate_row_data
    return bool(check(int(type_), blocks.ctypes.data, blocks.nbytes))
