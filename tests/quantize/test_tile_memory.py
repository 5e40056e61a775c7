"""What a tile takes in memory is known before it is made; strips take less and show nowhere."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from quantkit.quantize.codec import How, encodable
from quantkit.quantize.tiles import Encoding, encode_tile, tile_bytes
from quantkit.source.checkpoint import open_checkpoint
from quantkit.types import GgmlType, PlannedTensor, Slab, SlabOp, TensorSpec
from tests.builders.safetensors import bf16, int4, write_checkpoint

ROWS, COLS = 512, 2048  # a million weights
MARGIN = 1 << 20
PACKED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                },
            }
        },
    }
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with one plain and one INT4 weight."""
    rng = np.random.default_rng(3)
    tensors = {"plain.weight": bf16(rng.standard_normal((ROWS, COLS)))}
    levels = rng.integers(-7, 8, (ROWS, COLS))
    tensors |= int4("packed.weight", levels, np.full((ROWS, COLS // 32), 0.01))
    folder = write_checkpoint(
        tmp_path_factory.mktemp("tiles"), {"model.safetensors": tensors}, PACKED, index=False
    )
    with open_checkpoint(folder) as checkpoint:
        yield checkpoint


def planned(source, name: str, type_: GgmlType, op=SlabOp.COPY, *, repack=False) -> PlannedTensor:
    """One tile of the whole weight."""
    shape = (COLS, ROWS) if op is SlabOp.TRANSPOSE else (ROWS, COLS)
    spec = TensorSpec("t", "test", 0, shape, (Slab(source.weights[name], 0, ROWS, op),))
    n_bytes = shape[0] * type_.row_bytes(shape[1])
    return PlannedTensor(spec, type_, type_, repack, 0, 0, n_bytes, shape[0], shape[0])


def traced(source, tensor: PlannedTensor, encoding: Encoding) -> int:
    """Most bytes that numpy and Python hold at once beyond what was there."""
    encode_tile(source, (tensor,), (0, 0), encoding)  # compiles
    tracemalloc.start()
    try:
        encode_tile(source, (tensor,), (0, 0), encoding)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HOWS = {
    "least error": How("fast"),
    "ggml's weights": How("fast", "ggml"),
    "gain": How("fast", "blend", 0.75),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("type_", sorted(encodable()), ids=lambda type_: type_.name)
def test_no_tile_takes_more_than_is_said(source, type_, how):
    tensor = planned(source, "plain.weight", type_)
    taken = traced(source, tensor, Encoding(HOWS[how]))
    assert taken <= tile_bytes(tensor, HOWS[how])


CLOSE = [
    (GgmlType.Q8_0, "least error"),
    (GgmlType.Q6_K, "least error"),
    (GgmlType.Q4_K, "ggml's weights"),
    (GgmlType.Q2_K, "gain"),
    (GgmlType.IQ2_XXS, "gain"),
    (GgmlType.F16, "least error"),
]


@pytest.mark.parametrize(("type_", "how"), CLOSE)
def test_what_is_said_is_no_more_than_half_as_much_again(source, type_, how):
    tensor = planned(source, "plain.weight", type_)
    taken = traced(source, tensor, Encoding(HOWS[how]))
    assert tile_bytes(tensor, HOWS[how]) - MARGIN <= 1.5 * taken


@pytest.mark.parametrize(
    ("name", "type_", "op", "repack"),
    [
        ("packed.weight", GgmlType.Q4_0, SlabOp.COPY, True),
        ("packed.weight", GgmlType.Q2_K, SlabOp.COPY, False),
        ("plain.weight", GgmlType.Q8_0, SlabOp.TRANSPOSE, False),
        ("plain.weight", GgmlType.Q8_0, SlabOp.INTERLEAVE, False),
    ],
)
def test_it_holds_for_packed_and_rearranged_rows(source, name, type_, op, repack):
    tensor = planned(source, name, type_, op, repack=repack)
    taken = traced(source, tensor, Encoding(How("fast")))
    assert taken <= tile_bytes(tensor, How("fast")) <= 2.5 * taken + MARGIN


@pytest.mark.parametrize(
    ("name", "type_", "repack"),
    [
        ("plain.weight", GgmlType.Q4_K, False),
        ("plain.weight", GgmlType.IQ3_XXS, False),
        ("packed.weight", GgmlType.Q4_0, True),
        ("plain.weight", GgmlType.F32, False),
    ],
)
def test_strips_take_less_and_leave_no_trace(source, name, type_, repack):
    how = How("fast", "blend", 0.75)
    tensor = planned(source, name, type_, repack=repack)
    whole = encode_tile(source, (tensor,), (0, 0), Encoding(how))
    for strip in (COLS, 3 * COLS, 100 * COLS + 5, 10 * ROWS * COLS):
        made = encode_tile(source, (tensor,), (0, 0), Encoding(how, strip_weights=strip))
        assert (made.digest, bytes(made.data)) == (whole.digest, bytes(whole.data))
    strip = 64 * COLS
    taken = traced(source, tensor, Encoding(how, strip_weights=strip))
    assert taken <= tile_bytes(tensor, how, strip) < tile_bytes(tensor, how)


def test_rearranged_rows_are_never_cut(source):
    tensor = planned(source, "plain.weight", GgmlType.Q8_0, SlabOp.TRANSPOSE)
    how = How("fast")
    assert tile_bytes(tensor, how, ROWS) == tile_bytes(tensor, how)
