"""`general.file_type`: which of llama.cpp's presets a file says it is."""

from __future__ import annotations

import pytest
from gguf import LlamaFileType

from quantkit.errors import RecipeError
from quantkit.plan.build import TypeChooser, file_type
from quantkit.quantize.codec import encodable
from quantkit.recipe import FILE_TYPES, load_recipe, parse_recipe, shipped_names
from quantkit.types import GgmlType, TensorSpec

# Added to llama.cpp after the last release of the gguf package.
NEWER = {"Q2_0": 41}
THEIRS = {
    member.name.removeprefix("MOSTLY_").removeprefix("ALL_"): member.value
    for member in LlamaFileType
    if member is not LlamaFileType.GUESSED
}
TENSORS = (
    TensorSpec("output.weight", "output", None, (256, 512)),
    TensorSpec("blk.0.ffn_up.weight", "dense_ffn.up", 0, (1024, 512)),
    TensorSpec("blk.0.ffn_norm.weight", "norm", 0, (512,), keep=GgmlType.F32),
)


def declared(recipe):
    return file_type(TENSORS, TypeChooser(recipe, TENSORS, frozenset(GgmlType)))


def test_names_and_numbers_are_llama_cpps():
    assert FILE_TYPES == THEIRS | NEWER


@pytest.mark.parametrize("name", [n for n in shipped_names() if not n.startswith(("ud-", "q4_x"))])
def test_a_preset_declares_its_own_number(name):
    assert declared(load_recipe(name)) == (THEIRS | NEWER)[name.upper()]


def test_a_mix_that_is_no_preset_declares_the_type_of_most_weights():
    mix = "name: r\ndefault: Q8_0\nrules: [{role: dense_ffn.*, type: Q4_0}]"
    assert declared(parse_recipe(mix, where="")) == LlamaFileType.MOSTLY_Q4_0
    assert load_recipe("q4_x").file_type is None


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("ud-tq1_0", "IQ1_S"),
        ("ud-iq1_s", "IQ1_S"),
        ("ud-iq1_m", "IQ1_M"),
        ("ud-iq2_xxs", "IQ2_XXS"),
        ("ud-iq2_m", "IQ2_M"),
        ("ud-q2_k_xl", "Q2_K"),
        ("ud-iq3_xxs", "IQ3_XXS"),
        ("ud-q3_k_xl", "Q3_K_M"),
        ("ud-q4_k_xl", "Q4_K_M"),
        ("ud-q5_k_xl", "Q5_K_M"),
        ("ud-q6_k_xl", "Q6_K"),
        ("ud-q8_k_xl", "Q8_0"),
    ],
)
def test_a_dynamic_recipe_declares_the_nearest_preset(name, preset):
    assert declared(load_recipe(name)) == THEIRS[preset]


@pytest.mark.parametrize("type_", sorted(encodable()), ids=lambda t: t.name)
def test_every_type_that_a_recipe_may_name_has_a_preset(type_):
    number = declared(parse_recipe(f"name: r\ndefault: {type_.name}", where=""))
    (name,) = (name for name, value in (THEIRS | NEWER).items() if value == number)
    assert name in {type_.name, f"{type_.name}_M", f"{type_.name}_MOE"}


def test_a_recipe_may_declare_another_preset():
    mix = parse_recipe("name: r\nfile_type: iq2_m\ndefault: Q8_0", where="")
    assert declared(mix) == LlamaFileType.MOSTLY_IQ2_M


def test_a_preset_that_llama_cpp_does_not_have_is_refused():
    with pytest.raises(RecipeError, match="file_type: unknown file type 'Q4_X'"):
        parse_recipe("name: r\nfile_type: Q4_X\ndefault: Q8_0", where="mine.yaml")
