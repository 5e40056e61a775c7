"""Tiles of stored weights against the decoders of compressed-tensors, torch and gguf."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from subprocess import run

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from quantkit.errors import NonFiniteError, SourceError
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.packed import read_tile, repack
from tests.builders.safetensors import bf16, bf16_bits, f32, int4, int4_config, write_checkpoint
from tests.source import naive
from tests.source.test_checkpoint import FIXTURE

W = "w.weight"
NAN, INF = float("nan"), float("inf")
RNG = np.random.default_rng(7)
INT4 = {"quantization_config": int4_config()}
SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True),
)


def checkpoint_of(tmp_path, tensors, config=INT4):
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    return open_checkpoint(tmp_path)


def whole(checkpoint, name=W):
    weight = checkpoint.weights[name]
    return read_tile(checkpoint, weight, 0, weight.n_rows)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


def levels_and_scales(rows, cols, exponents=(-17, 15)):
    """Random levels, all sixteen of them, and random BF16 scales of either sign."""
    levels = RNG.integers(-8, 8, (rows, cols))
    scale = RNG.uniform(1, 2, (rows, cols // 32)) * 2.0 ** RNG.integers(
        *exponents, (rows, cols // 32)
    )
    return levels, (scale * RNG.choice([-1, 1], scale.shape)).astype(np.float32)


def compressed_tensors_tile(folder, name):
    """f32 by the reference decoder; its products stay f32 because the scale is."""
    stored = load_file(folder / "model.safetensors")
    parts = {key.removeprefix(name + "."): value for key, value in stored.items()}
    parts = {key: parts[key] for key in ("weight_packed", "weight_scale", "weight_shape")}
    parts["weight_scale"] = parts["weight_scale"].float()
    return PackedQuantizationCompressor.decompress(parts, SCHEME)["weight"].numpy()


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (17, 256), (130, 7168 // 8)])
@pytest.mark.parametrize("exponents", [(-17, 15), (-126, 120)])
def test_int4_equals_compressed_tensors_bit_for_bit(shape, exponents, tmp_path):
    tensors = int4("x.weight", *levels_and_scales(*shape, exponents))
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        tile = whole(checkpoint, "x.weight")
    assert tile.dtype == np.float32
    assert (bits(tile) == bits(compressed_tensors_tile(tmp_path, "x"))).all()


def test_int4_equals_its_plain_twin(tmp_path):
    levels, scale = levels_and_scales(5, 96)
    tensors = int4(W, levels, scale)
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        tile = whole(checkpoint)
    assert (tile == naive.int4_tile(tensors[f"{W}_packed"][2], bf16_bits(scale))).all()
    assert (tile == levels * np.repeat(naive_scales(scale), 32, axis=1)).all()


def naive_scales(scale):
    return np.vectorize(naive.bf16_value, otypes=[np.float32])(bf16_bits(scale))


def test_stacked_int4_experts_are_rows_one_after_the_other(tmp_path):
    levels = RNG.integers(-8, 8, (3, 4, 64))
    scale = RNG.uniform(0.5, 1, (3, 4, 2))
    with checkpoint_of(tmp_path, int4(W, levels, scale, "I64")) as checkpoint:
        tile = whole(checkpoint)
    expected = naive.int4_tile(
        int4(W, levels, scale)[f"{W}_packed"][2].reshape(12, -1), bf16_bits(scale).reshape(12, -1)
    )
    assert (tile == expected).all()


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_int4_scales_may_be_wider_than_bf16(dtype, tmp_path):
    levels, _ = levels_and_scales(4, 64)
    scale = RNG.uniform(1e-3, 1e-2, (4, 2)).astype(np.float16 if dtype == "F16" else np.float32)
    tensors = {**int4(W, levels, scale), f"{W}_scale": (dtype, scale.shape, scale)}
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        tile = whole(checkpoint)
    assert (tile == levels.astype(np.float32) * np.repeat(scale.astype(np.float32), 32, 1)).all()


@pytest.mark.parametrize("stored", [[64, 4], [4, 63], [0, 0], [-4, -64]])
@pytest.mark.parametrize("read", [read_tile, repack])
def test_a_stored_shape_that_lies_is_noticed_when_the_weight_is_read(stored, read, tmp_path):
    tensors = int4(W, *levels_and_scales(4, 64))
    tensors[f"{W}_shape"] = ("I32", (2,), np.array(stored, np.int32))
    with (
        checkpoint_of(tmp_path, tensors) as checkpoint,
        pytest.raises(SourceError, match=r"w\.weight_shape: says .*has \[4, 64\]"),
    ):
        read(checkpoint, checkpoint.weights[W], 1, 2)


def fp8_tensors(shape, scale_shape, scale=None):
    codes = RNG.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x55
    if scale is None:
        scale = RNG.uniform(1e-4, 1e-2, scale_shape)
    return {W: ("F8_E4M3", shape, codes), f"{W}_scale_inv": f32(scale)}


def torch_fp8_tile(tensors, block):
    _, shape, codes = tensors[W]
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    scale = torch.from_numpy(tensors[f"{W}_scale_inv"][2])
    scale = scale.repeat_interleave(block[0], -2)[..., : shape[-2], :]
    scale = scale.repeat_interleave(block[1], -1)[..., : shape[-1]]
    return (values * scale).numpy().reshape(-1, shape[-1])


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((576, 512), (128, 128)),  # kv_a_proj_with_mqa: the last block of rows is half used
        ((128, 200), (128, 128)),
        ((1, 1), (128, 128)),
        ((130, 300), (64, 100)),
        ((5, 300), (1, 300)),
        ((3, 130, 140), (128, 128)),
    ],
)
def test_fp8_equals_torch_bit_for_bit(shape, block, tmp_path):
    scale_shape = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    tensors = fp8_tensors(shape, scale_shape)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    with checkpoint_of(tmp_path, tensors, config) as checkpoint:
        assert (bits(whole(checkpoint)) == bits(torch_fp8_tile(tensors, block))).all()


def test_every_fp8_code_has_the_value_of_its_plain_twin(tmp_path):
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8).reshape(2, 127)
    tensors = {W: ("F8_E4M3", codes.shape, codes), f"{W}_scale_inv": f32([[1.0]])}
    with checkpoint_of(tmp_path, tensors, {}) as checkpoint:
        expected = np.vectorize(naive.e4m3_value)(codes)
        assert (bits(whole(checkpoint)) == bits(expected.astype(np.float32))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_finite_value_of_a_plain_format_equals_torch(dtype, tmp_path):
    pattern = torch.arange(2**16, dtype=torch.int32)
    if dtype is torch.float32:
        values = (pattern << 16 | pattern).view(dtype)
    else:
        values = pattern.to(torch.uint16).view(dtype)
    values = values[values.float().isfinite()].reshape(-1, 8)
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    tensors = {W: (name, tuple(values.shape), values.view(torch.uint8).numpy())}
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        assert (bits(whole(checkpoint)) == bits(values.float().numpy())).all()


def test_a_vector_and_a_scalar_are_one_row(tmp_path):
    with checkpoint_of(tmp_path, {"v": bf16([1.0, -2.0, 0.5]), "s": f32(3.0)}) as checkpoint:
        assert whole(checkpoint, "v").tolist() == [[1.0, -2.0, 0.5]]
        assert whole(checkpoint, "s").tolist() == [[3.0]]


def test_leading_axes_are_flattened(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with checkpoint_of(tmp_path, {W: f32(values)}) as checkpoint:
        assert (whole(checkpoint) == values.reshape(6, 4)).all()


@pytest.fixture(scope="module")
def every_format(tmp_path_factory):
    tensors = {
        "bf16": bf16(RNG.normal(size=(300, 64))),
        "f32": f32(RNG.normal(size=(300, 64))),
        "f16": ("F16", (300, 64), RNG.normal(size=(300, 64)).astype(np.float16)),
        **int4("int4.weight", *levels_and_scales(300, 64)),
    }
    for name, tensor in fp8_tensors((3, 100, 130), (3, 1, 2)).items():
        tensors[name.replace(W, "fp8")] = tensor
    with checkpoint_of(tmp_path_factory.mktemp("model"), tensors) as checkpoint:
        yield checkpoint


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["bf16", "f16", "f32", "int4.weight", "fp8"])
def test_any_tile_is_a_slice_of_the_whole(name, data, every_format):
    begin = data.draw(st.integers(0, 300))
    end = data.draw(st.integers(begin, 300))
    tile = read_tile(every_format, every_format.weights[name], begin, end)
    assert (tile == whole(every_format, name)[begin:end]).all()
    assert tile.shape == (end - begin, every_format.weights[name].n_cols)


@pytest.mark.parametrize(("begin", "end"), [(-1, 4), (5, 4), (0, 301), (301, 301)])
@pytest.mark.parametrize("read", [read_tile, repack])
def test_rows_outside_the_weight_are_refused(begin, end, read, every_format):
    with pytest.raises(ValueError, match=r"of int4\.weight, 300 rows"):
        read(every_format, every_format.weights["int4.weight"], begin, end)


def test_the_same_tile_is_read_from_every_thread(every_format):
    expected = whole(every_format, "int4.weight")
    with ThreadPoolExecutor(4) as pool:
        tiles = list(pool.map(lambda _: whole(every_format, "int4.weight"), range(40)))
    assert all((tile == expected).all() for tile in tiles)


def spoiled(values, row, col, value):
    values = np.array(values, np.float32)
    values[row, col] = value
    return values


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_value_that_is_not_finite_is_refused_with_its_place(value, dtype, tmp_path):
    values = spoiled(RNG.normal(size=(9, 40)), 7, 33, value)
    stored = {"BF16": bf16_bits(values), "F16": values.astype(np.float16), "F32": values}[dtype]
    with checkpoint_of(tmp_path, {W: (dtype, (9, 40), stored)}) as checkpoint:
        weight = checkpoint.weights[W]
        read_tile(checkpoint, weight, 0, 7)
        for begin, end in ((0, 9), (5, 9), (7, 8)):
            with pytest.raises(NonFiniteError, match=r"^model\.safetensors: w\.w.*at \[7, 33\]"):
                read_tile(checkpoint, weight, begin, end)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_of_fp8_is_refused_with_its_place(code, tmp_path):
    tensors = fp8_tensors((140, 150), (2, 2))
    tensors[W][2][137, 149] = code
    with (
        checkpoint_of(tmp_path, tensors, {}) as checkpoint,
        pytest.raises(NonFiniteError, match=r"^model\.safetensors: w\.w.*NaN at \[137, 149\]"),
    ):
        read_tile(checkpoint, checkpoint.weights[W], 130, 140)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e38, -1e38])
def test_a_multiplier_of_fp8_that_gives_no_finite_weight_is_refused(value, tmp_path):
    tensors = fp8_tensors((140, 150), (2, 2), scale=spoiled(np.ones((2, 2)), 1, 0, value))
    with checkpoint_of(tmp_path, tensors, {}) as checkpoint:
        read_tile(checkpoint, checkpoint.weights[W], 0, 128)
        with pytest.raises(NonFiniteError, match=r"weight_scale_inv: .*at \[1, 0\]"):
            read_tile(checkpoint, checkpoint.weights[W], 139, 140)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 6e37, -6e37])
@pytest.mark.parametrize("read", [read_tile, repack])
def test_a_scale_of_int4_that_gives_no_finite_weight_is_refused(value, read, tmp_path):
    levels, scale = levels_and_scales(6, 96)
    with checkpoint_of(tmp_path, int4(W, levels, spoiled(scale, 4, 2, value))) as checkpoint:
        read(checkpoint, checkpoint.weights[W], 0, 4)
        with pytest.raises(NonFiniteError, match=r"weight_scale: .*at \[4, 2\], and 0 more"):
            read(checkpoint, checkpoint.weights[W], 3, 6)


def dequantized(blocks):
    return dequantize(blocks, GGMLQuantizationType.Q4_0)


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (40, 512)])
def test_repacked_blocks_decode_to_the_same_weights(shape, tmp_path):
    levels, scale = levels_and_scales(*shape)
    with checkpoint_of(tmp_path, int4(W, levels, scale)) as checkpoint:
        blocks, inexact = repack(checkpoint, checkpoint.weights[W], 0, shape[0])
        assert not inexact.any()
        assert inexact.shape == scale.shape
        assert blocks.shape == (shape[0], shape[1] // 32 * 18)
        assert (bits(dequantized(blocks)) == bits(whole(checkpoint))).all()
        twin = [
            naive.q4_0_row(row + 8, half)
            for row, half in zip(levels, naive_scales(scale), strict=True)
        ]
        assert blocks.tobytes() == b"".join(twin)


def test_the_fixture_repacks_without_loss():
    with open_checkpoint(FIXTURE) as checkpoint:
        packed = [w for w in checkpoint.weights.values() if w.format == "int4-g32"]
        for weight in packed[::9]:
            blocks, inexact = repack(checkpoint, weight, 0, weight.n_rows)
            assert not inexact.any()
            tile = read_tile(checkpoint, weight, 0, weight.n_rows)
            assert (bits(dequantized(blocks)) == bits(tile)).all()


def test_a_block_is_inexact_exactly_where_its_bf16_scale_is_no_f16(tmp_path):
    """All finite BF16 scales small enough not to overflow f32 weights."""
    pattern = np.arange(2**16, dtype=np.uint16)
    values = (pattern.astype(np.uint32) << 16).view(np.float32)
    pattern = pattern[np.abs(values) < 4e37]
    values = (pattern.astype(np.uint32) << 16).view(np.float32)[:, None]
    levels = np.broadcast_to(np.arange(32) % 16 - 8, (pattern.size, 32))
    tensors = int4(W, levels, np.zeros_like(values))
    tensors[f"{W}_scale"] = ("BF16", values.shape, pattern)
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        blocks, inexact = repack(checkpoint, checkpoint.weights[W], 0, pattern.size)
        tile = whole(checkpoint)
    with np.errstate(over="ignore"):
        lossy = values.astype(np.float16).astype(np.float32) != values
    assert (inexact == lossy).all()
    assert lossy.any()
    exact = ~lossy[:, 0]
    assert (bits(dequantized(blocks[exact])) == bits(tile[exact])).all()
    magnitude = np.abs(values[exact])
    assert (magnitude[magnitude > 0].min(), magnitude.max()) == (2.0**-24, 65280)


@settings(max_examples=80, deadline=None)
@given(
    scale=hnp.arrays(
        np.float32,
        (4, 2),
        elements=st.floats(-(2.0**17), 2.0**17, width=32)
        | st.floats(-(2.0**-14), 2.0**-14, width=32)
        | st.floats(-(2.0**15), 2.0**15, width=16),
    )
)
def test_f32_scales_are_inexact_exactly_where_they_are_no_f16(scale, tmp_path_factory):
    tensors = int4(W, RNG.integers(-8, 8, (4, 64)), scale)
    tensors[f"{W}_scale"] = f32(scale)
    with checkpoint_of(tmp_path_factory.mktemp("model"), tensors) as checkpoint:
        blocks, inexact = repack(checkpoint, checkpoint.weights[W], 0, 4)
        tile = whole(checkpoint)
    with np.errstate(over="ignore"):
        lossy = scale.astype(np.float16).astype(np.float32) != scale
    assert (inexact == lossy).all()
    exact = ~np.repeat(lossy, 32, axis=1)
    assert (bits(tile)[exact] == bits(dequantized(blocks))[exact]).all()


def test_a_format_whose_levels_no_type_has_is_not_repacked(every_format):
    with pytest.raises(ValueError, match="fp8 is stored as fp8-block"):
        repack(every_format, every_format.weights["fp8"], 0, 1)


def test_any_repacked_tile_is_a_slice_of_the_whole(every_format):
    weight = every_format.weights["int4.weight"]
    blocks, inexact = repack(every_format, weight, 0, 300)
    for begin, end in ((0, 0), (0, 1), (7, 300), (299, 300), (300, 300)):
        part, mask = repack(every_format, weight, begin, end)
        assert (part == blocks[begin:end]).all()
        assert part.shape == (end - begin, 36)
        assert mask.shape == inexact[begin:end].shape


def test_opening_a_checkpoint_loads_neither_numba_nor_torch():
    code = (
        "import sys, pathlib; from quantkit.source.checkpoint import open_checkpoint; "
        f"open_checkpoint(pathlib.Path({str(FIXTURE)!r})); "
        "print(sorted({'numba', 'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    result = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
