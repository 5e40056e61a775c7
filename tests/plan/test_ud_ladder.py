"""The dynamic ladder: sizes on Kimi K2.5's real index, and what each step keeps high."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import _kimi
import pytest

from quantkit.arch.base import Config
from quantkit.arch.llama import Llama
from quantkit.arch.registry import describe_text
from quantkit.plan.build import TypeChooser
from quantkit.quantize.codec import encodable
from quantkit.recipe import load_recipe, shipped_names
from quantkit.source.checkpoint import open_checkpoint
from quantkit.types import GgmlType, TensorSpec, WeightFormat
from tests.plan.test_presets import AnyWeights, deepseek, fixture, mixture
from tests.source.kimi_sized import write_kimi_sized

ROOT = Path(__file__).parents[2]
T = GgmlType

# GB (10^9 bytes) of Kimi K2.5's tensors
KIMI_K2_5 = {
    "ud-tq1_0": 239.36,
    "ud-iq1_s": 261.21,
    "ud-iq1_m": 285.10,
    "ud-iq2_xxs": 307.74,
    "ud-iq2_m": 334.52,
    "ud-q2_k_xl": 371.49,
    "ud-iq3_xxs": 410.85,
    "ud-q3_k_xl": 457.36,
    "ud-q4_k_xl": 583.70,
    "ud-q5_k_xl": 584.42,
    "ud-q6_k_xl": 589.49,
    "ud-q8_k_xl": 594.54,
}
LADDER = list(KIMI_K2_5)
LOSSLESS = LADDER[-4:]


def llama(n_layers: int, hidden: int, width: int, n_heads: int, n_kv: int, **fields):
    config = {
        "vocab_size": 49152,
        "num_hidden_layers": n_layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv,
        "max_position_embeddings": 8192,
    }
    return Llama().describe(Config(config | fields), AnyWeights())


DENSE = {
    "smollm2 135m": lambda: llama(30, 576, 1536, 9, 3, tie_word_embeddings=True),
    "smollm2 1.7b": lambda: llama(24, 2048, 8192, 32, 32, tie_word_embeddings=True),
    "llama 3.1 8b": lambda: llama(32, 4096, 14336, 32, 8, vocab_size=128256),
    "llama 3.3 70b": lambda: llama(80, 8192, 28672, 64, 8, vocab_size=128256),
}
MIXTURES = {
    "the fixture": fixture,
    "deepseek v3's depth": lambda: deepseek(61, 256, n_dense=3),
    "qwen3 30b-a3b": lambda: mixture(
        llama(48, 2048, 768, 32, 4, vocab_size=151936, head_dim=128), 128
    ),
    "mixtral 8x7b": lambda: mixture(llama(32, 4096, 14336, 32, 8, vocab_size=32000), 8),
}


@dataclass(frozen=True)
class Typed:
    """A tensor and the type that a recipe gives it."""

    spec: TensorSpec
    type: GgmlType
    repack: bool

    @property
    def n_bytes(self) -> int:
        rows, cols = self.spec.grid
        return rows * self.type.row_bytes(cols)


def typed(tensors: Sequence[TensorSpec], recipe: str) -> list[Typed]:
    chooser = TypeChooser(load_recipe(recipe), tensors, encodable())
    choices = (chooser.choose(spec) for spec in tensors if spec.keep is None)
    return [Typed(c.spec, c.type, c.repack) for c in choices]


def gigabytes(tensors: Sequence[TensorSpec], recipe: str) -> float:
    kept = sum(spec.n_weights * 4 for spec in tensors if spec.keep is T.F32)
    return (kept + sum(t.n_bytes for t in typed(tensors, recipe))) / 1e9


@pytest.fixture(scope="module")
def kimi_k2_5(tmp_path_factory) -> tuple[TensorSpec, ...]:
    """GGUF tensors of K2.5, described from the headers of all its 208,550 tensors."""
    folder = write_kimi_sized(tmp_path_factory.mktemp("k25"))
    with open_checkpoint(folder) as checkpoint:
        config = Config(_kimi.config())
        described = describe_text(config, checkpoint.weights, checkpoint, with_vocab=False)
    assert len(described.tensors) == 1096
    assert {spec.keep for spec in described.tensors} == {None, T.F32}
    return described.tensors


@pytest.fixture(scope="module", params=["kimi k2.5", *MIXTURES])
def mixture_tensors(request) -> tuple[TensorSpec, ...]:
    if request.param == "kimi k2.5":
        return request.getfixturevalue("kimi_k2_5")
    return MIXTURES[request.param]().tensors


@pytest.fixture(scope="module", params=DENSE)
def dense_tensors(request) -> tuple[TensorSpec, ...]:
    return DENSE[request.param]().tensors


def test_the_ladder_is_complete():
    assert [name for name in shipped_names() if name.startswith("ud-")] == sorted(LADDER)


@pytest.mark.parametrize("recipe", LADDER)
def test_the_size_on_kimi_k2_5(kimi_k2_5, recipe):
    assert gigabytes(kimi_k2_5, recipe) == pytest.approx(KIMI_K2_5[recipe], abs=0.006)


def test_the_promised_sizes_leave_room_for_metadata_and_tokenizer(kimi_k2_5):
    assert gigabytes(kimi_k2_5, "ud-tq1_0") < 240 - 0.1
    assert 340 < gigabytes(kimi_k2_5, "ud-q2_k_xl") < 375 - 0.1


@pytest.mark.parametrize("recipe", LADDER)
def test_prose_tells_the_size(kimi_k2_5, recipe):
    size = gigabytes(kimi_k2_5, recipe)
    bpw = size * 8e9 / sum(spec.n_weights for spec in kimi_k2_5)
    comment = (ROOT / "quantkit" / "recipes" / f"{recipe}.yaml").read_text()
    line = re.search(r"([\d.]+) bits per weight on Kimi K2.5, (\d+) GB", comment)
    row = re.search(
        rf"^\| `{recipe}` \| ([\d.]+) \| ([\d.]+) \|", (ROOT / "docs/recipes.md").read_text(), re.M
    )
    assert float(line[1]) == float(row[1]) == pytest.approx(bpw, abs=0.0051)
    assert float(line[2]) == pytest.approx(size, abs=0.51)
    assert float(row[2]) == pytest.approx(size, abs=0.051)


def assert_each_step_is_larger(tensors: Sequence[TensorSpec]) -> None:
    sizes = [gigabytes(tensors, recipe) for recipe in LADDER]
    assert all(low < high for low, high in pairwise(sizes)), sizes
    for low, high in pairwise(LADDER):
        before, after = (bytes_by_role(typed(tensors, recipe)) for recipe in (low, high))
        fallen = {role for role in before if after[role] < before[role]}
        assert not fallen, f"{low} to {high}"


def bytes_by_role(tensors: Sequence[Typed]) -> dict[str, int]:
    total: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        total[tensor.spec.role] += tensor.n_bytes
    return total


def test_each_step_is_larger_and_takes_from_no_role_of_a_mixture(mixture_tensors):
    assert_each_step_is_larger(mixture_tensors)


def test_each_step_is_larger_and_takes_from_no_role_of_a_dense_model(dense_tensors):
    assert_each_step_is_larger(dense_tensors)


@pytest.mark.parametrize("recipe", LADDER)
def test_a_mixture_keeps_high_what_every_token_needs(mixture_tensors, recipe):
    floors = {"token_embd": T.Q5_K, "routed_expert": T.IQ1_S}
    low = {
        (t.spec.name, t.type.name)
        for t in typed(mixture_tensors, recipe)
        if t.type.bpw < floors.get(t.spec.role.split(".")[0], T.Q6_K).bpw
    }
    assert not low


@pytest.mark.parametrize("recipe", LADDER)
def test_a_mixtures_keys_and_values_are_nearly_exact(mixture_tensors, recipe):
    small = [t for t in typed(mixture_tensors, recipe) if t.spec.role.startswith("attention.")]
    small = [t for t in small if t.spec.role.split(".")[1][0] in "kv"]
    assert small
    assert {t.type for t in small} <= {T.Q8_0, T.BF16}


@pytest.mark.parametrize("recipe", LADDER)
def test_a_dense_model_keeps_its_head_and_values_above_the_rest(dense_tensors, recipe):
    floors = {"attention.v": T.Q4_K, "token_embd": T.Q5_K, "output": T.Q6_K}
    if not any(spec.role == "output" for spec in dense_tensors):
        floors["token_embd"] = T.Q6_K
    given = typed(dense_tensors, recipe)
    low = {
        (t.spec.name, t.type.name)
        for t in given
        if t.type.bpw < floors.get(t.spec.role, T.IQ1_S).bpw
        or (t.spec.role.startswith("attention") and t.type.bpw < T.IQ3_XXS.bpw)
    }
    assert not low


@pytest.mark.parametrize("recipe", LADDER)
def test_bits_of_experts_fall_with_depth_and_down_is_never_below_gate_and_up(
    mixture_tensors, recipe
):
    bits: dict[str, dict[int, float]] = defaultdict(dict)
    for tensor in typed(mixture_tensors, recipe):
        stem, _, part = tensor.spec.role.partition(".")
        if stem == "routed_expert":
            bits[part][tensor.spec.layer] = tensor.type.bpw
    assert bits["gate"] == bits["up"]
    assert all(bits["down"][layer] >= low for layer, low in bits["up"].items())
    for of_layer in bits.values():
        first, *middle, last = (of_layer[layer] for layer in sorted(of_layer))
        assert sorted([first, *middle], reverse=True) == [first, *middle]
        assert last >= middle[-1]


@pytest.mark.parametrize("recipe", LOSSLESS)
def test_int4_experts_are_repacked(kimi_k2_5, recipe):
    experts = [t for t in typed(kimi_k2_5, recipe) if t.spec.role.startswith("routed_expert")]
    assert len(experts) == 180
    assert all(t.type is T.Q4_0 and t.repack for t in experts)


def test_ud_q8_k_xl_loses_nothing_of_kimi_k2_5(kimi_k2_5):
    """Every matrix is repacked or BF16 as it was."""
    for tensor in typed(kimi_k2_5, "ud-q8_k_xl"):
        formats = {slab.weight.format for slab in tensor.spec.slabs}
        assert tensor.repack or (tensor.type is T.BF16 and formats == {WeightFormat.BF16})


@pytest.mark.parametrize(
    ("recipe", "low", "high"),
    [
        ("ud-q4_k_xl", "Q4_K", "Q5_K"),
        ("ud-q5_k_xl", "Q5_K", "Q6_K"),
        ("ud-q6_k_xl", "Q6_K", "Q8_0"),
        ("ud-q8_k_xl", "Q8_0", "Q8_0"),
    ],
)
def test_experts_of_another_format_get_the_type_that_the_name_tells(recipe, low, high):
    tensors = deepseek(16, 16, n_dense=2).tensors
    types = {
        role: {t.type.name for t in typed(tensors, recipe) if t.spec.role == role}
        for role in ("routed_expert.up", "routed_expert.gate", "routed_expert.down")
    }
    assert types["routed_expert.up"] == types["routed_expert.gate"] == {low}
    assert types["routed_expert.down"] == {low, high}


@pytest.mark.parametrize("recipe", LADDER)
def test_no_recipe_asks_for_types_that_llama_cpp_is_slow_with_or_that_kimi_breaks_down_with(recipe):
    asked = load_recipe(recipe).types()
    assert not asked & {T.TQ1_0, T.TQ2_0, T.IQ1_M, T.IQ2_S, T.IQ3_S}


@pytest.mark.parametrize("recipe", [name for name in LADDER if name.startswith("ud-q")])
def test_recipes_with_q_in_their_names_hold_no_i_quants(recipe):
    assert not [t.name for t in load_recipe(recipe).types() if t.name.startswith("IQ")]
