"""Which weights are rounded by their inputs, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import _kimi
import pytest

from quantkit.arch.base import Config
from quantkit.arch.registry import describe_text
from quantkit.plan.build import Limits, TypeChooser, build_plan
from quantkit.plan.rounding import Work, forecast, rounded_by_inputs, work
from quantkit.quantize.codec import encodable
from quantkit.recipe import Recipe, load_recipe
from quantkit.source.checkpoint import open_checkpoint
from quantkit.types import GgmlType, Plan, TensorSpec
from tests.plan.test_presets import deepseek, fixture, llama
from tests.source.kimi_sized import write_kimi_sized

T = GgmlType


def plan_of(tensors: Sequence[TensorSpec], recipe: Recipe | str, kvs=None) -> Plan:
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    return build_plan(
        tuple(tensors),
        TypeChooser(recipe, tuple(tensors), encodable()),
        kvs or {},
        stem="m",
        arch="deepseek2",
        recipe_name="r",
        source_fingerprint="",
        limits=Limits(None),
    )


def only(type_: GgmlType, *rules: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"name": "r", "default": type_, "rules": rules})


def roles(plan: Plan) -> set[str]:
    names = rounded_by_inputs(plan)
    return {t.spec.role for t in plan.tensors if t.spec.name in names}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory) -> tuple[TensorSpec, ...]:
    """Every tensor of Kimi K2.5."""
    folder = write_kimi_sized(tmp_path_factory.mktemp("k25"))
    with open_checkpoint(folder) as checkpoint:
        return describe_text(
            Config(_kimi.config()), checkpoint.weights, checkpoint, with_vocab=False
        ).tensors


def test_every_matrix_with_inputs_is_and_what_is_looked_up_is_not():
    plan = plan_of(llama(2).tensors, only(T.Q4_K))
    assert roles(plan) == {
        *("attention.q", "attention.k", "attention.v", "attention.output"),
        *("dense_ffn.gate", "dense_ffn.up", "dense_ffn.down", "output"),
    }
    assert set(rounded_by_inputs(plan).values()) == {T.Q4_K}


def test_a_tied_embedding_is_not_for_it_is_read_before_anything_is_known():
    names = rounded_by_inputs(plan_of(llama(2, tied=True).tensors, only(T.Q4_K)))
    assert names
    assert not any("token_embd" in name or name == "output.weight" for name in names)


@pytest.mark.parametrize("type_", [T.F32, T.F16, T.BF16])
def test_floats_have_no_codes_to_choose(type_):
    assert rounded_by_inputs(plan_of(llama(2).tensors, only(type_))) == {}


def test_blocks_that_are_copied_bit_by_bit_stay():
    model = fixture()
    plan = plan_of(model.tensors, "q4_x")
    copied = {t.spec.name for t in plan.tensors if t.repack}
    assert copied
    assert not copied & set(rounded_by_inputs(plan))
    assert copied <= set(rounded_by_inputs(plan_of(model.tensors, only(T.Q4_K))))


@pytest.mark.parametrize(("type_", "are"), [(T.IQ2_XXS, True), (T.Q5_0, True), (T.Q8_0, False)])
def test_heads_are_only_where_there_is_much_to_gain(type_, are):
    found = roles(plan_of(deepseek(2, 8).tensors, only(type_)))
    assert ({"attention.k_b", "attention.v_b"} <= found) == are
    assert "attention.output" in found


def test_a_recipe_with_one_low_type_leaves_other_matrices_alone():
    recipe = only(T.BF16, {"role": "routed_expert.down", "type": T.IQ2_XXS})
    plan = plan_of(deepseek(3, 8).tensors, recipe)
    low = {n: t for n, t in rounded_by_inputs(plan).items() if t is T.IQ2_XXS}
    assert set(low) == {f"blk.{layer}.ffn_down_exps.weight" for layer in (1, 2)}
    assert not {n for n in rounded_by_inputs(plan) if "attn" in n or "up_exps" in n}


def test_kimi_k2_5_is_a_trillion_weights_and_thirty_two_billion_of_them_a_token(kimi):
    told = work(plan_of(kimi, only(T.Q2_K)), 8)
    assert told.n_weights == pytest.approx(1.025e12, rel=0.005)
    assert told.token_flops == pytest.approx(2 * 2 * 32e9, rel=0.05)
    assert told.widest == 8192  # the dense layer's 18,432 are taken in parts
    # Each weight's row meets its Gram matrix in the feedback, the descent and the refit.
    experts = 60 * 384 * 3 * 7168 * 2048
    rows = 2 * 2.5 * experts * (2 / 3 * 7168 + 2048 / 3)
    assert rows < told.round_flops < 1.2 * rows
    assert told.n_token_bytes < 1 << 20, "two hidden states and what a projection is kept of"


def test_only_rounded_weights_take_work_but_all_are_run(kimi):
    all_of_it = work(plan_of(kimi, only(T.Q2_K)), 8)
    dense = work(plan_of(kimi, "q4_x"), 8)  # experts are copied
    assert dense.n_weights < 0.02 * all_of_it.n_weights
    assert dense.round_flops < 0.05 * all_of_it.round_flops
    assert dense.token_flops == all_of_it.token_flops
    nothing = work(plan_of(llama(2).tensors, only(T.F16)), 0)
    assert (nothing.n_weights, nothing.round_flops, nothing.widest) == (0, 0, 0)


def assert_less(less: Work, more: Work) -> None:
    for field in fields(Work):
        assert getattr(less, field.name) <= getattr(more, field.name), field.name
    assert less.n_weights < more.n_weights
    assert less.round_flops < more.round_flops


def test_more_of_anything_takes_more():
    recipe = only(T.Q2_K)
    base = work(plan_of(deepseek(4, 8).tensors, recipe), 2)
    for more in (deepseek(8, 8), deepseek(4, 32), deepseek(4, 8, hidden=512)):
        assert_less(base, work(plan_of(more.tensors, recipe), 2))
    used = work(plan_of(deepseek(4, 8).tensors, recipe), 4)
    assert used.token_flops > base.token_flops
    assert replace(used, token_flops=base.token_flops) == base


def test_a_dense_model_runs_all_its_weights_for_a_token():
    model = llama(3)
    n_layered = sum(t.n_weights for t in model.tensors if len(t.shape) > 1 and t.layer is not None)
    assert work(plan_of(model.tensors, only(T.Q4_K)), 0).token_flops == 2 * 2 * n_layered


def test_no_more_experts_are_run_than_there_are():
    plan = plan_of(deepseek(4, 8).tensors, only(T.Q2_K))
    assert work(plan, 8) == work(plan, 100)


def test_a_forecast_is_longer_for_more_tokens_and_fewer_threads(monkeypatch):
    monkeypatch.setattr("quantkit.plan.rounding._flops_per_second", lambda: 1e9)
    model = deepseek(4, 8)
    plan = plan_of(model.tensors, only(T.Q2_K), model.kvs)
    base = forecast(plan, 1000, 2)
    assert base.seconds > 0
    assert forecast(plan, 2000, 2).seconds > base.seconds
    assert forecast(plan, 1000, 1).seconds > base.seconds
    used = model.kvs["deepseek2.expert_used_count"].value
    assert base.work == work(plan, used)
