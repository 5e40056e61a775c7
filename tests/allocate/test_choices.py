"""Which types a tensor may get, and which tensors decide together."""

from __future__ import annotations

import pytest

from quantkit.allocate.choices import (
    CANDIDATES,
    GATE_UP,
    Consumer,
    Floor,
    Legal,
    build_groups,
    parse_floor,
    usable,
)
from quantkit.errors import NonFiniteError, UsageError
from quantkit.types import GgmlType
from tests.allocate.models import kimi, tensor


def bits(spec, type_):
    """A cost that names its tensor and type in a number."""
    return spec.n_weights / type_.bpw


def names(types):
    return {t.name for t in types}


def options_of(*specs, cost=bits, **legal):
    (group,) = build_groups(specs, cost, Legal(**legal))
    return {option.type: option for option in group.options}


ALL = {"types": CANDIDATES, "consumers": ()}


@pytest.mark.parametrize(
    ("n_cols", "fitting"),
    [
        (256, {t.name for t in GgmlType if t.block_size > 1}),
        (
            128,
            {"Q1_0", "Q2_0", "MXFP4", "NVFP4", "Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"},
        ),
        (64, {"Q2_0", "MXFP4", "NVFP4", "Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}),
        (96, {"MXFP4", "Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}),
        (100, {"F16"}),
        (1, {"F16"}),
    ],
)
def test_rows_have_to_divide_into_blocks(n_cols, fitting):
    spec = tensor("blk.0.attn_k_b.weight", "attention.k_b", 0, 4, 2, n_cols)
    assert names(options_of(spec, **ALL)) == fitting


@pytest.mark.parametrize(
    ("consumer", "lacks"),
    [
        (Consumer.CPU, set()),
        (Consumer.VULKAN, set()),
        (Consumer.CUDA, {"TQ1_0", "TQ2_0"}),
        (Consumer.CUDA_PROMPTS, {"TQ1_0", "TQ2_0", "IQ1_M"}),
        (Consumer.METAL, {"TQ1_0", "NVFP4"}),
        (Consumer.OLDER, {"NVFP4", "Q1_0", "Q2_0"}),
    ],
)
def test_types_that_a_consumer_does_not_run_are_left_out(consumer, lacks):
    assert names(CANDIDATES) - names(usable(CANDIDATES, [consumer])) == lacks


def test_every_consumer_has_to_run_a_type():
    both = usable(CANDIDATES, [Consumer.CUDA, Consumer.METAL])
    assert names(CANDIDATES) - names(both) == {"TQ1_0", "TQ2_0", "NVFP4"}


def test_types_come_by_size_then_name_and_once():
    q4, nl, q2 = GgmlType.Q4_0, GgmlType.IQ4_NL, GgmlType.Q2_K
    assert usable([q4, q2, nl, q4], []) == (q2, nl, q4)


def test_a_floor_holds_for_the_roles_that_it_names():
    floors = (Floor("attention.*", GgmlType.Q5_K), Floor("attention.v", GgmlType.Q6_K))
    specs = [tensor(f"{role}.weight", role, 0) for role in ("attention.k", "attention.v", "output")]
    groups = {g.name: g for g in build_groups(specs, bits, Legal(floors=floors))}
    least = {name: min(o.type.bpw for o in g.options) for name, g in groups.items()}
    assert least == {
        "attention.k.weight": GgmlType.Q5_K.bpw,
        "attention.v.weight": GgmlType.Q6_K.bpw,
        "output.weight": GgmlType.IQ1_S.bpw,
    }


def test_a_floor_above_what_rows_allow_ends_at_sixteen_bits():
    narrow = tensor("blk.0.attn_k_b.weight", "attention.k_b", 0, 4, 100)
    assert names(options_of(narrow, floors=(Floor("*", GgmlType.Q8_0),))) == {"F16"}
    assert names(options_of(narrow, floors=(Floor("*", GgmlType.F32),))) == {"F32"}


@pytest.mark.parametrize(
    ("text", "floor"),
    [
        ("attention.*>=Q5_K", Floor("attention.*", GgmlType.Q5_K)),
        ("  output >= q6_k ", Floor("output", GgmlType.Q6_K)),
        ("*.[gu]*>=IQ2_XXS", Floor("*.[gu]*", GgmlType.IQ2_XXS)),
    ],
)
def test_floors_are_written_as_role_and_type(text, floor):
    assert parse_floor(text) == floor


@pytest.mark.parametrize("text", ["", "Q5_K", ">=Q5_K", "a>=", "a>Q5_K", "a>=Q5", "a>=b>=Q5_K"])
def test_what_is_no_floor_is_refused(text):
    with pytest.raises(UsageError, match="is no floor"):
        parse_floor(text)


def test_bytes_count_rows_and_the_padding_behind_a_tensor():
    options = options_of(tensor("t.weight", "r", 0, 3, 256))
    assert options[GgmlType.IQ1_S].n_bytes == 160  # 3 rows of 50 bytes, to a multiple of 32
    assert options[GgmlType.Q8_0].n_bytes == 816 + 16


def test_tensors_of_a_fixed_type_are_no_choice():
    fixed = tensor("blk.0.attn_norm.weight", "norm", 0, 512, keep=GgmlType.F32)
    assert build_groups([fixed], bits) == ()


def test_gate_and_up_of_a_layer_share_a_type_where_asked_to():
    specs = [
        tensor(f"blk.{layer}.ffn_{part}_exps.weight", f"routed_expert.{part}", layer, 2, 4, 256)
        for layer in (0, 1)
        for part in ("gate", "up", "down")
    ]
    apart = build_groups(specs, bits)
    shared = build_groups(specs, bits, Legal(share=GATE_UP))
    assert len(apart) == 6
    assert [g.tensors for g in shared] == [
        ("blk.0.ffn_down_exps.weight",),
        ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"),
        ("blk.1.ffn_down_exps.weight",),
        ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"),
    ]
    both, one = shared[1], apart[1]
    assert both.n_weights == 2 * one.n_weights
    assert [(o.type, o.n_bytes / 2, o.cost / 2) for o in both.options] == [
        (o.type, o.n_bytes, o.cost) for o in one.options
    ]


def test_tensors_that_share_a_type_need_one_that_fits_all():
    wide = tensor("blk.0.a.weight", "routed_expert.gate", 0, 4, 256)
    narrow = tensor("blk.0.b.weight", "routed_expert.up", 0, 4, 128)
    assert set(options_of(wide, narrow, share=GATE_UP)) == set(options_of(narrow))


def test_an_infinite_cost_strikes_a_type_out():
    def unmeasured(_spec, type_):
        return 1.0 if type_ is GgmlType.Q4_K else float("inf")

    assert set(options_of(tensor("t.weight", "r", 0), cost=unmeasured)) == {GgmlType.Q4_K}
    with pytest.raises(UsageError, match="struck out"):
        options_of(tensor("t.weight", "r", 0), cost=lambda *_: float("inf"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_cost_that_is_no_number_is_refused(value):
    with pytest.raises(NonFiniteError, match="the cost of"):
        options_of(tensor("t.weight", "r", 0), cost=lambda *_: value)


def test_kimi_k2_5_has_731_tensors_to_decide():
    groups = build_groups(kimi().tensors, bits)
    assert len(kimi().tensors) == 1096
    assert len(groups) == 731
    by_name = {g.name: g for g in groups}
    assert not any(o.type.block_size > 128 for o in by_name["blk.0.attn_k_b.weight"].options)
    assert len(by_name["blk.60.ffn_down_exps.weight"].options) >= 15
