"""Codes into bytes. All functions take one block per row and give u8[blocks, bytes]."""

from __future__ import annotations

import torch

from quantkit.quantize.torch._ops import Tensor


def f16_bytes(d: Tensor) -> Tensor:
    """f32[blocks] that f16 holds exactly -> u8[blocks, 2]."""
    return d.reshape(-1, 1).half().view(torch.uint8)


def fold(codes: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """Codes u8[blocks, n] seen as [blocks, *shape]: code k of dimension -2 at bit k * bits.

    What lies in the last dimension goes to neighbouring bytes.
    """
    fields = codes.reshape(len(codes), *shape)
    packed = fields[..., 0, :]
    for k in range(1, shape[-2]):
        packed = packed | fields[..., k, :] << (bits * k)
    return packed.reshape(len(codes), -1)


def gather_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes u8[blocks, n] of `bits` bits, neighbours in one byte, low bits first."""
    per = 8 // bits
    packed = codes[:, ::per]
    for k in range(1, per):
        packed = packed | codes[:, k::per] << (bits * k)
    return packed


def words(values: Tensor, n_bytes: int) -> Tensor:
    """Little-endian integers i64[blocks, n] -> u8[blocks, n * n_bytes]."""
    parts = [values >> (8 * k) & 255 for k in range(n_bytes)]
    return torch.stack(parts, -1).to(torch.uint8).reshape(len(values), -1)
