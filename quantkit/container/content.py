"""Which blocks hold a NaN or an infinity: the checks of llama.cpp's --check-tensors.

Weights of the plain float types are looked at themselves, quantized blocks through their scales;
the codes inside a block cannot be wrong on their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.types import GgmlType

# Byte offsets of the f16 scales (d, dmin or m) inside a block.
_F16_SCALES: dict[GgmlType, tuple[int, ...]] = {
    GgmlType.F16: (0,),
    GgmlType.Q1_0: (0,),
    GgmlType.Q2_0: (0,),
    GgmlType.Q4_0: (0,),
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q5_0: (0,),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q8_0: (0,),
    GgmlType.Q2_K: (80, 82),
    GgmlType.Q3_K: (108,),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208,),
    GgmlType.IQ1_S: (0,),
    GgmlType.IQ2_XXS: (0,),
    GgmlType.IQ2_XS: (0,),
    GgmlType.IQ2_S: (0,),
    GgmlType.IQ3_XXS: (0,),
    GgmlType.IQ3_S: (0,),
    GgmlType.IQ4_NL: (0,),
    GgmlType.IQ4_XS: (0,),
    GgmlType.TQ1_0: (52,),
    GgmlType.TQ2_0: (64,),
}
_F16_EXPONENT = np.uint16(0x7C00)
_BF16_EXPONENT = np.uint16(0x7F80)
_F32_EXPONENT = np.uint32(0x7F800000)
_IQ1_M_SCALES = 48

Bytes = bytes | bytearray | memoryview
_Bad = npt.NDArray[np.bool_]


def first_nonfinite(type_: GgmlType, data: Bytes) -> int | None:
    """Index of the first block in `data` (whole blocks) that holds NaN or infinity.

    None if all are finite. A plain float is a block of one. MXFP4's scale has one code for NaN;
    NVFP4's scales and integers are finite whatever the bits. F64 counts as infinite where it
    overflows f32, because that is what it is read as.
    """
    bad = _nonfinite(type_, data)
    if bad is None or not bad.any():
        return None
    return int(bad.argmax())


def _nonfinite(type_: GgmlType, data: Bytes) -> _Bad | None:
    n = len(data) // type_.block_bytes
    step = type_.block_bytes

    def column(dtype: str, offset: int) -> npt.NDArray[Any]:
        # One field of every block, in place; blocks need not be aligned.
        return np.ndarray((n,), dtype, data, offset, (step,)) if n else np.empty(0, dtype)

    bad: _Bad | None = None
    if type_ in _F16_SCALES:
        for offset in _F16_SCALES[type_]:
            here = (column("<u2", offset) & _F16_EXPONENT) == _F16_EXPONENT
            bad = here if bad is None else bad | here
    elif type_ is GgmlType.F32:
        bad = (column("<u4", 0) & _F32_EXPONENT) == _F32_EXPONENT
    elif type_ is GgmlType.BF16:
        bad = (column("<u2", 0) & _BF16_EXPONENT) == _BF16_EXPONENT
    elif type_ is GgmlType.F64:
        with np.errstate(over="ignore", invalid="ignore"):  # signalling NaN
            bad = ~np.isfinite(column("<f8", 0).astype(np.float32))
    elif type_ is GgmlType.MXFP4:
        bad = column("u1", 0) == 0xFF
    elif type_ is GgmlType.IQ1_M:
        # d's nibbles 0 to 3 are the top ones of four u16s; its exponent is in nibbles 2 and 3.
        s2, s3 = (column("<u2", _IQ1_M_SCALES + 2 * i) for i in (2, 3))
        bad = ((s2 & 0xC000) == 0xC000) & ((s3 & 0x7000) == 0x7000)
    return bad
