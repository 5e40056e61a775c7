"""Every format against the formula that it is published with, whole and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import NonFiniteError
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.formats import stored
from quantkit.source.packed import read_tile, repack, repacks_to
from tests.builders import formats as build
from tests.builders.safetensors import bf16_bits, write_checkpoint

W = "x.weight"
RNG = np.random.default_rng(5)


def scales(*shape):
    return RNG.uniform(1e-3, 1e-2, shape).astype(np.float32)


def half_scales(*shape):
    return scales(*shape).astype(np.float16).astype(np.float32)


def codes(bits, *shape):
    return RNG.integers(0, 1 << bits, shape)


def integers(bits, n_groups=2, *, zero=False, order=False, shape=(40, 128)):
    size = shape[-1] // n_groups
    z = codes(bits, *shape[:-1], n_groups) if zero else None
    g_idx = RNG.permutation(shape[-1]) // size if order else None
    built = build.packed_integers(
        W, codes(bits, *shape), half_scales(*shape[:-1], n_groups), bits, z, g_idx
    )
    weights = build.ct_weights(bits, size=size, symmetric=not zero)
    return built, build.ct_config(g=(["Linear"], weights, "pack-quantized"))


def gptq(bits, *, v2=False, order=False, zero=None, shape=(96, 128), **config):
    z = RNG.integers(0 if v2 else 1, 1 << bits, (shape[0], 4)) if zero is None else zero
    g_idx = RNG.permutation(shape[1]) // 32 if order else np.arange(shape[1]) // 32
    built = build.gptq(W, codes(bits, *shape), z, scales(shape[0], 4), bits, v2=v2, g_idx=g_idx)
    format_ = "gptq_v2" if v2 else "gptq"
    declared = {"bits": bits, "group_size": 32, "desc_act": order, "sym": zero is not None}
    return built, build.method("gptq", **declared, checkpoint_format=format_, **config)


def awq(shape=(96, 128)):
    built = build.awq(W, codes(4, *shape), codes(4, shape[0], 4), scales(shape[0], 4))
    return built, build.method("awq", bits=4, group_size=32, version="gemm", zero_point=True)


def floats(bits, size, strategy="group"):
    return build.ct_config(
        g=(["Linear"], build.ct_weights(bits, strategy, size, type="float"), None)
    )


def bnb(kind, shape, nested=False):
    n_blocks = -(-shape[0] * shape[1] // 64)
    if nested:
        inner = np.sort(RNG.uniform(-1, 1, 256)).astype(np.float32)
        outer = (inner, scales(-(-n_blocks // 32)), 32, 0.02)
        built = build.bnb_4bit(W, codes(4, *shape), codes(8, n_blocks), 64, kind, outer)
    else:
        built = build.bnb_4bit(W, codes(4, *shape), scales(n_blocks), 64, kind)
    return built, build.method("bitsandbytes")


MIDDLE = {bits: np.full((96, 4), 1 << bits - 1) for bits in (4, 8)}
CASES = {
    **{f"{bits} bits": lambda bits=bits: integers(bits) for bits in range(1, 9)},
    **{f"{bits} bits with zeros": lambda b=bits: integers(b, zero=True) for bits in range(2, 9)},
    "4 bits, groups of 32": lambda: integers(4, 4),
    "4 bits, one group": lambda: integers(4, 1),
    "4 bits in an order of columns": lambda: integers(4, order=True),
    "8 bits in an order, with zeros": lambda: integers(8, zero=True, order=True),
    "stacked 4 bits with zeros": lambda: integers(4, zero=True, shape=(3, 41, 128)),
    "stacked 3 bits with zeros": lambda: integers(3, zero=True, shape=(3, 33, 64)),
    **{f"gptq, {bits} bits": lambda bits=bits: gptq(bits) for bits in (2, 3, 4, 8)},
    **{f"gptq v2, {bits} bits": lambda b=bits: gptq(b, v2=True) for bits in (2, 3, 4, 8)},
    "gptq, desc_act": lambda: gptq(4, order=True),
    "gptq, symmetric": lambda: gptq(4, zero=MIDDLE[4]),
    "gptq, symmetric, 8 bits": lambda: gptq(8, zero=MIDDLE[8]),
    "gptq, bits by module": lambda: gptq(8, dynamic={"+:.*x": {"bits": 8}}),
    "awq": awq,
    "mxfp4": lambda: (
        build.mxfp4(W, codes(4, 40, 128), RNG.integers(0, 126 + 126, (40, 4))),
        floats(4, 32),
    ),
    "stacked mxfp4": lambda: (
        build.mxfp4(W, codes(4, 3, 40, 128), RNG.integers(100, 140, (3, 40, 4))),
        floats(4, 32),
    ),
    "mxfp4 blocks": lambda: (
        build.mxfp4_blocks(W, codes(4, 3, 40, 128), RNG.integers(100, 140, (3, 40, 4))),
        build.method("mxfp4", modules_to_not_convert=["lm_head"]),
    ),
    "nvfp4": lambda: (
        build.nvfp4(W, codes(4, 40, 128), RNG.integers(1, 127, (40, 8)), 15000.5),
        floats(4, 16, "tensor_group"),
    ),
    "nvfp4 of ModelOpt": lambda: (
        build.nvfp4(W, codes(4, 40, 128), RNG.integers(1, 127, (40, 8)), 7e-5, modelopt=True),
        build.method("modelopt", quant_algo="NVFP4"),
    ),
    "fp8 by row": lambda: (
        build.fp8(W, codes(8, 40, 130) & 0xFE, scales(40, 1)),
        build.method("fbgemm_fp8"),
    ),
    "fp8 by tensor": lambda: (
        build.fp8(W, codes(8, 40, 130) & 0xFE, scales()),
        build.method("modelopt", quant_algo="FP8"),
    ),
    "fp8 by tensor, inverse": lambda: (
        build.fp8(W, codes(8, 40, 130) & 0xFE, scales(), "_scale_inv"),
        build.method("fp8", weight_block_size=None),
    ),
    "fp8 by expert": lambda: (
        build.fp8(W, codes(8, 3, 40, 130) & 0xFE, scales(3, 1, 1)),
        build.method("modelopt"),
    ),
    "nf4": lambda: bnb("nf4", (40, 128)),
    "nf4, nested": lambda: bnb("nf4", (40, 128), nested=True),
    "fp4, nested": lambda: bnb("fp4", (40, 128), nested=True),
    "nf4 of odd rows": lambda: bnb("nf4", (41, 43), nested=True),
    "fp4 of odd rows": lambda: bnb("fp4", (41, 37)),
    "llm.int8": lambda: (
        build.bnb_int8(W, RNG.integers(-127, 128, (40, 128)), scales(40)),
        build.method("bitsandbytes", load_in_8bit=True),
    ),
}
REPACKED = {
    "Q4_0": (
        "4 bits", "4 bits, groups of 32", "4 bits, one group", "gptq, symmetric",
    ),
    "Q8_0": ("8 bits", "gptq, symmetric, 8 bits"),
    "MXFP4": ("mxfp4", "stacked mxfp4", "mxfp4 blocks"),
}  # fmt: skip
AS = {case: type_ for type_, cases in REPACKED.items() for case in cases}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (open checkpoint, its weight, what it means), made once."""
    opened = {}

    def make(case):
        if case not in opened:
            (tensors, values), config = CASES[case]()
            folder = tmp_path_factory.mktemp("format")
            write_checkpoint(folder, {"model.safetensors": tensors}, config)
            checkpoint = open_checkpoint(folder)
            (weight,) = checkpoint.weights.values()
            opened[case] = checkpoint, weight, values.astype(np.float32)
        return opened[case]

    yield make
    for checkpoint, _, _ in opened.values():
        checkpoint.close()


def bits_of(values):
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_what_the_formula_says_bit_for_bit(case, checkpoints):
    checkpoint, weight, values = checkpoints(case)
    assert weight.name == W
    assert weight.shape == values.shape
    tile = read_tile(checkpoint, weight, 0, weight.n_rows)
    assert tile.dtype == np.float32
    assert (bits_of(tile.reshape(values.shape)) == bits_of(values)).all()


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_tile_is_a_slice_of_the_whole(case, data, checkpoints):
    checkpoint, weight, values = checkpoints(case)
    begin = data.draw(st.integers(0, weight.n_rows))
    end = data.draw(st.integers(begin, weight.n_rows))
    whole = values.reshape(weight.n_rows, weight.n_cols)
    assert (read_tile(checkpoint, weight, begin, end) == whole[begin:end]).all()
    if repacks_to(weight) is not None:
        blocks, inexact = repack(checkpoint, weight, begin, end)
        assert (blocks == repack(checkpoint, weight, 0, weight.n_rows)[0][begin:end]).all()
        assert inexact.shape == (end - begin, weight.n_cols // 32)


@pytest.mark.parametrize("case", CASES)
def test_only_a_format_with_the_levels_of_a_type_is_repacked_to_it(case, checkpoints):
    _, weight, _ = checkpoints(case)
    type_ = repacks_to(weight)
    assert (type_ and type_.name) == AS.get(case)


@pytest.mark.parametrize("case", AS)
def test_repacked_blocks_decode_to_the_same_weights(case, checkpoints):
    checkpoint, weight, values = checkpoints(case)
    blocks, inexact = repack(checkpoint, weight, 0, weight.n_rows)
    assert not inexact.any()
    decoded = dequantize(blocks, GGMLQuantizationType[AS[case]])
    assert (decoded.reshape(values.shape) == values).all()


@pytest.mark.parametrize(("bits", "type_"), [(4, "Q4_0"), (8, "Q8_0")])
def test_a_block_is_inexact_exactly_where_its_scale_is_no_f16(bits, type_, tmp_path):
    """A third of the scales have more bits than an f16; each holds for two blocks."""
    scale = half_scales(60, 2) * np.where(RNG.integers(0, 3, (60, 2)) == 0, 1 + 2.0**-16, 1)
    scale = scale.astype(np.float32)
    tensors, values = build.packed_integers(W, codes(bits, 60, 128), scale, bits)
    config = build.ct_config(g=(["Linear"], build.ct_weights(bits, size=64), None))
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    with open_checkpoint(tmp_path) as checkpoint:
        blocks, inexact = repack(checkpoint, checkpoint.weights[W], 0, 60)
    lossy = scale.astype(np.float16).astype(np.float32) != scale
    assert 0 < lossy.sum() < lossy.size
    assert (inexact == np.repeat(lossy, 2, axis=1)).all()
    exact = ~np.repeat(lossy, 64, axis=1)
    assert (dequantize(blocks, GGMLQuantizationType[type_])[exact] == values[exact]).all()


def test_a_gptq_block_whose_zero_is_not_the_middle_is_inexact(tmp_path):
    """`sym` is what config.json declares; the zero points are what is stored."""
    zero = MIDDLE[4].copy()
    zero[7, 2] = 5
    (tensors, _), config = gptq(4, zero=zero)
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    with open_checkpoint(tmp_path) as checkpoint:
        _, inexact = repack(checkpoint, checkpoint.weights[W], 0, 96)
    assert np.argwhere(inexact).tolist() == [[7, 2]]


def test_gptq_of_one_word_too_many_ones_is_undone_in_words(tmp_path):
    """GPTQModel subtracts from whole words, so that a zero point of 0 borrows from the next."""
    (tensors, values), config = gptq(4, v2=True, zero=np.tile([0, 3, 0, 9], (96, 1)))
    name, shape, words = "x.qzeros", *tensors["x.qzeros"][1:]
    tensors[name] = ("I32", shape, words - np.uint32(0x11111111))
    config["quantization_config"] |= {"checkpoint_format": "gptq", "sym": False}
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    with open_checkpoint(tmp_path) as checkpoint:
        assert (read_tile(checkpoint, checkpoint.weights[W], 0, 96) == values).all()


def test_gptqmodel_subtracts_other_words_from_zeros_of_three_bits(tmp_path):
    (tensors, values), config = gptq(3, v2=True)
    shape, words = tensors["x.qzeros"][1:]
    ones = np.tile(np.array([0x24924924, 0x92492492, 0x49249249], np.uint32), shape[1] // 3)
    tensors["x.qzeros"] = ("I32", shape, words - ones)
    config["quantization_config"] |= {
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:5.6.0"]},
    }
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    with open_checkpoint(tmp_path) as checkpoint:
        assert (read_tile(checkpoint, checkpoint.weights[W], 0, 96) == values).all()


@pytest.mark.parametrize("case", ["gptq, 4 bits", "awq"])
@pytest.mark.parametrize("row_bytes", [0, 1 << 30])
def test_columns_are_read_alike_in_strips_and_row_by_row(case, row_bytes, checkpoints, monkeypatch):
    checkpoint, weight, values = checkpoints(case)
    monkeypatch.setattr(stored, "_ROW_BYTES", row_bytes)
    monkeypatch.setattr(stored, "_STRIP_BYTES", 1000)
    assert (read_tile(checkpoint, weight, 11, 67) == values[11:67]).all()


@pytest.mark.parametrize("case", ["gptq, 4 bits", "awq"])
def test_a_tile_never_holds_more_than_its_columns_and_a_strip(case, checkpoints, monkeypatch):
    checkpoint, weight, _ = checkpoints(case)
    monkeypatch.setattr(stored, "_STRIP_BYTES", 2048)
    largest = 0
    pread = checkpoint.pread

    def watched(ref, offset, n_bytes):
        nonlocal largest
        largest = max(largest, n_bytes)
        return pread(ref, offset, n_bytes)

    monkeypatch.setattr(checkpoint, "pread", watched)
    read_tile(checkpoint, weight, 8, 16)
    assert largest <= 2048


def spoil(tensors, name, flat, value):
    dtype, shape, data = tensors[name]
    data = np.array(data, order="C")
    data.reshape(-1)[flat] = value
    return {**tensors, name: (dtype, shape, data)}


NAN16 = np.float16("nan")
NONFINITE = {
    "gptq, 4 bits": ("x.scales", 96 * 2 + 50, NAN16, r"x\.scales: .* at \[2, 50\]"),
    "awq": ("x.scales", 96 * 3 + 9, NAN16, r"x\.scales: .* at \[3, 9\]"),
    "4 bits with zeros": (f"{W}_scale", 2 * 30 + 1, np.inf, r"at \[30, 1\]"),
    "mxfp4": (f"{W}_scale", 4 * 30 + 1, 255, r"at \[30, 1\]"),
    "mxfp4 blocks": (f"{W}_scales", 4 * 30 + 1, 254, r"overflows f32 at \[30, 1\]"),
    "nvfp4": (f"{W}_scale", 8 * 30 + 1, 127, r"at \[30, 1\]"),
    "nvfp4 of ModelOpt": (f"{W}_scale_2", 0, 1e37, r"overflows f32 with x\.weight_scale_2"),
    "fp8 by row": (f"{W}_scale", 33, 1e37, r"at \[33, 0\]"),
    "nf4": (f"{W}.absmax", 61, np.nan, r"absmax"),
    "nf4, nested": (f"{W}.nested_absmax", 1, np.inf, r"nested_absmax"),
    "llm.int8": ("x.SCB", 22, np.nan, r"SCB"),
}


@pytest.mark.parametrize("case", NONFINITE)
def test_a_scale_that_gives_no_finite_weight_is_refused_with_its_place(case, tmp_path):
    name, flat, value, place = NONFINITE[case]
    (tensors, _), config = CASES[case]()
    tensors = spoil(tensors, name, flat, value)
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    with open_checkpoint(tmp_path) as checkpoint:
        weight = checkpoint.weights[W]
        with pytest.raises(NonFiniteError, match=place):
            read_tile(checkpoint, weight, 0, weight.n_rows)


def test_modules_of_one_checkpoint_may_be_stored_in_different_formats(tmp_path):
    """By exact name, by pattern, by class; what is ignored is simply stored plain."""
    parts = {
        "a.q_proj": (integers(8, zero=True), 8),
        "a.up_proj": (integers(4, 4), 4),
        "a.k_proj": (integers(5), 5),
    }
    tensors, values = {}, {}
    for module, (((stored_, expected), _), _) in parts.items():
        tensors |= {name.replace("x.", f"{module}."): t for name, t in stored_.items()}
        values[f"{module}.weight"] = expected
    tensors["lm_head.weight"] = ("BF16", (8, 8), bf16_bits(np.eye(8)))
    config = build.ct_config(
        rest=(["Linear"], build.ct_weights(5, size=64), "pack-quantized"),
        head=(["lm_head"], build.ct_weights(8, size=128), "pack-quantized"),
        named=(["a.q_proj"], build.ct_weights(8, size=64, symmetric=False), "pack-quantized"),
        pattern=([r"re:.*\.(up|q)_proj"], build.ct_weights(4, size=32), "pack-quantized"),
    )
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    with open_checkpoint(tmp_path) as checkpoint:
        formats = {name: w.format.value for name, w in checkpoint.weights.items()}
        for name, expected in values.items():
            weight = checkpoint.weights[name]
            assert (read_tile(checkpoint, weight, 0, weight.n_rows) == expected).all()
    assert formats == {
        "a.q_proj.weight": "int8",
        "a.up_proj.weight": "int4-g32",
        "a.k_proj.weight": "int",
        "lm_head.weight": "bf16",
    }
