"""Recipes: what they accept, what they refuse, and which rule decides."""

from __future__ import annotations

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe import load_recipe, parse_recipe, shipped_names
from quantkit.types import GgmlType, TensorSpec


def tensor(name: str = "blk.3.ffn_up_exps.weight", role: str = "routed_expert.up", layer: int = 3):
    return TensorSpec(name, role, layer, (8, 64, 256))


def recipe(rules: str):
    return parse_recipe(f"name: r\ndefault: Q8_0\nrules:\n{rules}", where="test")


def test_the_first_matching_rule_decides():
    mix = recipe("  - {role: 'routed_expert.*', type: Q4_0}\n  - {layers: 3, type: F16}")
    assert mix.type_of(tensor(), 4) is GgmlType.Q4_0
    assert mix.type_of(tensor(role="dense_ffn.up"), 4) is GgmlType.F16
    assert mix.type_of(tensor(role="dense_ffn.up", layer=2), 4) is GgmlType.Q8_0


def test_all_conditions_of_a_rule_have_to_hold():
    mix = recipe("  - {role: 'routed_expert.*', layers: 0-2, type: Q4_0}")
    assert mix.type_of(tensor(layer=3), 4) is GgmlType.Q8_0
    assert mix.type_of(tensor(layer=2), 4) is GgmlType.Q4_0


@pytest.mark.parametrize(
    ("layers", "inside"),
    [("0-3,7", {0, 1, 2, 3, 7}), ("-1", {9}), ("-2--1", {8, 9}), ("5", {5}), ("8-20", {8, 9})],
)
def test_layer_lists(layers, inside):
    mix = recipe(f"  - {{layers: '{layers}', type: F16}}")
    hit = {i for i in range(10) if mix.type_of(tensor(layer=i), 10) is GgmlType.F16}
    assert hit == inside


def test_tensor_patterns_are_searched_for_like_llama_quantizes():
    mix = recipe(r"  - {tensor: 'ffn_(up|gate)_exps', type: Q4_1}")
    assert mix.type_of(tensor(), 4) is GgmlType.Q4_1
    assert mix.type_of(tensor("blk.3.ffn_down_exps.weight"), 4) is GgmlType.Q8_0


def test_a_pattern_that_runs_away_is_refused():
    mix = recipe(r"  - {tensor: '(a|a)*(b|b)*((a|aa)+)+$', type: Q4_1}")
    with pytest.raises(RecipeError, match="takes too long"):
        mix.type_of(tensor("a" * 62 + "!"), 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: r\ndefault: Q8_0\ncolour: red", "unknown key colour"),
        ("name: r\ndefault: Q8_0\nrules: [{typo: x, type: F16}]", "unknown key rules.0.typo"),
        ("name: r\ndefault: Q9_9", "unknown type 'Q9_9'"),
        ("name: r", "default"),
        ("default: Q8_0", "name"),
        ("name: ../x\ndefault: Q8_0", "name"),
        ("name: r\ndefault: Q8_0\nrules: [{layers: abc, type: F16}]", "layers should look like"),
        ("name: r\ndefault: Q8_0\nrules: [{tensor: '(', type: F16}]", "not a regular expression"),
        ("name: r\ndefault: Q8_0\ndefault: F16", "given twice"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("name: !!python/object/apply:os.system [ls]\ndefault: Q8_0", "not valid YAML"),
        ("- 1\n- 2", "recipe"),
        ("name: [", "not valid YAML"),
        ("name: r\ndefault: Q8_0\neffort: heroic", "effort"),
        ("name: r\ndefault: Q8_0\nsampling: {top_p: 2}", "sampling.top_p"),
        ("name: r\ndefault: Q8_0\nsampling: {heat: 2}", "unknown key sampling.heat"),
        ("", "recipe"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_key(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(text, where="mine.yaml")
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize("name", ["nope", "../recipes/q4_x", "/etc/passwd", "x/y.yaml"])
def test_an_unknown_recipe_is_refused(name):
    with pytest.raises(RecipeError):
        load_recipe(name)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_load_and_say_what_they_are_for(name):
    shipped = load_recipe(name)
    assert shipped.description
    assert shipped.name.lower() == name


def test_the_digest_follows_meaning_not_prose():
    one = parse_recipe("name: r\ndefault: Q8_0\ndescription: a", where="")
    two = parse_recipe("# c\ndefault: q8_0\nname: r\ndescription: b", where="")
    other = parse_recipe("name: r\ndefault: Q8_0\neffort: best", where="")
    assert one.digest() == two.digest() != other.digest()
