"""The searching codecs on a torch device: the bytes of the numba kernels, up to ties.

`import quantkit.quantize.torch` does not import torch; `torch_codec` does.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from quantkit.errors import UsageError
from quantkit.quantize.codec import Codec, codec_of
from quantkit.types import GgmlType

# type -> module of this package that defines ENCODERS: dict[GgmlType, Encoder].
_HOMES: dict[GgmlType, str] = {
    **dict.fromkeys((GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K), "k_quants"),
    **dict.fromkeys((GgmlType.Q6_K, GgmlType.IQ4_XS), "k_quants"),
    **dict.fromkeys((GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ2_S), "i_quants"),
    **dict.fromkeys((GgmlType.IQ3_XXS, GgmlType.IQ3_S), "i_quants"),
    **dict.fromkeys((GgmlType.IQ1_S, GgmlType.IQ1_M), "i_quants"),
    **dict.fromkeys((GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1), "blocks"),
    **dict.fromkeys((GgmlType.Q8_0, GgmlType.IQ4_NL, GgmlType.MXFP4, GgmlType.NVFP4), "blocks"),
    **dict.fromkeys((GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.Q1_0, GgmlType.Q2_0), "blocks"),
}


def supported() -> frozenset[GgmlType]:
    """Types that `torch_codec` encodes on the device; others it leaves to the numba kernels."""
    return frozenset(_HOMES)


@cache
def torch_codec(type_: GgmlType, device: str) -> Codec:
    """A codec that encodes on a torch device ("cuda", "cuda:1", "cpu", ...) and decodes in numpy.

    A drop-in for `codec_of(type_)`: the same search with the same candidates, whose blocks differ
    from the kernels' only where two candidates are equal but for rounding. Rows are encoded on
    their own. F32, F16 and BF16 need no search and stay with the kernels.

    Raises `UsageError` without torch, for a device that is not there, and for a type that cannot
    be encoded.
    """
    kernels = codec_of(type_)
    if type_ not in _HOMES:
        return kernels
    try:
        run = import_module("quantkit.quantize.torch._run")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError(
            f"device {device!r} needs torch, which is not installed",
            hint="pip install 'quantkit[calibrate]', or leave the device out",
        ) from None
    encoder = import_module(f"quantkit.quantize.torch.{_HOMES[type_]}").ENCODERS[type_]
    return Codec(type_, run.on_device(encoder, type_, device), kernels.decode)
