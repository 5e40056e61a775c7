"""What llama.cpp's CPU backend does to activations before a product with stored weights."""

from __future__ import annotations

import torch

from quantkit.types import GgmlType

# The type that activations are converted to, by weight type (ggml's `vec_dot_type`). Q8_1 holds
# the same values as Q8_0; its extra sums are of no concern here.
_BY_32 = frozenset(
    {
        GgmlType.Q4_0,
        GgmlType.Q4_1,
        GgmlType.Q5_0,
        GgmlType.Q5_1,
        GgmlType.Q8_0,
        GgmlType.IQ4_NL,
        GgmlType.MXFP4,
        GgmlType.NVFP4,
        GgmlType.Q1_0,
        GgmlType.Q2_0,
    }
)


def rounded(x: torch.Tensor, weight_type: GgmlType) -> torch.Tensor:
    """x f32[..., n] as the products with a weight of this type see it, f32 again."""
    if weight_type is GgmlType.F32:
        return x
    if weight_type is GgmlType.F16:
        return x.half().float()
    if weight_type is GgmlType.BF16:
        return x.bfloat16().float()
    return _q8_0(x) if weight_type in _BY_32 else _q8_k(x)


def _q8_0(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 32: d = max|x| / 127 in f16. Codes are rounded with 127 / max|x|, ties to even.

    That is what the vector code of x86 does; ggml's reference rounds ties away from zero.
    """
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    return (_codes(blocks, _over(127, largest)) * (largest / 127).half().float()).flatten(-2)


def _q8_k(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 256: the value of largest magnitude becomes -127, d in f32."""
    blocks = x.unflatten(-1, (-1, 256))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = _over(-127, extreme)
    codes = _codes(blocks, scale).clamp_max(127)
    return (codes * (1 / scale).masked_fill(~scale.isfinite(), 0)).flatten(-2)


def _codes(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Whole numbers; zeros for a block so small that its scale is infinite."""
    return torch.round(blocks * scale.masked_fill(~scale.isfinite(), 0))


def _over(number: float, x: torch.Tensor) -> torch.Tensor:
    """number / x, rounded once: torch takes `number / x` for `number * (1 / x)`."""
    return torch.full_like(x, number) / x
