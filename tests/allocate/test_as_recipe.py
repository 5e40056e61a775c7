"""An assignment written as a recipe gives the same types when it is read and planned again."""

from __future__ import annotations

import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.allocate.as_recipe import allocated_yaml, as_recipe, as_yaml
from quantkit.allocate.choices import GATE_UP, Floor, Legal, build_groups
from quantkit.allocate.solve import solve
from quantkit.errors import RecipeError
from quantkit.plan.build import TypeChooser
from quantkit.recipe import load_recipe, parse_recipe
from quantkit.types import GgmlType
from tests.allocate.models import kimi, made_up_costs, tensor

T = GgmlType
NORM = tensor("output_norm.weight", "norm", None, 512, keep=T.F32)


def experts(n_layers, parts=("gate", "up", "down"), first=0):
    return [
        tensor(f"blk.{layer}.ffn_{part}_exps.weight", f"routed_expert.{part}", layer, 2, 4, 256)
        for layer in range(first, n_layers)
        for part in parts
    ]


def planned_types(text, specs):
    """What the planner makes of a recipe's text, by tensor that it may change."""
    chooser = TypeChooser(parse_recipe(text, where="test"), specs, frozenset(GgmlType))
    return {spec.name: chooser.choose(spec).type for spec in specs if spec.keep is None}


def rules_of(specs, types):
    return [
        (rule.role, rule.layers, rule.type)
        for rule in as_recipe(specs, types, "r").rules
        if rule.tensor is None
    ]


ROLES = (
    "token_embd",
    "output",
    "attention.q",
    "attention.k",
    "ffn",
    "ffn.up",
    "ffn.gate",
    "odd_one",
)


@st.composite
def models(draw):
    """Any tensors of any roles, several of a role in a layer among them, with any types."""
    types = st.sampled_from([T.Q2_K, T.IQ1_S, T.Q8_0])
    specs, chosen = [], {}
    for i in range(draw(st.integers(1, 30))):
        layer = draw(st.one_of(st.none(), st.integers(0, 8)))
        spec = tensor(f"t.{i}.weight", draw(st.sampled_from(ROLES)), layer)
        specs.append(spec)
        chosen[spec.name] = draw(types)
    return [*specs, NORM], chosen


@given(models())
@settings(deadline=None)
def test_any_assignment_comes_back_tensor_by_tensor(model):
    specs, types = model
    assert planned_types(as_yaml(specs, types, "r"), specs) == types


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [(), GATE_UP], ids=["apart", "gate and up share"])
def test_kimi_k2_5s_allocation_comes_back_tensor_by_tensor(seed, share):
    specs = kimi().tensors
    floors = (Floor("attention.*", T.Q5_K),)
    groups = build_groups(specs, made_up_costs(seed), Legal(floors=floors, share=share))
    found = solve(groups, int(240e9))
    text = allocated_yaml(specs, found, "k-240", target="240 GB", unit="nats of KL")
    assert planned_types(text, specs) == found.types()
    assert len(parse_recipe(text, where="").rules) < 100


def test_random_types_for_every_tensor_of_kimi_come_back():
    specs = kimi().tensors
    rng = random.Random(7)
    fitting = [T.Q8_0, T.Q4_0, T.Q5_0]
    types = {spec.name: rng.choice(fitting) for spec in specs if spec.keep is None}
    assert planned_types(as_yaml(specs, types, "r"), specs) == types


def test_rules_go_by_role_and_layers_exceptions_first():
    specs = [*experts(8, ("down",)), tensor("output.weight", "output", None)]
    types = {spec.name: T.IQ1_S for spec in specs}
    for layer in (0, 1, 2, 5):
        types[f"blk.{layer}.ffn_down_exps.weight"] = T.IQ2_XXS
    types["blk.7.ffn_down_exps.weight"] = T.Q2_K
    types["output.weight"] = T.Q6_K
    assert rules_of(specs, types) == [
        ("routed_expert.down", "7", T.Q2_K),
        ("routed_expert.down", "3-4,6", T.IQ1_S),
        ("routed_expert.down", None, T.IQ2_XXS),
        ("output", None, T.Q6_K),
    ]


def test_ranges_run_over_layers_that_a_role_does_not_have():
    specs = [s for s in experts(6, ("down",)) if s.layer not in (0, 3)]
    types = {spec.name: T.Q2_K if spec.layer in (2, 4) else T.IQ1_S for spec in specs}
    types["blk.5.ffn_down_exps.weight"] = T.IQ1_S
    assert rules_of(
        [*specs, *experts(7, ("down",), 6)], types | {"blk.6.ffn_down_exps.weight": T.IQ1_S}
    )[0] == ("routed_expert.down", "2-4", T.Q2_K)


def test_roles_with_the_same_types_share_their_rules():
    specs = experts(4)
    types = {
        s.name: T.Q3_K if s.role.endswith("down") else T.IQ1_M if s.layer == 0 else T.IQ1_S
        for s in specs
    }
    assert rules_of(specs, types) == [
        ("routed_expert.[gu]*", "0", T.IQ1_M),
        ("routed_expert.[gu]*", None, T.IQ1_S),
        ("routed_expert.down", None, T.Q3_K),
    ]
    assert rules_of(specs, dict.fromkeys(types, T.IQ1_S)) == [("routed_expert.*", None, T.IQ1_S)]


def test_tensors_that_role_and_layer_do_not_tell_apart_are_named():
    specs = [tensor(f"blk.0.{n}.weight", "attention.q", 0) for n in ("a+", "b", "c")]
    types = dict(zip((s.name for s in specs), (T.Q8_0, T.Q2_K, T.Q2_K), strict=True))
    assert [r.tensor for r in as_recipe(specs, types, "r").rules] == [
        r"^blk\.0\.a\+\.weight$",
        None,
    ]


def test_the_head_says_what_it_is_and_every_rule_what_it_decides():
    specs = [tensor("output.weight", "output", None, 4, 256), *experts(2, ("down",))]
    groups = build_groups(specs, made_up_costs(1), Legal(types=(T.Q4_K,)))
    found = solve(groups, 10_000)
    text = allocated_yaml(specs, found, "mine", target="10 kB", unit="nats of KL")
    head, comments = text.splitlines()[:3], [x for x in text.splitlines() if x.startswith("  #")]
    assert head == [
        "# mine: 4.500 bits per weight, 3 kB of tensors.",
        "# Allocated for 10 kB.",
        f"# Predicted cost: {found.cost:.6g} nats of KL; no assignment of this size has less.",
    ]
    assert comments == [
        "  # output: 576 bytes, 4.5 bits per weight",
        "  # all 2 routed_expert.down: 2 kB, 4.5 bits per weight",
    ]


def test_other_settings_are_taken_from_another_recipe():
    like = parse_recipe(
        "name: a\ndefault: Q8_0\neffort: best\ngain: 0.5\nsampling: {temp: 1.0, top_p: 0.95}",
        where="",
    )
    specs = experts(2)
    made = as_recipe(specs, {s.name: T.Q4_K for s in specs}, "b", like=like)
    assert (made.name, made.effort, made.gain, made.sampling) == ("b", "best", 0.5, like.sampling)
    assert made.file_type is None


@pytest.mark.parametrize("like", ["q4_x", "iq1_m", "bf16"])
def test_shipped_recipes_can_be_taken_over(like):
    specs = experts(1)
    made = as_recipe(specs, {s.name: T.Q4_K for s in specs}, "b", like=load_recipe(like))
    kept = {"name", "description", "file_type", "default", "rules"}
    assert made.model_dump(exclude=kept) == load_recipe(like).model_dump(exclude=kept)


@pytest.mark.parametrize(
    "prose", ["a: b # c", "two\nlines", '"quoted"', "é → 🌙", "- [x", "\x7f\x85", "%TAG", "null"]
)
def test_prose_comes_back_as_it_was(prose):
    specs = experts(1)
    types = {s.name: T.Q4_K for s in specs}
    assert as_recipe(specs, types, "b", description=prose, about=[prose]).description == prose


@pytest.mark.parametrize("name", ["null", "yes", "1e3", "2026-01-01", "0x10", "1.9bpw"])
def test_names_that_yaml_would_take_for_something_else_stay_names(name):
    specs = experts(1)
    text = as_yaml(specs, {s.name: T.Q4_K for s in specs}, name)
    assert yaml.safe_load(text)["name"] == name


def test_a_name_that_no_recipe_may_have_is_refused():
    specs = experts(1)
    with pytest.raises(RecipeError, match="name"):
        as_recipe(specs, {s.name: T.Q4_K for s in specs}, "a\nrules: []")
