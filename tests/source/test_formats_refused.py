"""Tensors and configs of quantised formats that break one rule each."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quantkit.errors import QuantkitError, SourceError, UnsupportedError
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.packed import read_tile
from tests.builders import formats as build
from tests.builders.safetensors import write_checkpoint

W = "x.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"
SCALES = np.full((64, 4), 0.01, np.float32)
CODES = np.zeros((64, 128), np.int64)


def gptq(**config):
    tensors, _ = build.gptq(W, CODES, CODES[:, :4] + 8, SCALES, 4, g_idx=np.arange(128) // 32)
    return tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32, **config}


def awq(**config):
    tensors, _ = build.awq(W, CODES, CODES[:, :4], SCALES)
    return tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, **config}


def packed(bits=4, size=32, **weights):
    tensors, _ = build.packed_integers(W, CODES, SCALES, bits, CODES[:, :4], np.arange(128) // 32)
    weights = build.ct_weights(bits, size=size, symmetric=False, **weights)
    return tensors, build.ct_config(g=(["Linear"], weights, None))["quantization_config"]


def mxfp4(**weights):
    tensors, _ = build.mxfp4(W, CODES, CODES[:, :4] + 120)
    weights = build.ct_weights(4, **{"size": 32, "type": "float", **weights})
    return tensors, build.ct_config(g=(["Linear"], weights, None))["quantization_config"]


def blocks():
    return build.mxfp4_blocks("x.e", CODES[None], CODES[None, :, :4] + 120)[0], {
        "quant_method": "mxfp4"
    }


def nvfp4():
    tensors, _ = build.nvfp4(W, CODES, CODES[:, :8] + 50, 1e-3, modelopt=True)
    return tensors, {"quant_method": "modelopt"}


def nf4(**state):
    nested = (np.linspace(-1, 1, 256), np.ones(4), 32, 0.0)
    tensors, _ = build.bnb_4bit(W, CODES, np.zeros(128), 64, nested=nested)
    text = json.loads(tensors[STATE][2].tobytes()) | state
    raw = np.frombuffer(json.dumps(text).encode(), np.uint8)
    return tensors | {STATE: ("U8", raw.shape, raw)}, {"quant_method": "bitsandbytes"}


def int8():
    return build.bnb_int8(W, CODES, SCALES[:, 0])[0], {"quant_method": "bitsandbytes"}


def reshaped(built, name, *shape, dtype=None):
    """The model with other bytes in one tensor; no shape takes it away."""
    tensors, config = built
    if not shape:
        return {key: value for key, value in tensors.items() if key != name}, config
    return {**tensors, name: (dtype or tensors[name][0], shape, None)}, config


def bytes_of(built, name, raw):
    tensors, config = built
    return {**tensors, name: ("U8", (len(raw),), raw)}, config


# what: (tensors and scheme, the tensor that is named, part of the message)
REFUSED = {
    # GPTQ
    "gptq without zeros": (reshaped(gptq(), "x.qzeros"), "x.qweight", "x.qzeros is missing"),
    "gptq without scales": (reshaped(gptq(), "x.scales"), "x.qweight", "x.scales is missing"),
    "gptq of marlin": (gptq(checkpoint_format="marlin"), "x.qweight", "'marlin'"),
    "gptq said to be marlin": (gptq(is_marlin_format=True), "x.qweight", "'marlin'"),
    "gptq of a later version": (gptq(checkpoint_format="gptq_v3"), "x.qweight", "'gptq_v3'"),
    "gptq of 5 bits": (gptq(bits=5), "x.qweight", "GPTQ of 5 bits"),
    "gptq with bits of another width": (gptq(bits=8), "x.qweight", "groups of 64 inputs"),
    "gptq with bits that are no number": (gptq(bits="4"), "x.qweight", "GPTQ of 4 bits, expected"),
    "gptq in other groups": (gptq(group_size=64), "x.qweight", "has 4 groups of 128 inputs"),
    "gptq in groups of 0": (gptq(group_size=0), "x.qweight", "group_size is 0"),
    "gptq with groups of text": (gptq(group_size="32"), "x.qweight", "group_size is 32"),
    "gptq, desc_act without g_idx": (
        reshaped(gptq(desc_act=True), "x.g_idx"),
        "x.qweight",
        "no g_idx",
    ),
    "gptq, zeros of another shape": (
        reshaped(gptq(), "x.qzeros", 4, 9),
        "x.qzeros",
        "has the shape [4, 9], expected [4, 8]",
    ),
    "gptq, scales of another shape": (reshaped(gptq(), "x.scales", 4, 63), "x.scales", "[4, 63]"),
    "gptq, scalar scales": (reshaped(gptq(), "x.scales", 1), "x.qweight", "has 1 groups"),
    "gptq, codes in floats": (
        reshaped(gptq(), "x.qweight", 16, 64, dtype="F32"),
        "x.qweight",
        "is F32, expected I32",
    ),
    "gptq, stacked": (reshaped(gptq(), "x.qweight", 2, 8, 64), "x.qweight", "expected a matrix"),
    "gptq, g_idx of another length": (reshaped(gptq(), "x.g_idx", 127), "x.g_idx", "[127]"),
    # AWQ
    "awq gemv": (awq(version="gemv"), "x.qweight", "'gemv'"),
    "awq of 8 bits": (awq(bits=8), "x.qweight", "AWQ of 8 bits"),
    "awq without zeros": (reshaped(awq(), "x.qzeros"), "x.qweight", "x.qzeros is missing"),
    "awq, zeros of another shape": (reshaped(awq(), "x.qzeros", 4, 7), "x.qzeros", "[4, 7]"),
    "auto-round in its own packing": (
        ({**gptq()[0]}, {"quant_method": "auto-round", "packing_format": "auto_round"}),
        "x.qweight",
        "packing_format 'auto_round'",
    ),
    # compressed-tensors
    "zeros of another shape": (
        reshaped(packed(), f"{W}_zero_point", 7, 4),
        f"{W}_zero_point",
        "has the shape [7, 4], expected [8, 4]",
    ),
    "zeros in bytes": (
        reshaped(packed(), f"{W}_zero_point", 8, 4, dtype="I8"),
        f"{W}_zero_point",
        "is I8, expected I32",
    ),
    "g_idx of another length": (reshaped(packed(), f"{W}_g_idx", 64), f"{W}_g_idx", "[64]"),
    "a huge group": (packed(size=1 << 30), f"{W}_scale", "do not fill"),
    "a zero point of the tensor": (packed(strategy="tensor"), f"{W}_packed", "whole tensor"),
    "mxfp4 in groups of 16": (mxfp4(size=16), f"{W}_packed", "groups of 16, not 32"),
    "mxfp6": (mxfp4(num_bits=6), f"{W}_packed", "'float', 6"),
    "mxfp4 with zeros": (mxfp4(symmetric=False), f"{W}_packed", "False"),
    "mxfp4, scales in floats": (
        reshaped(mxfp4(), f"{W}_scale", 64, 4, dtype="F16"),
        f"{W}_scale",
        "is F16, expected U8",
    ),
    "mxfp4, scales of another shape": (
        reshaped(mxfp4(), f"{W}_scale", 64, 8),
        f"{W}_scale",
        "has the shape [64, 8], expected [64, 4]",
    ),
    # gpt-oss
    "blocks without scales": (reshaped(blocks(), "x.e_scales"), "x.e_blocks", "is missing"),
    "blocks of 8 bytes": (reshaped(blocks(), "x.e_blocks", 1, 64, 8, 8), "x.e_blocks", "16]"),
    "block scales of another shape": (reshaped(blocks(), "x.e_scales", 1, 64), "x.e_scales", "4]"),
    # ModelOpt
    "nvfp4 without scales": (reshaped(nvfp4(), f"{W}_scale"), W, "x.weight_scale is missing"),
    "nvfp4, tensor scales of another shape": (
        reshaped(nvfp4(), f"{W}_scale_2", 3),
        f"{W}_scale_2",
        "[3]",
    ),
    # bitsandbytes
    "nf4 without a state": (reshaped(nf4(), STATE), W, "has no quant_state"),
    "nf4, a state that is no JSON": (bytes_of(nf4(), STATE, b"\x80\x04K\x01."), STATE, "no JSON"),
    "nf4, a nested state": (bytes_of(nf4(), STATE, b"[" * 4000), STATE, "no JSON"),
    "nf4, a state of 5000 bytes": (bytes_of(nf4(), STATE, b" " * 5000), STATE, "5,000 bytes"),
    "nf4 with a state of fp4": (nf4(quant_type="fp4"), STATE, "does not say quant_type nf4"),
    "nf4 of a larger shape": (nf4(shape=[64, 1 << 30]), W, "has 4096 bytes for [64, 1073741824]"),
    "nf4 of a negative shape": (nf4(shape=[-64, -128]), STATE, "gives the shape"),
    "nf4 of a scalar shape": (nf4(shape=8192), STATE, "gives the shape"),
    "nf4 in blocks of 0": (nf4(blocksize=0), STATE, "gives blocksize 0"),
    "nf4 in larger blocks": (nf4(blocksize=128), f"{W}.absmax", "expected [64]"),
    "nf4, offset of infinity": (nf4(nested_offset=float("inf")), STATE, "nested_offset inf"),
    "nf4, offset of text": (nf4(nested_offset="1"), STATE, "nested_offset 1"),
    "nf4, short map": (reshaped(nf4(), f"{W}.quant_map", 15), f"{W}.quant_map", "[15]"),
    "nf4, short nested map": (
        reshaped(nf4(), f"{W}.nested_quant_map", 255),
        f"{W}.nested_quant_map",
        "[255]",
    ),
    "int8, scales of another shape": (reshaped(int8(), "x.SCB", 63), "x.SCB", "[63]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_breaks_a_rule_is_refused_by_the_name_of_a_tensor(case, tmp_path):
    (tensors, scheme), named, message = REFUSED[case]
    write_checkpoint(
        tmp_path, {"model.safetensors": tensors}, {"quantization_config": scheme}, index=False
    )
    with pytest.raises((SourceError, UnsupportedError)) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.where == f"model.safetensors: {named}"
    assert message in caught.value.message
    assert caught.value.hint or "missing" in message


def spoiled(built, name, flat, value):
    tensors, config = built
    dtype, shape, data = tensors[name]
    data = np.array(data, order="C")
    data.reshape(-1)[flat] = value
    return {**tensors, name: (dtype, shape, data)}, config


UNREADABLE = {
    "gptq, a group that is not there": (spoiled(gptq(), "x.g_idx", 7, 4), "into group 4 of 4"),
    "a group that is not there": (spoiled(packed(), f"{W}_g_idx", 9, 900), "column 9 into group"),
    "another shape": (spoiled(packed(), f"{W}_shape", 0, 63), "says [63, 128]"),
    "nf4 with other levels": (spoiled(nf4(), f"{W}.quant_map", 3, 0.5), "other levels than nf4"),
    "int8 in columns": (spoiled(int8(), f"{W}_format", 0, 1), "not stored row by row"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_only_the_bytes_show_is_refused_when_they_are_read(case, tmp_path):
    (tensors, scheme), message = UNREADABLE[case]
    config = {"quantization_config": scheme}
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    with open_checkpoint(tmp_path) as checkpoint:
        weight = checkpoint.weights[W]
        with pytest.raises(QuantkitError) as caught:
            read_tile(checkpoint, weight, 0, weight.n_rows)
    assert message in str(caught.value)


@pytest.mark.parametrize("pattern", ["re:(", "re:(a|a)*$"])
def test_a_pattern_that_is_wrong_or_takes_for_ever_is_refused(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.source.formats.scheme._PATTERN_SECONDS", 0.05)
    tensors, _ = packed()
    tensors = {key.replace("x.", f"{'a' * 40}b."): value for key, value in tensors.items()}
    weights = build.ct_weights(4, size=32, symmetric=False)
    config = build.ct_config(g=([pattern], weights, None), h=(["Linear"], weights, None))
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    with pytest.raises(SourceError, match=r"the target 're:.* (is wrong|takes too long)"):
        open_checkpoint(tmp_path)
