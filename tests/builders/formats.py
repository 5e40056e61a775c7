"""Weights in the formats that checkpoints are published in, packed bit by bit with numpy alone.

Each builder takes codes and scales and gives the stored tensors of `name` (`X.weight`), and the
weights that they mean by the format's published formula, in f32 with the roundings that it names.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.builders.safetensors import Tensor, f32

Tensors = dict[str, Tensor]
Array = np.ndarray[Any, Any]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight that nibble k of a word holds
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([FP4, -FP4])


def pack_bits(codes: Any, bits: int) -> Array:
    """Codes [..., n] one after the other from the lowest bit on, as u32[..., ceil(n bits / 32)]."""
    codes = np.asarray(codes)
    each = (codes[..., None] >> np.arange(bits)) & 1
    flat = each.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    n_missing = -flat.shape[-1] % 32
    flat = np.concatenate([flat, np.zeros((*flat.shape[:-1], n_missing), np.uint8)], axis=-1)
    return np.packbits(flat, axis=-1, bitorder="little").view(np.uint32)


def pack_pairs(codes: Any) -> Array:
    """Nibbles [..., n] as bytes [..., n / 2], the first of two in the low half."""
    codes = np.asarray(codes, np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def i32(words: Any) -> Tensor:
    """An I32 tensor of words given as u32 or integers."""
    array = np.asarray(words)
    return "I32", array.shape, array.astype(np.uint32 if (array >= 0).all() else np.int32)


def spread(per_group: Any, n_cols: int, g_idx: Any = None) -> Array:
    """Values per group [rows, groups] to [rows, cols]."""
    per_group = np.asarray(per_group)
    size = -(-n_cols // per_group.shape[-1])
    return per_group[..., np.arange(n_cols) // size if g_idx is None else np.asarray(g_idx)]


def packed_integers(
    name: str, codes: Any, scale: Any, bits: int, zero: Any = None, g_idx: Any = None
) -> tuple[Tensors, Array]:
    """compressed-tensors pack-quantized; codes and zeros are 0 .. 2^bits - 1, scales F32."""
    codes, scale = np.asarray(codes), np.asarray(scale, np.float32)
    tensors = {
        f"{name}_packed": i32(pack_bits(codes, bits)),
        f"{name}_scale": f32(scale),
        f"{name}_shape": ("I64", (codes.ndim,), np.array(codes.shape, np.int64)),
    }
    if zero is not None:
        down = np.swapaxes(pack_bits(np.swapaxes(zero, -1, -2), bits), -1, -2)
        tensors[f"{name}_zero_point"] = i32(down)
    if g_idx is not None:
        tensors[f"{name}_g_idx"] = i32(np.asarray(g_idx))
    rows = (*codes.shape[:-1], -1)
    n_cols = codes.shape[-1]
    per_row = (*codes.shape[:-1], 1)
    scales = np.broadcast_to(scale, per_row) if scale.size == 1 else scale.reshape(rows)
    zeros = np.full(scales.shape, 1 << bits - 1) if zero is None else np.asarray(zero)
    levels = (codes - spread(zeros, n_cols, g_idx)).astype(np.float32)
    return tensors, levels * spread(scales, n_cols, g_idx)


def gptq(
    name: str, codes: Any, zero: Any, scale: Any, bits: int, *, v2: bool = False, g_idx: Any = None
) -> tuple[Tensors, Array]:
    """GPTQ of codes [out, in], zeros and scales [out, groups]; zeros above 0 unless v2."""
    base = name.removesuffix("weight")
    codes, zero, scale = np.asarray(codes), np.asarray(zero), np.asarray(scale, np.float16)
    stored_zero = zero if v2 else zero - 1
    tensors = {
        f"{base}qweight": i32(pack_bits(codes, bits).T),
        f"{base}qzeros": i32(pack_bits(stored_zero.T, bits)),
        f"{base}scales": ("F16", scale.T.shape, scale.T),
    }
    if g_idx is not None:
        tensors[f"{base}g_idx"] = i32(np.asarray(g_idx))
    n_cols = codes.shape[1]
    levels = (codes - spread(zero, n_cols, g_idx)).astype(np.float32)
    return tensors, levels * spread(scale.astype(np.float32), n_cols, g_idx)


def awq(name: str, codes: Any, zero: Any, scale: Any) -> tuple[Tensors, Array]:
    """AWQ gemm of codes [out, in] of 4 bits, zeros and scales [out, groups]."""
    base = name.removesuffix("weight")
    codes, zero, scale = np.asarray(codes), np.asarray(zero), np.asarray(scale, np.float16)

    def pack(across: Array) -> Array:
        eights = across.reshape(across.shape[0], -1, 8)[..., list(AWQ_ORDER)]
        return pack_bits(eights.reshape(across.shape), 4)

    tensors = {
        f"{base}qweight": i32(pack(codes.T)),
        f"{base}qzeros": i32(pack(zero.T)),
        f"{base}scales": ("F16", scale.T.shape, scale.T),
    }
    n_cols = codes.shape[1]
    levels = (codes - spread(zero, n_cols)).astype(np.float32)
    return tensors, levels * spread(scale.astype(np.float32), n_cols)


def mxfp4(name: str, codes: Any, exponents: Any) -> tuple[Tensors, Array]:
    """compressed-tensors mxfp4-pack-quantized: E2M1 codes [..., cols], exponents [..., cols/32]."""
    packed, exponents = pack_pairs(codes), np.asarray(exponents, np.uint8)
    tensors: Tensors = {
        f"{name}_packed": ("U8", packed.shape, packed),
        f"{name}_scale": ("U8", exponents.shape, exponents),
    }
    return tensors, _e2m1(codes, np.ldexp(np.float32(1), exponents.astype(int) - 127))


def mxfp4_blocks(name: str, codes: Any, exponents: Any) -> tuple[Tensors, Array]:
    """gpt-oss's experts: the same bytes as blocks [experts, rows, groups, 16]."""
    tensors, values = mxfp4(name, codes, exponents)
    _, shape, packed = tensors[f"{name}_packed"]
    blocks = packed.reshape(*shape[:-1], -1, 16)
    stored: Tensors = {
        f"{name}_blocks": ("U8", blocks.shape, blocks),
        f"{name}_scales": tensors[f"{name}_scale"],
    }
    return stored, values


def nvfp4(
    name: str, codes: Any, scale_codes: Any, factor: float, *, modelopt: bool = False
) -> tuple[Tensors, Array]:
    """NVFP4 of E2M1 codes [..., cols] and F8_E4M3 scale codes [..., cols / 16]."""
    packed, scale_codes = pack_pairs(codes), np.asarray(scale_codes, np.uint8)
    scale: Tensor = ("F8_E4M3", scale_codes.shape, scale_codes)
    tensors: Tensors
    if modelopt:
        tensors = {
            name: ("U8", packed.shape, packed),
            f"{name}_scale": scale,
            f"{name}_scale_2": ("F32", (), np.float32(factor)),
        }
        scales = e4m3(scale_codes) * np.float32(factor)
    else:
        tensors = {
            f"{name}_packed": ("U8", packed.shape, packed),
            f"{name}_scale": scale,
            f"{name}_global_scale": f32([factor]),
        }
        scales = e4m3(scale_codes) / np.float32(factor)
    return tensors, _e2m1(codes, scales)


def _e2m1(codes: Any, scales: Array) -> Array:
    return E2M1[np.asarray(codes)] * spread(scales, np.asarray(codes).shape[-1])


def e4m3(codes: Any) -> Array:
    """Values of F8_E4M3 codes, none of them NaN."""
    codes = np.asarray(codes).astype(int)
    exponent, fraction = codes >> 3 & 15, codes & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, fraction / 8 * 2.0**-6, normal)
    return np.where(codes < 128, values, -values).astype(np.float32)


def fp8(name: str, codes: Any, scale: Any, suffix: str = "_scale") -> tuple[Tensors, Array]:
    """F8_E4M3 codes with F32 multipliers that broadcast over them."""
    codes, scale = np.asarray(codes, np.uint8), np.asarray(scale, np.float32)
    tensors: Tensors = {
        name: ("F8_E4M3", codes.shape, codes),
        f"{name}{suffix}": ("F32", scale.shape, scale),
    }
    return tensors, e4m3(codes) * scale


def bnb_4bit(
    name: str, codes: Any, absmax: Any, block: int, kind: str = "nf4", nested: Any = None
) -> tuple[Tensors, Array]:
    """bitsandbytes NF4 or FP4 of codes [rows, cols].

    `absmax` f32 per block; with `nested` = (levels f32[256], scale f32, block, offset) codes u8.
    """
    codes = np.asarray(codes, np.uint8)
    flat = np.concatenate([codes.ravel(), np.zeros(codes.size % 2, np.uint8)])
    packed = (flat[0::2] << 4 | flat[1::2])[:, None]
    levels = {"nf4": NF4, "fp4": FP4}[kind]
    state: dict[str, Any] = {
        "quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(codes.shape)
    }  # fmt: skip
    tensors: Tensors = {name: ("U8", packed.shape, packed), f"{name}.quant_map": f32(levels)}
    if nested is None:
        scales = np.asarray(absmax, np.float32)
        tensors[f"{name}.absmax"] = f32(scales)
    else:
        inner, outer, inner_block, offset = nested
        absmax = np.asarray(absmax, np.uint8)
        tensors[f"{name}.absmax"] = ("U8", absmax.shape, absmax)
        tensors[f"{name}.nested_absmax"] = f32(outer)
        tensors[f"{name}.nested_quant_map"] = f32(inner)
        state |= {
            "nested_blocksize": inner_block, "nested_dtype": "float32", "nested_offset": offset
        }  # fmt: skip
        each = np.repeat(np.asarray(outer, np.float32), inner_block)[: absmax.size]
        scales = np.asarray(inner, np.float32)[absmax] * each + np.float32(offset)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = ("U8", text.shape, text)
    values = levels[codes.ravel()] * np.repeat(scales, block)[: codes.size]
    return tensors, values.reshape(codes.shape)


def bnb_int8(name: str, codes: Any, scale: Any) -> tuple[Tensors, Array]:
    """LLM.int8: codes -127 .. 127 [rows, cols], the largest magnitude of each row."""
    codes, scale = np.asarray(codes, np.int8), np.asarray(scale, np.float32)
    tensors: Tensors = {
        name: ("I8", codes.shape, codes),
        f"{name.removesuffix('weight')}SCB": f32(scale),
        f"{name}_format": ("U8", (), np.uint8(0)),
    }
    return tensors, codes.astype(np.float32) * scale[:, None] * np.float32(7.874015718698502e-3)


def ct_config(**groups: Any) -> dict[str, Any]:
    """A config.json of compressed-tensors: `group=(targets, weights, format)` for each group."""
    listed = {
        key: {"targets": targets, "weights": weights, "format": format_}
        for key, (targets, weights, format_) in groups.items()
    }
    scheme = {"quant_method": "compressed-tensors", "config_groups": listed}
    return {"quantization_config": {**scheme, "format": "mixed-precision", "ignore": ["lm_head"]}}


def ct_weights(bits: int, strategy: str = "group", size: int | None = None, **more: Any) -> Any:
    """`weights` of a config group."""
    known = {"type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    return {**known, "num_bits": bits, "strategy": strategy, "group_size": size, **more}


def method(name: str, **members: Any) -> dict[str, Any]:
    """A config.json with a quantization_config of another method."""
    return {"quantization_config": {"quant_method": name, **members}}
