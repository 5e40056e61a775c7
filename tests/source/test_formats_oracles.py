"""Expanded weights against the libraries that define the formats, bit for bit.

Where a library computes in BF16, its own dequantisation is called with f32 in its place, so that
it rounds where the formula does and nowhere else. `bitsandbytes.safetensors` holds weights that
bitsandbytes 0.50.2 quantised on a CPU, and its own f32 dequantisation of each (`want.NAME`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.packed import read_tile
from tests.builders import formats as build
from tests.builders.safetensors import write_checkpoint

W = "x.weight"
RNG = np.random.default_rng(11)
GOLDEN = Path(__file__).parent / "bitsandbytes.safetensors"


def expanded(folder, tensors, config, name=W):
    """The whole weight by quantkit, and the stored tensors as torch reads them."""
    write_checkpoint(folder, {"model.safetensors": tensors}, config)
    with open_checkpoint(folder) as checkpoint:
        weight = checkpoint.weights[name]
        tile = read_tile(checkpoint, weight, 0, weight.n_rows).reshape(weight.shape)
    stored = load_file(folder / "model.safetensors")
    return tile, {key.removeprefix("x."): value for key, value in stored.items()}


def same_bits(ours, theirs):
    theirs = theirs.float().numpy()
    return ours.shape == theirs.shape and (ours.view(np.uint32) == theirs.view(np.uint32)).all()


def decompressed(format_, parts, arguments):
    """compressed-tensors' own decompression; f32 wherever the scales are."""
    known = {k: v for k, v in arguments.items() if v is not None}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**known))
    return BaseCompressor.get_value_from_registry(format_).decompress(parts, scheme)["weight"]


SCALES = {"group": 3, "channel": 1, "tensor": None}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("strategy", "asymmetric"),
    [("group", False), ("group", True), ("channel", False), ("channel", True), ("tensor", False)],
)
def test_packed_integers_are_those_of_compressed_tensors(bits, strategy, asymmetric, tmp_path):
    shape = (70, SCALES[strategy]) if SCALES[strategy] else (1,)
    codes = RNG.integers(0, 1 << bits, (70, 192))
    scale = RNG.normal(size=shape) * 2.0 ** RNG.integers(-20, 20, shape)
    zero = RNG.integers(0, 1 << bits, shape) if asymmetric else None
    tensors, _ = build.packed_integers(W, codes, scale, bits, zero)
    size = 64 if strategy == "group" else None
    arguments = build.ct_weights(bits, strategy, size, symmetric=not asymmetric)
    config = build.ct_config(g=(["Linear"], arguments, "pack-quantized"))
    ours, parts = expanded(tmp_path, tensors, config)
    assert same_bits(ours, decompressed("pack-quantized", parts, arguments))


@pytest.mark.parametrize("strategy", SCALES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_plain_integers_are_those_of_compressed_tensors(strategy, asymmetric, tmp_path):
    shape = (70, SCALES[strategy]) if SCALES[strategy] else (1,)
    scale = RNG.normal(size=shape).astype(np.float32)
    tensors = {
        W: ("I8", (70, 192), RNG.integers(-128, 128, (70, 192), np.int8)),
        f"{W}_scale": ("F32", shape, scale),
    }
    if asymmetric:
        tensors[f"{W}_zero_point"] = ("I8", shape, RNG.integers(-128, 128, shape, np.int8))
    size = 64 if strategy == "group" else None
    arguments = build.ct_weights(8, strategy, size, symmetric=not asymmetric)
    config = build.ct_config(g=(["Linear"], arguments, "int-quantized"))
    ours, parts = expanded(tmp_path, tensors, config)
    assert same_bits(ours, decompressed("int-quantized", parts, arguments))


def sound_fp8(*shape):
    return RNG.integers(0, 127, shape, np.uint8) | RNG.integers(0, 2, shape, np.uint8) << 7


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"strategy": "channel"}, (130, 1)),
        ({"strategy": "tensor"}, (1,)),
        ({"strategy": "block", "block_structure": [128, 64]}, (2, 3)),
    ],
)
def test_fp8_is_that_of_compressed_tensors(arguments, shape, tmp_path):
    scale = RNG.normal(size=shape).astype(np.float32)
    tensors = {
        W: ("F8_E4M3", (130, 192), sound_fp8(130, 192)),
        f"{W}_scale": ("F32", shape, scale),
    }
    arguments = build.ct_weights(8, type="float", **arguments)
    config = build.ct_config(g=(["Linear"], arguments, "float-quantized"))
    ours, parts = expanded(tmp_path, tensors, config)
    assert same_bits(ours, decompressed("float-quantized", parts, arguments))


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_mxfp8_is_that_of_compressed_tensors(dtype, tmp_path):
    exponents = RNG.integers(30, 200, (40, 3), np.uint8)
    tensors = {
        W: ("F8_E4M3", (40, 96), sound_fp8(40, 96)),
        f"{W}_scale": (dtype, exponents.shape, exponents),
    }
    arguments = build.ct_weights(8, size=32, type="float")
    config = build.ct_config(g=(["Linear"], arguments, "mxfp8-quantized"))
    ours, parts = expanded(tmp_path, tensors, config)
    parts["weight_scale"] = torch.from_numpy(exponents)
    assert same_bits(ours, decompressed("mxfp8-quantized", parts, arguments))


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (3, 256, 128)])
def test_fp8_blocks_are_those_of_transformers(shape, tmp_path):
    *lead, n_rows, n_cols = shape
    scale_shape = (*lead, n_rows // 128, n_cols // 128)
    scale = RNG.normal(size=scale_shape).astype(np.float32)
    tensors = {
        W: ("F8_E4M3", shape, sound_fp8(*shape)),
        f"{W}_scale_inv": ("F32", scale_shape, scale),
    }
    ours, parts = expanded(tmp_path, tensors, build.method("fp8", weight_block_size=[128, 128]))
    theirs = Fp8Dequantize(None)._dequantize_one(
        parts["weight"], parts["weight_scale_inv"], torch.float32
    )
    assert same_bits(ours, theirs)


def test_mxfp4_is_that_of_compressed_tensors(tmp_path):
    exponents = RNG.integers(3, 126 + 126, (40, 3), np.uint8)
    tensors, _ = build.mxfp4(W, RNG.integers(0, 16, (40, 96)), exponents)
    arguments = build.ct_weights(4, size=32, type="float")
    config = build.ct_config(g=(["Linear"], arguments, "mxfp4-pack-quantized"))
    ours, parts = expanded(tmp_path, tensors, config)
    assert same_bits(ours, decompressed("mxfp4-pack-quantized", parts, arguments))


def test_mxfp4_of_gpt_oss_is_that_of_transformers(tmp_path):
    """Transformers gives the experts the other way round, inputs first."""
    codes, exponents = RNG.integers(0, 16, (3, 24, 96)), RNG.integers(60, 180, (3, 24, 3))
    tensors, _ = build.mxfp4_blocks("x.gate_up_proj", codes, exponents)
    ours, parts = expanded(tmp_path, tensors, build.method("mxfp4"), "x.gate_up_proj")
    theirs = convert_moe_packed_tensors(
        parts["gate_up_proj_blocks"], parts["gate_up_proj_scales"], dtype=torch.float32
    )
    assert same_bits(ours, theirs.transpose(1, 2).contiguous())


def test_nvfp4_is_that_of_compressed_tensors(tmp_path):
    codes, scale = RNG.integers(0, 16, (40, 96)), RNG.integers(1, 127, (40, 6))
    tensors, _ = build.nvfp4(W, codes, scale, 2688.0 / 0.173)
    arguments = build.ct_weights(4, "tensor_group", 16, type="float")
    config = build.ct_config(g=(["Linear"], arguments, "nvfp4-pack-quantized"))
    ours, parts = expanded(tmp_path, tensors, config)
    known = {k: v for k, v in arguments.items() if v is not None}
    theirs = dequantize(
        x_q=unpack_fp4_from_uint8(parts["weight_packed"], 40, 96, torch.float32),
        scale=parts["weight_scale"].float(),
        args=QuantizationArgs(**known),
        global_scale=parts["weight_global_scale"],
        dtype=torch.float32,
    )
    assert same_bits(ours, theirs)


def test_weights_of_bitsandbytes_are_dequantised_as_it_does(tmp_path):
    write_checkpoint(tmp_path, {}, build.method("bitsandbytes"), index=False)
    (tmp_path / "model.safetensors").write_bytes(GOLDEN.read_bytes())
    with open_checkpoint(tmp_path) as checkpoint:
        named = {n: w for n, w in checkpoint.weights.items() if not n.startswith("want.")}
        assert sorted({w.format.value for w in named.values()}) == ["bnb-4bit", "int8"]
        for name, weight in named.items():
            ours = read_tile(checkpoint, weight, 0, weight.n_rows)
            want = checkpoint.weights[f"want.{name}"]
            theirs = read_tile(checkpoint, want, 0, want.n_rows)
            assert (ours.view(np.uint32) == theirs.view(np.uint32)).all(), name
