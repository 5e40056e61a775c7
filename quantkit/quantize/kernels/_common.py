"""What every kernel shares: the one way to compile, f16 conversion, and the choice of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from quantkit.types import GgmlType

F = TypeVar("F", bound=Callable[..., Any])

# Ids of `Weighting` for the inside of kernels.
IMPORTANCE = 0
GGML = 1
BLEND = 2
WEIGHTINGS = {"importance": IMPORTANCE, "ggml": GGML, "blend": BLEND}


def _helper_digest() -> str:
    sources = sorted(Path(__file__).parent.glob("_*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


# numba finds cached code by a function's name and the age of its own file, but a kernel contains
# the helpers of other files too; so their digest becomes part of its name.
_HELPERS = _helper_digest()


def kernel(function: F) -> F:
    """Compile a kernel: cached on disk, without the GIL, IEEE semantics kept.

    No fastmath: it would reorder sums, so that bytes depend on the machine, and drop NaN checks.
    """
    function.__qualname__ = f"{function.__qualname__}_{_HELPERS}"
    return nb.njit(cache=True, nogil=True, fastmath=False, error_model="numpy")(function)  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def f16_bits(typingctx: Any, value: Any) -> Any:
    """f32 -> bits of the nearest f16 as uint16, ties to even (the F16C instruction)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return nb.uint16(nb.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def f16_value(typingctx: Any, bits: Any) -> Any:
    """Bits of an f16 (uint16) -> f32, exact."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return nb.float32(nb.uint16), codegen


def helper(function: F) -> F:
    """Compile a function that only kernels call: it becomes part of their cached code."""
    return nb.njit(
        nogil=True,
        fastmath=False,
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
    )(function)  # type: ignore[no-any-return]


def inlined(function: F) -> F:
    """Compile a function into its callers: for what is called too often to pass arguments."""
    return nb.njit(
        nogil=True,
        fastmath=False,
        error_model="numpy",
        forceinline=True,
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
    )(function)  # type: ignore[no-any-return]


def prepared(x: np.ndarray, type_: GgmlType) -> tuple[np.ndarray, np.ndarray]:
    """`x` f32[rows, cols] as kernels need it, contiguous, and room for its blocks."""
    out = np.empty((x.shape[0], type_.row_bytes(x.shape[1])), np.uint8)
    return np.ascontiguousarray(x, np.float32), out


def read_f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 at byte `at` of every block, f32[blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
