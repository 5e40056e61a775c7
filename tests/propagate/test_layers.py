"""Every weight is taken once, with the inputs that it will have when all before it is quantised.

The oracle is a run by `Stream.advance` alone: of the teacher, and of the finished student sent
through the teacher's experts. What is handed over must be the sums of those runs' inputs.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from quantkit.forward.stream import Stream
from quantkit.propagate.student import StudentWeights
from quantkit.propagate.sweep import held_back
from tests.forward.support import ArrayWeights
from tests.propagate.support import (
    IDS,
    MODELS,
    Plain,
    Remembering,
    Shown,
    coarse,
    deepseek_model,
    passed_pair,
    plain_run,
    same,
    untouched,
    weights_of,
)

# The order within a layer, of every kind of layer.
ORDER = [
    *("attn_q", "attn_q_a", "attn_kv_a_mqa", "attn_k", "attn_v", "attn_q_b"),
    *("attn_k_b", "attn_v_b", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    *("ffn_gate_inp", "exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["whole", "in blocks"])
def blocks(request, monkeypatch) -> None:
    """All tokens at once, or a sequence or two at a time."""
    if request.param == "in blocks":
        monkeypatch.setattr(Stream, "n_block", 50)


def run(model: ArrayWeights, monkeypatch, change=coarse, wanted=None):
    student = StudentWeights(model, untouched)
    wanted = weights_of(model) if wanted is None else wanted
    quantiser = Remembering(model, student, wanted, change)
    hidden = passed_pair(model, student, quantiser, monkeypatch)
    return quantiser, hidden


def part_of(name: str) -> str:
    return name.split(".")[-2]


@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_is_taken_exactly_once(kind, blocks, monkeypatch):
    model = MODELS[kind]()
    quantiser, _ = run(model, monkeypatch)
    counts = Counter((s.name, s.matrix) for s in quantiser.shown)
    expected = {
        (name, matrix)
        for name in weights_of(model)
        for matrix in range(len(model.arrays[name]) if model.arrays[name].ndim == 3 else 1)
    }
    assert set(counts) == expected
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("kind", MODELS)
def test_the_order_is_that_of_the_computation(kind, monkeypatch):
    quantiser, _ = run(MODELS[kind](), monkeypatch)
    places = []
    for shown in quantiser.shown:
        if shown.name == "output.weight":
            places.append((99, 0, 0, 0))
            continue
        part, layer = part_of(shown.name), int(shown.name.split(".")[1])
        if part.endswith("_exps"):
            inner = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"].index(part)
            places.append((layer, ORDER.index("exps"), shown.matrix, inner))
        else:
            places.append((layer, ORDER.index(part), shown.matrix, 0))
    assert places == sorted(places)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_not_wanted_is_not_taken_and_stays(kind, monkeypatch):
    model = MODELS[kind]()
    wanted = weights_of(model)[::2]
    quantiser, (_, pupil) = run(model, monkeypatch, wanted=wanted)
    assert {s.name for s in quantiser.shown} == set(wanted)
    teacher = plain_run(model, monkeypatch)
    final = plain_run(quantiser.final, monkeypatch, teacher.routes)
    torch.testing.assert_close(pupil, final.hidden[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_quantised_is_nothing_changed(kind, blocks, monkeypatch):
    model = MODELS[kind]()
    quantiser, (teacher, pupil) = run(model, monkeypatch, same)
    assert torch.equal(teacher, pupil)
    assert not any(s.all.drift.any() for s in quantiser.shown)
    assert not any(s.all.residual.any() for s in quantiser.shown if s.all.residual is not None)
    plain = plain_run(model, monkeypatch)
    torch.testing.assert_close(teacher, plain.hidden[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_both_runs_end_where_plain_runs_end(kind, blocks, monkeypatch):
    model = MODELS[kind]()
    quantiser, (teacher, pupil) = run(model, monkeypatch)
    plain = plain_run(model, monkeypatch)
    final = plain_run(quantiser.final, monkeypatch, plain.routes)
    torch.testing.assert_close(teacher, plain.hidden[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pupil, final.hidden[-1], rtol=1e-4, atol=1e-5)
    assert (teacher - pupil).abs().max() > 0.05, "or there was nothing to compare"


class Oracle:
    """What one matrix should have been shown, from runs by `Stream.advance`."""

    def __init__(
        self, model: ArrayWeights, final: ArrayWeights, monkeypatch, *, own: bool = False
    ) -> None:
        """`own` says that experts' gates and ups are shown their own tokens."""
        self._models, self._monkeypatch, self._own = (model, final), monkeypatch, own
        self._plain = plain_run(model, monkeypatch)
        self.runs = (self._plain, self._run(final))

    def _run(self, weights: ArrayWeights) -> Plain:
        return plain_run(weights, self._monkeypatch, self._plain.routes)

    def gram_and_drift(self, name: str, matrix: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """With the weight f64[n_tok] of each of the tokens, which are all or the expert's."""
        x, student = (self._inputs(run, name, matrix) for run in self.runs)
        weight = torch.ones(len(x), dtype=torch.float64)
        if "_exps" in name and len(x) < IDS.size:  # outputs are multiplied by the student's gate
            gates = [self._gates(run, name, matrix) for run in self.runs]
            weight = gates[1].double().square()
            if "_down" in name:
                x = x * (gates[0] / gates[1])[:, None].double()
        right = student * weight[:, None]
        return (student.T @ right).numpy(), ((x - student).T @ right).numpy(), right

    def _inputs(self, run: Plain, name: str, matrix: int) -> torch.Tensor:
        shape = self._models[0].arrays[name].shape
        if part_of(name) in ("attn_k_b", "attn_v_b"):
            n_tok = IDS.size
            return run.inputs.of(name, None).view(n_tok, shape[0], -1)[:, matrix].double()
        if part_of(name) in ("ffn_gate_exps", "ffn_up_exps") and not self._own:
            router = f"blk.{name.split('.')[1]}.ffn_gate_inp.weight"
            return run.inputs.of(router, None).double()
        return run.inputs.of(name, matrix if len(shape) == 3 else None).double()

    def sampled(self, name: str, expert: int) -> tuple[np.ndarray, int]:
        """Gram of what a sample of all tokens brings to an expert's down projection, and its size.

        It is twice as many tokens as there are columns, and weighs half of that.
        """
        prefix, arrays = name.removesuffix("_down_exps.weight"), self._models[1].arrays
        width = arrays[name].shape[-1]
        index = torch.arange(2 * width) * IDS.size // (2 * width)
        x = self.runs[1].inputs.of(f"{prefix}_gate_inp.weight", None)[index].double()
        gate, up = (
            x @ torch.from_numpy(arrays[f"{prefix}_{part}_exps.weight"][expert]).double().T
            for part in ("gate", "up")
        )
        inner = (torch.nn.functional.silu(gate) * up).numpy()
        gates = self.runs[1].routes[int(name.split(".")[1]) - 1][1].double()
        return float(gates.square().mean()) / 2 * (inner.T @ inner), len(index)

    def _gates(self, run: Plain, name: str, expert: int) -> torch.Tensor:
        chosen, gates = run.routes[int(name.split(".")[1]) - 1]
        return gates[chosen == expert]

    def residual(self, name: str, matrix: int) -> torch.Tensor:
        """What is missing before a weight adds its output: teacher's less student's state.

        That is the state behind the layer of a model whose later weights of the layer add nothing.
        """
        layer = int(name.split(".")[1])
        before = [self._run(self._without(w, layer, name, matrix)) for w in self._models]
        return (before[0].hidden[layer] - before[1].hidden[layer]).double()

    @staticmethod
    def _without(weights: ArrayWeights, layer: int, name: str, matrix: int) -> ArrayWeights:
        arrays = {n: a.copy() for n, a in weights.arrays.items()}
        writers = ["attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp"]
        for part in writers[writers.index(part_of(name)) :]:
            other = f"blk.{layer}.{part}.weight"
            if other in arrays:
                arrays[other][matrix if other == name and "exps" in part else 0 :] = 0
        return ArrayWeights(weights.kvs, arrays)


def assert_near(found: torch.Tensor, expected: np.ndarray, what: str) -> None:
    scale = np.abs(expected).max()
    assert scale > 0, what
    error = np.abs(found.double().numpy() - expected).max()
    assert error < 2e-3 * scale, (what, error / scale)


def is_head(shown: Shown) -> bool:
    return part_of(shown.name) in ("attn_k_b", "attn_v_b")


@pytest.mark.parametrize("n_own", [0, 10**9], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("kind", MODELS)
def test_each_is_shown_the_inputs_that_it_has_in_the_end(kind, n_own, blocks, monkeypatch):
    """So nothing that it depends on changes any more; but see the next test.

    An expert with few tokens is shown those of all for its gate and up projections, and for its
    down projection what a sample of all would have brought as well, without any drift.
    """
    monkeypatch.setattr("quantkit.propagate.experts._OWN", n_own)
    model = MODELS[kind]()
    wanted = [name for name in weights_of(model) if part_of(name) != "attn_k_b"]
    quantiser, _ = run(model, monkeypatch, wanted=wanted)
    oracle = Oracle(model, quantiser.final, monkeypatch, own=n_own == 0)
    for shown in quantiser.shown:
        gram, drift, right = oracle.gram_and_drift(shown.name, shown.matrix)
        n_tok = len(right)
        if n_own and part_of(shown.name) == "ffn_down_exps":
            sampled, n_sampled = oracle.sampled(shown.name, shown.matrix)
            gram, n_tok = gram + sampled, n_tok + n_sampled
        what = f"{shown.name} {shown.matrix}"
        assert_near(shown.all.gram[0], gram, f"gram of {what}")
        if np.abs(drift).max() > 1e-6 * np.abs(gram).max():
            assert_near(shown.all.drift[0], drift, f"drift of {what}")
        else:  # before anything is quantised
            assert shown.name.startswith("blk.0.attn"), what
            assert shown.all.drift.abs().max() < 1e-6 * np.abs(gram).max()
        assert shown.all.n_tokens == n_tok


def test_keys_and_values_of_heads_are_seen_in_one_pass(monkeypatch):
    """Values see what the keys mix before those are rounded: another pass would be too dear."""
    model = deepseek_model()
    wanted = [name for name in weights_of(model) if name.startswith("blk.0.")]
    quantiser, _ = run(model, monkeypatch, wanted=wanted)
    keys = "blk.0.attn_k_b.weight"
    final = ArrayWeights(model.kvs, quantiser.final.arrays | {keys: model.arrays[keys]})
    oracle = Oracle(model, final, monkeypatch)
    for shown in filter(is_head, quantiser.shown):
        gram, drift, _ = oracle.gram_and_drift(shown.name, shown.matrix)
        assert_near(shown.all.gram[0], gram, shown.name)
        assert_near(shown.all.drift[0], drift, shown.name)


@pytest.mark.parametrize("kind", MODELS)
def test_a_weight_that_writes_is_shown_what_is_missing_before_it_adds(kind, monkeypatch):
    model = MODELS[kind]()
    wanted = [name for name in weights_of(model) if part_of(name) != "attn_k_b"]
    quantiser, _ = run(model, monkeypatch, wanted=wanted)
    oracle = Oracle(model, quantiser.final, monkeypatch)
    n_written = 0
    for shown in quantiser.shown:
        writes = part_of(shown.name) == "attn_output" or "ffn_down" in shown.name
        assert (shown.all.residual is not None) == writes
        if not writes:
            continue
        right = oracle.gram_and_drift(shown.name, shown.matrix)[2]
        missing = oracle.residual(shown.name, shown.matrix)
        if "exps" in shown.name:  # shared among a token's experts by the squares of their gates
            chosen, gates = oracle.runs[1].routes[int(shown.name.split(".")[1]) - 1]
            places, slots = torch.nonzero(chosen == shown.matrix).T
            own = gates[places, slots].double()
            missing = missing[places] * (own / gates[places].double().square().sum(1))[:, None]
        expected = (missing.T @ right).numpy()
        if shown.name == "blk.0.attn_output.weight":
            assert not shown.all.residual.any()
            assert not expected.any()
            continue
        assert_near(shown.all.residual[0], expected, f"{shown.name} {shown.matrix}")
        n_written += 1
    assert n_written >= 3


def test_the_tokens_held_back_are_whole_sequences(monkeypatch):
    quantiser, _ = run(deepseek_model(), monkeypatch)
    for shown in quantiser.shown:
        assert shown.fitted.n_tokens + shown.held.n_tokens == shown.all.n_tokens
    first = quantiser.shown[0]
    assert (first.fitted.n_tokens, first.held.n_tokens) == (3 * IDS.shape[1], IDS.shape[1])


@pytest.mark.parametrize("n_seq", [1, 2, 3, 4, 5, 16, 17, 64, 1000])
def test_about_a_quarter_of_the_sequences_is_held_back_in_runs(n_seq):
    held = held_back(n_seq, 3).view(n_seq, 3)
    assert bool((held == held[:, :1]).all())
    flags = held[:, 0].tolist()
    if n_seq >= 4:
        assert 0.15 <= np.mean(flags) <= 0.3
    changes = sum(a != b for a, b in pairwise(flags))
    assert changes <= 8
