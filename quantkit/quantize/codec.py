"""The seam between a type's name and the code that encodes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import numpy as np
import numpy.typing as npt

from quantkit.errors import UsageError
from quantkit.types import GgmlType

Effort = Literal["fast", "default", "best"]
# What the encoder minimises, sum of w (x - x^)^2: "importance" takes w = the imatrix value (ones
# without an imatrix), "ggml" multiplies it by sqrt(c * mean(x^2) + x^2) as llama-quantize does,
# "blend" by the root of that for codebook types and by nothing for others.
Weighting = Literal["importance", "ggml", "blend"]
Tile = npt.NDArray[np.float32]  # [rows, cols]
Blocks = npt.NDArray[np.uint8]  # [rows, row_bytes]
Importance = npt.NDArray[np.float32]  # [cols]


@dataclass(frozen=True, slots=True)
class How:
    """How hard to search, what for, and how much of the lost energy to give back (see `gain`)."""

    effort: Effort = "default"
    weighting: Weighting = "importance"
    gain: float = 0.0


@dataclass(frozen=True, slots=True)
class Codec:
    """Encoder and decoder of one type.

    `encode(x f32[rows, cols], importance f32[cols] | None, how) -> u8[rows, row_bytes]`
    is deterministic and treats every row on its own, so tile heights and thread counts never
    show in the bytes. `decode(blocks u8[rows, row_bytes]) -> f32[rows, cols]` is exact.
    """

    type: GgmlType
    encode: Callable[[Tile, Importance | None, How], Blocks]
    decode: Callable[[Blocks], Tile]


# type -> module under quantkit.quantize.kernels that defines CODECS: tuple[Codec, ...].
# Modules are imported on first use, so that a recipe compiles only the kernels it needs.
_HOMES: dict[GgmlType, str] = {
    GgmlType.F32: "floats",
    GgmlType.F16: "floats",
    GgmlType.BF16: "floats",
    GgmlType.Q4_0: "legacy",
    GgmlType.Q4_1: "legacy",
    GgmlType.Q5_0: "legacy",
    GgmlType.Q5_1: "legacy",
    GgmlType.Q8_0: "legacy",
    GgmlType.Q2_K: "q_k",
    GgmlType.Q3_K: "q_k",
    GgmlType.Q4_K: "q_k",
    GgmlType.Q5_K: "q_k",
    GgmlType.Q6_K: "q_k",
    GgmlType.IQ4_NL: "iq4",
    GgmlType.IQ4_XS: "iq4",
    GgmlType.MXFP4: "fp4",
    GgmlType.NVFP4: "fp4",
    GgmlType.TQ1_0: "ternary",
    GgmlType.TQ2_0: "ternary",
    GgmlType.Q1_0: "ternary",
    GgmlType.Q2_0: "ternary",
    GgmlType.IQ1_S: "iq1",
    GgmlType.IQ1_M: "iq1",
    GgmlType.IQ2_XXS: "iq2",
    GgmlType.IQ2_XS: "iq2",
    GgmlType.IQ2_S: "iq2",
    GgmlType.IQ3_XXS: "iq3",
    GgmlType.IQ3_S: "iq3",
}
_LOADED: dict[GgmlType, Codec] = {}


def codec_of(type_: GgmlType) -> Codec:
    """The codec of a type, imported on first use.

    Raises `UsageError` for a type that cannot be encoded.
    """
    if type_ not in _LOADED:
        if type_ not in _HOMES:
            raise UsageError(
                f"{type_.name} cannot be encoded",
                hint=f"choose one of: {', '.join(sorted(t.name for t in _HOMES))}",
            )
        module = import_module(f"quantkit.quantize.kernels.{_HOMES[type_]}")
        for codec in module.CODECS:
            _LOADED[codec.type] = codec
    return _LOADED[type_]


def encodable() -> frozenset[GgmlType]:
    """Types that a recipe may name."""
    return frozenset(_HOMES)
