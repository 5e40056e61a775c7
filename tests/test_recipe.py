"""Recipes: what they accept, what they refuse, and which rule decides."""

from __future__ import annotations

import pytest
import yaml

from quantkit.errors import RecipeError
from quantkit.recipe import load_recipe, parse_recipe, shipped_names
from quantkit.types import GgmlType, Slab, TensorRef, TensorSpec, Weight, WeightFormat


def tensor(
    layer: int | None = 3,
    role: str = "routed_expert.up",
    name: str = "ffn_up_exps",
    shape: tuple[int, ...] = (8, 64, 256),
    keep: GgmlType | None = None,
):
    block = "" if layer is None else f"blk.{layer}."
    return TensorSpec(f"{block}{name}.weight", role, layer, shape, keep=keep)


def layers(n: int, role: str = "routed_expert.up", name: str = "ffn_up_exps"):
    return [tensor(i, role, name) for i in range(n)]


def recipe(rules: str):
    return parse_recipe(f"name: r\ndefault: Q8_0\nrules:\n{rules}", where="test")


def type_of(mix, *tensors: TensorSpec):
    """The type of the first of a model's tensors."""
    return mix.assign(tensors)[tensors[0].name]


def f16_layers(mix, tensors):
    types = mix.assign(tensors)
    return {t.layer for t in tensors if types[t.name] is GgmlType.F16}


def test_the_first_matching_rule_decides():
    mix = recipe("  - {role: 'routed_expert.*', type: Q4_0}\n  - {layers: 3, type: F16}")
    assert type_of(mix, tensor()) is GgmlType.Q4_0
    assert type_of(mix, tensor(role="dense_ffn.up")) is GgmlType.F16
    assert type_of(mix, tensor(2, "dense_ffn.up")) is GgmlType.Q8_0


def test_all_conditions_of_a_rule_have_to_hold():
    mix = recipe("  - {role: 'routed_expert.*', layers: 0-2, type: Q4_0}")
    assert type_of(mix, tensor(3)) is GgmlType.Q8_0
    assert type_of(mix, tensor(2)) is GgmlType.Q4_0


def test_tensors_that_keep_their_type_are_no_matter_for_a_recipe():
    kept = tensor(keep=GgmlType.F32)
    assert recipe("  - {first: 1, type: F16}").assign([kept, tensor(4)]) == {
        "blk.4.ffn_up_exps.weight": GgmlType.F16
    }


@pytest.mark.parametrize(
    ("chosen", "n_layers", "inside"),
    [
        ("0-3,7", 10, {0, 1, 2, 3, 7}),
        ("-1", 10, {9}),
        ("-2--1", 10, {8, 9}),
        ("5", 10, {5}),
        ("8-20", 10, {8, 9}),
        ("0-1/8", 7, set()),
        ("0-1/8", 8, {0}),
        ("0-1/8", 27, {0, 1, 2}),
        ("1/8-7/8", 10, {1, 2, 3, 4, 5, 6, 7}),
        ("7/8--1", 10, {8, 9}),
        ("3/4-1/1", 8, {6, 7}),
        ("0 - 1/8, -1", 16, {0, 1, 15}),
        ("more-bits", 2, {1}),
        ("more-bits", 16, {0, 1, 4, 7, 10, 13, 14, 15}),
        ("more-bits,2", 16, {0, 1, 2, 4, 7, 10, 13, 14, 15}),
    ],
)
def test_layer_lists(chosen, n_layers, inside):
    mix = recipe(f"  - {{layers: '{chosen}', type: F16}}")
    assert f16_layers(mix, layers(n_layers)) == inside


@pytest.mark.parametrize(("first", "inside"), [("2", {0, 1}), ("1/8", {0}), ("0", set())])
def test_first_stops_a_rule_after_so_many_tensors_of_the_file(first, inside):
    mix = recipe(f"  - {{role: '*.up', first: {first}, type: F16}}")
    assert f16_layers(mix, layers(10)[::-1]) == inside


def test_first_counts_the_tensors_that_the_rule_decides():
    mix = recipe("  - {layers: 0, type: Q4_0}\n  - {role: '*.up', first: 2, type: F16}")
    both = layers(4) + layers(4, "shared_expert.up", "ffn_up_shexp")
    types = mix.assign([*both, *layers(4, "routed_expert.down", "ffn_down_exps")])
    assert [name for name, type_ in types.items() if type_ is GgmlType.F16] == [
        "blk.1.ffn_up_exps.weight",
        "blk.1.ffn_up_shexp.weight",
    ]


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("experts: 8", True),
        ("experts: 9", False),
        ("experts: 4+", True),
        ("experts: 9+", False),
        ("gqa: 4", True),
        ("gqa: 5+", False),
        ("n_layers: 4", True),
        ("n_layers: 3", False),
    ],
)
def test_a_rule_may_ask_for_a_number_of_the_model(condition, holds):
    mix = recipe(f"  - {{{condition}, type: F16}}")
    model = [
        tensor(3, "routed_expert.down", "ffn_down_exps", (8, 64, 256)),
        tensor(0, "attention.q", "attn_q", (512, 256)),
        tensor(0, "attention.k", "attn_k", (128, 256)),
    ]
    assert (type_of(mix, *model) is GgmlType.F16) is holds


def test_a_model_without_experts_or_grouped_queries_has_none():
    mix = recipe("  - {experts: 1+, type: F16}\n  - {gqa: 1+, type: F16}")
    assert type_of(mix, tensor(0, "attention.q", "attn_q", (512, 256))) is GgmlType.Q8_0


def test_the_embedding_is_the_head_too_where_there_is_no_other():
    mix = recipe("  - {role: output, type: F16}\n  - {role: token_embd, type: Q4_0}")
    embedding = tensor(None, "token_embd", "token_embd", (512, 256))
    head = tensor(None, "output", "output", (512, 256))
    assert type_of(mix, embedding) is GgmlType.F16
    assert type_of(mix, embedding, head) is GgmlType.Q4_0
    assert type_of(recipe("  - {role: token_embd, type: Q4_0}"), embedding) is GgmlType.Q4_0


@pytest.mark.parametrize(("n_cols", "given"), [(512, "Q5_K"), (576, "Q8_0")])
def test_otherwise_is_the_type_where_rows_do_not_divide(n_cols, given):
    mix = recipe("  - {type: Q5_K, otherwise: Q8_0}")
    assert type_of(mix, tensor(shape=(64, n_cols))) is GgmlType[given]


def stored(*formats: str) -> TensorSpec:
    """A tensor whose weights the checkpoint stores in these formats."""
    ref = TensorRef("w", "I32", (8, 256), "model.safetensors", 0, 0)
    weights = [Weight("w", WeightFormat(name), (8, 256), ref) for name in formats]
    slabs = tuple(Slab(weight, 0, 8) for weight in weights)
    shape = (len(slabs), 8, 256)
    return TensorSpec("blk.1.ffn_up_exps.weight", "routed_expert.up", 1, shape, slabs)


@pytest.mark.parametrize(
    ("formats", "given"),
    [
        (["int4-g32", "int4-g32"], "Q4_0"),
        (["bf16", "bf16"], "Q8_0"),
        (["int4-g32", "bf16"], "Q8_0"),
        ([], "Q8_0"),
    ],
)
def test_a_rule_may_ask_how_the_checkpoint_stores_all_of_a_tensor(formats, given):
    mix = recipe("  - {role: 'routed_expert.*', source: int4-g32, type: Q4_0}")
    assert type_of(mix, stored(*formats)) is GgmlType[given]


def test_types_are_all_that_a_recipe_may_ask_for():
    mix = recipe("  - {layers: 0, type: Q5_K, otherwise: Q4_0}\n  - {layers: 1, type: Q6_K}")
    assert {t.name for t in mix.types()} == {"Q8_0", "Q5_K", "Q4_0", "Q6_K"}


def test_tensor_patterns_are_searched_for_like_llama_quantizes():
    mix = recipe(r"  - {tensor: 'ffn_(up|gate)_exps', type: Q4_1}")
    assert type_of(mix, tensor()) is GgmlType.Q4_1
    assert type_of(mix, tensor(name="ffn_down_exps")) is GgmlType.Q8_0


def test_a_pattern_that_runs_away_is_refused():
    mix = recipe(r"  - {tensor: '(a|a)*(b|b)*((a|aa)+)+$', type: Q4_1}")
    with pytest.raises(RecipeError, match="takes too long"):
        mix.assign([tensor(None, name="a" * 55 + "!")])


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
        ("name: r\ndefault: Q8_0\nrules: [{layers: 1/8, type: F16}]", "layers should look like"),
        ("name: r\ndefault: Q8_0\nrules: [{layers: 0-1/0, type: F16}]", "layers should look like"),
        ("name: r\ndefault: Q8_0\nrules: [{layers: [0], type: F16}]", "rules.0.layers"),
        ("name: r\ndefault: Q8_0\nrules: [{source: int3, type: F16}]", "rules.0.source.*int4-g32"),
        ("name: r\ndefault: Q8_0\nrules: [{experts: many, type: F16}]", "rules.0.experts"),
        ("name: r\ndefault: Q8_0\nrules: [{gqa: -4, type: F16}]", "rules.0.gqa"),
        ("name: r\ndefault: Q8_0\nrules: [{n_layers: true, type: F16}]", "rules.0.n_layers"),
        ("name: r\ndefault: Q8_0\nrules: [{first: 1/0, type: F16}]", "rules.0.first"),
        ("name: r\ndefault: Q8_0\nrules: [{type: F16, otherwise: Q9}]", "unknown type 'Q9'"),
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


@pytest.mark.parametrize("name", shipped_names())
def test_the_canonical_form_is_a_recipe_of_the_same_digest(name):
    shipped = load_recipe(name)
    text = yaml.safe_dump(shipped.canonical(), sort_keys=False)
    assert parse_recipe(text, where="").digest() == shipped.digest()
