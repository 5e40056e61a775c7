"""From stored tensors to weights: what is understood, and what is refused by name."""

from __future__ import annotations

import pytest

from quantkit.errors import SourceError, UnsupportedError
from quantkit.source.formats.fp8 import Grid
from quantkit.source.packed import group_weights
from quantkit.types import TensorRef, Weight, WeightFormat
from tests.builders.safetensors import dtype_bits, int4_config

INT4 = {"quantization_config": int4_config()}


def fp8_config(**members):
    return {"quantization_config": {"quant_method": "fp8", **members}}


FP8 = fp8_config(weight_block_size=[128, 128])


def stored(**tensors):
    """TensorRefs from `name=(dtype, *shape)`; double underscores in names stand for dots."""
    refs = {}
    for key, (dtype, *shape) in tensors.items():
        n_elements = 1
        for n in shape:
            n_elements *= n
        name = key.replace("__", ".")
        n_bytes = n_elements * dtype_bits(dtype) // 8
        refs[name] = TensorRef(name, dtype, tuple(shape), "s.safetensors", 0, n_bytes)
    return refs


def int4_parts(**replaced):
    parts = {
        "x__weight_packed": ("I32", 6, 8),
        "x__weight_scale": ("BF16", 6, 2),
        "x__weight_shape": ("I32", 2),
        **replaced,
    }
    return stored(**{name: part for name, part in parts.items() if part})


def with_group(**weights):
    return {"quantization_config": int4_config(**weights)}


def with_scheme(**members):
    return {"quantization_config": {**int4_config(), **members}}


def fp8_parts(**replaced):
    parts = {"x__weight": ("F8_E4M3", 130, 300), "x__weight_scale_inv": ("F32", 2, 3), **replaced}
    return stored(**{name: part for name, part in parts.items() if part})


def test_plain_floats_are_weights_under_their_own_names():
    refs = stored(a__weight=("BF16", 2, 3), b__bias=("F32", 3), s=("F16",), e=("F32", 4, 3, 2))
    weights = group_weights(refs, {})
    assert {name: (w.format, w.shape, w.n_rows, w.n_cols) for name, w in weights.items()} == {
        "a.weight": (WeightFormat.BF16, (2, 3), 2, 3),
        "b.bias": (WeightFormat.F32, (3,), 1, 3),
        "s": (WeightFormat.F16, (), 1, 1),
        "e": (WeightFormat.F32, (4, 3, 2), 12, 2),
    }
    assert all(w.data is refs[name] and w.scale is None for name, w in weights.items())


def test_integers_booleans_doubles_and_empty_tensors_are_no_weights():
    refs = stored(ids=("I64", 5), mask=("BOOL", 5), x=("F64", 5), none=("F32", 0), u=("U8", 2))
    assert group_weights(refs, {}) == {}


@pytest.mark.parametrize("config", [INT4, {"text_config": INT4}, {"text_config": None, **INT4}])
@pytest.mark.parametrize("shape_dtype", ["I32", "I64"])
def test_three_packed_tensors_are_one_int4_weight(config, shape_dtype):
    refs = int4_parts(x__weight_shape=(shape_dtype, 2))
    assert group_weights(refs, config) == {
        "x.weight": Weight(
            "x.weight",
            WeightFormat.INT4_G32,
            (6, 64),
            refs["x.weight_packed"],
            refs["x.weight_scale"],
        )
    }


def test_stacked_experts_may_be_packed_too():
    refs = int4_parts(
        x__weight_packed=("I32", 5, 6, 8),
        x__weight_scale=("BF16", 5, 6, 2),
        x__weight_shape=("I64", 3),
    )
    assert group_weights(refs, INT4)["x.weight"].shape == (5, 6, 64)


@pytest.mark.parametrize(
    ("config", "scale_shape", "block"),
    [
        ({}, (2, 3), (128, 128)),
        (FP8, (2, 3), (128, 128)),
        ({"text_config": FP8}, (2, 3), (128, 128)),
        (fp8_config(weight_block_size=[64, 100]), (3, 3), (64, 100)),
        (fp8_config(weight_block_size=[1, 300]), (130, 1), (1, 300)),
    ],
)
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E8M0"])
def test_fp8_with_a_multiplier_per_block_is_one_weight(dtype, config, scale_shape, block):
    refs = fp8_parts(x__weight_scale_inv=(dtype, *scale_shape))
    assert group_weights(refs, config) == {
        "x.weight": Weight(
            "x.weight",
            WeightFormat.FP8_BLOCK,
            (130, 300),
            refs["x.weight"],
            refs["x.weight_scale_inv"],
            Grid(130, *block),
        )
    }


def test_stacked_fp8_experts_have_blocks_of_their_own():
    refs = stored(
        experts__gate_up_proj=("F8_E4M3", 4, 130, 300),
        experts__gate_up_proj_scale_inv=("F32", 4, 2, 3),
    )
    assert group_weights(refs, FP8)["experts.gate_up_proj"].shape == (4, 130, 300)


@pytest.mark.parametrize(
    ("refs", "config", "named", "message"),
    [
        (int4_parts(x__weight_scale=None), INT4, "x.weight_packed", "x.weight_scale is missing"),
        (int4_parts(x__weight_shape=None), INT4, "x.weight_packed", "x.weight_shape is missing"),
        (int4_parts(x__weight_packed=None), INT4, "x.weight_scale", "x.weight_packed is missing"),
        (
            int4_parts(x__weight_scale=("BF16", 6, 3)),
            INT4,
            "x.weight_scale",
            "has the shape [6, 3]: groups of 32 columns of 4 bits do not fill",
        ),
        (
            int4_parts(x__weight_scale=("BF16", 5, 2)),
            INT4,
            "x.weight_scale",
            "has the shape [5, 2], expected [6, 2]",
        ),
        (
            int4_parts(x__weight_shape=("I32", 3)),
            INT4,
            "x.weight_shape",
            "has the shape [3], expected [2]",
        ),
        (int4_parts(x__weight_shape=("F32", 2)), INT4, "x.weight_shape", "is F32"),
        (int4_parts(), with_group(num_bits=8), "x.weight_scale", "do not fill x.weight_packed"),
        (int4_parts(), with_group(num_bits=3), "x.weight_scale", "do not fill x.weight_packed"),
        (int4_parts(), with_group(group_size=128), "x.weight_scale", "do not fill"),
        (int4_parts(), with_group(strategy="channel"), "x.weight_scale", "expected [6, 1]"),
        (int4_parts(), with_group(symmetric=False), "x.weight_packed", "zero_point is missing"),
        (int4_parts(), with_scheme(config_groups=[1]), "quantization_config", "an object of"),
        (int4_parts(), with_scheme(config_groups={"g": 1}), "quantization_config", "an object of"),
        (int4_parts(), with_scheme(config_groups={"g": {"weights": 3}}), "config", "an object"),
        (int4_parts(x__weight_packed=("I32", 8)), INT4, "x.weight_packed", "has the shape [8]"),
        (int4_parts(x__weight_packed=("I32", 0, 8)), INT4, "x.weight_packed", "the shape [0, 8]"),
        (
            fp8_parts(x__weight_scale_inv=("F32", 1, 3)),
            FP8,
            "x.weight_scale_inv",
            "has the shape [1, 3], expected [2, 3]",
        ),
        (fp8_parts(x__weight=None), FP8, "x.weight_scale_inv", "x.weight is missing"),
        (fp8_parts(x__weight=("F8_E4M3", 300)), FP8, "x.weight", "has the shape [300]"),
        (
            {**int4_parts(), "x.weight": TensorRef("x.weight", "BF16", (6, 64), "s", 0, 768)},
            INT4,
            "x.weight",
            "",
        ),
        ({}, {"quantization_config": "int4"}, "quantization_config", "must be an object"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(refs, config, named, message):
    with pytest.raises((SourceError, UnsupportedError)) as caught:
        group_weights(refs, config)
    assert named in caught.value.where
    assert message in caught.value.message


UNSUPPORTED = {
    "9 bits": (int4_parts(), with_group(num_bits=9), "9 bits of type int"),
    "symmetry not declared": (int4_parts(), with_group(symmetric=None), "symmetric None"),
    "actorder without g_idx": (int4_parts(), with_group(actorder="group"), "actorder group"),
    "float type": (int4_parts(), with_group(type="float"), "type float"),
    "dynamic": (int4_parts(), with_group(dynamic=True), "dynamic"),
    "other strategy": (int4_parts(), with_group(strategy="token"), "strategy token"),
    "group size is no number": (int4_parts(), with_group(group_size="32"), "group_size 32"),
    "other format": (int4_parts(), with_scheme(format="sparse-bitmask"), "'sparse-bitmask'"),
    "other format in a group": (
        int4_parts(),
        with_scheme(config_groups={"g": {"format": "marlin-24", "weights": {}}}),
        "'marlin-24'",
    ),
    "sparse": (
        int4_parts(),
        with_scheme(sparsity_config={"format": "sparse-24-bitmask"}),
        "stored sparse",
    ),
    "no group": (int4_parts(), with_scheme(config_groups={}), "no config group"),
    "second group for the same classes": (
        int4_parts(),
        with_scheme(
            config_groups={
                **int4_config()["config_groups"],
                **{"h": int4_config(num_bits=8)["config_groups"]["group_0"]},
            }
        ),
        "no config group",
    ),
    "rotated": (
        int4_parts(),
        with_scheme(transform_config={"config_groups": {"R1": {}}}),
        "transform_config",
    ),
    "packed without a scheme": (int4_parts(), {}, "no config group"),
    "packed under FP8": (int4_parts(), FP8, "no config group"),
    "zero points of a symmetric weight": (
        {**int4_parts(), **stored(x__weight_zero_point=("I32", 1, 2))},
        INT4,
        "goes with x.weight_packed",
    ),
    "packed in bytes": (int4_parts(x__weight_packed=("U8", 6, 32)), INT4, "packed in U8"),
    "packed in I64": (int4_parts(x__weight_packed=("I64", 6, 4)), INT4, "packed in I64"),
    "E8M0 scales": (int4_parts(x__weight_scale=("F8_E8M0", 6, 2)), INT4, "scale in F8_E8M0"),
    "FP8 without scales": (fp8_parts(x__weight_scale_inv=None), FP8, "without a weight_scale"),
    "FP8 in a group of integers": (
        stored(x__weight=("F8_E4M3", 4, 4), x__weight_scale=("F32", 1)),
        INT4,
        "its config group says 4-bit int",
    ),
    "E5M2": (fp8_parts(x__weight=("F8_E5M2", 130, 300)), FP8, "F8_E5M2"),
    "FP8 of AMD": (fp8_parts(x__weight=("F8_E4M3FNUZ", 130, 300)), FP8, "F8_E4M3FNUZ"),
    "scales of BF16": (
        fp8_parts(x__weight=("BF16", 130, 300)),
        FP8,
        "goes with x.weight, which is stored as BF16",
    ),
    "I8 without a group": (
        stored(x__weight=("I8", 4, 4), x__weight_scale=("BF16", 4, 1)),
        {},
        "no config group",
    ),
    "I8 of 4 bits": (
        stored(x__weight_scale=("BF16", 4, 1), x__weight=("I8", 4, 4)),
        INT4,
        "I8 with num_bits 4",
    ),
    "GPTQ without a scheme": (stored(x__qweight=("I32", 4, 4)), {}, "neither gptq nor awq"),
    "zeros alone": (
        stored(x__qzeros=("I32", 4, 4)),
        {"quantization_config": {"quant_method": "awq"}},
        "x.qweight is missing",
    ),
    "bytes": (stored(x__weight=("U8", 8, 1)), {}, "stored as U8"),
    "bitsandbytes int8 scales alone": (stored(x__SCB=("F32", 8)), {}, "x.weight is missing"),
    "scales of gpt-oss alone": (stored(e__down_proj_scales=("U8", 2, 4, 2)), {}, "stored as U8"),
    "AWQ's scales of activations": (
        stored(x__weight=("BF16", 4, 4), x__pre_quant_scale=("BF16", 4)),
        {"quantization_config": {"quant_method": "modelopt"}},
        "goes with x.weight",
    ),
    "plain values of an unknown method": (
        stored(x__weight=("BF16", 4, 4)),
        {"quantization_config": {"quant_method": "bitnet"}},
        "quant_method 'bitnet'",
    ),
    "method is a list": (
        stored(x__weight=("BF16", 4, 4)),
        {"quantization_config": {"quant_method": ["fp8"]}},
        "quant_method",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_foreign_format_is_refused_by_the_name_of_a_tensor(case):
    refs, config, message = UNSUPPORTED[case]
    with pytest.raises((SourceError, UnsupportedError), match=message) as caught:
        group_weights(refs, config)
    file, _, name = caught.value.where.partition(": ")
    assert file == "s.safetensors"
    assert name in refs
    if "missing" not in message:
        assert isinstance(caught.value, UnsupportedError)
        assert "docs/source-formats.md" in caught.value.hint


@pytest.mark.parametrize(
    "block", [[128], [128, 128, 1], [0, 128], [128, -1], ["128", 128], [True, 1.5], 128, "x"]
)
def test_a_block_size_that_is_none_is_refused(block):
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    with pytest.raises(UnsupportedError, match="expected two positive integers"):
        group_weights(fp8_parts(), config)


def test_plain_weights_beside_packed_ones_need_no_scheme_of_their_own():
    refs = {**int4_parts(), **stored(norm__weight=("BF16", 64), router__bias=("F32", 8))}
    assert set(group_weights(refs, INT4)) == {"x.weight", "norm.weight", "router.bias"}
