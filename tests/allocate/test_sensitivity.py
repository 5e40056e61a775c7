"""Errors on sampled rows, and disturbed copies: each as if the whole model had been run alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.allocate import sensitivity
from quantkit.allocate.copies import Cache, Disturbed
from quantkit.allocate.errors import (
    Inputs,
    Rounder,
    error_row,
    relative_error,
    sample_rows,
)
from quantkit.allocate.sensitivity import Subject, Text, measure
from quantkit.evaluate.compare import Comparison, Party, Windows, compare
from quantkit.evaluate.scores import TileScorer
from quantkit.evaluate.summary import scored_positions
from quantkit.forward.matrices import Compute
from quantkit.forward.sweep import Settings
from quantkit.pipeline.opening import opened
from quantkit.pipeline.planning import Job, planned
from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.feedback import Feedback
from quantkit.run.events import Silent
from quantkit.types import GgmlType as T

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
N_CTX = 32
STRONG = T.Q4_0


def correlated(seed: int, n_tok: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=torch.Generator().manual_seed(1)) / n**0.5
    scale = torch.logspace(-1, 1, n)
    return (torch.randn(n_tok, n, generator=generator) * scale) @ mix


def seen(x: torch.Tensor) -> Inputs:
    inputs = Inputs(x.shape[1])
    inputs.add(x)
    return inputs


def weights(rows: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, n), np.float32)


def test_the_error_is_that_of_the_outputs():
    x, w = correlated(0, 500, 256), weights(8, 256)
    off = w + np.random.default_rng(1).standard_normal(w.shape).astype(np.float32) / 10
    exact, wrong = x.numpy() @ w.T, x.numpy() @ off.T
    expected = np.square(wrong - exact).sum() / np.square(exact).sum()
    assert relative_error(w, off, x.T @ x) == pytest.approx(expected, rel=1e-4)


def test_importance_is_the_mean_square_of_a_column_and_part_of_the_text_judges():
    x = correlated(0, 1024, 64)
    inputs = seen(x)
    blocks = x.view(-1, 32, 64)
    held = torch.arange(len(blocks)) % 4 == 3
    fitted, judged = blocks[~held].flatten(0, 1), blocks[held].flatten(0, 1)
    torch.testing.assert_close(torch.from_numpy(inputs.importance()), fitted.square().mean(0))
    torch.testing.assert_close(inputs.judge(), judged.T @ judged)


@pytest.mark.parametrize("type_", [T.Q2_K, T.IQ2_XXS])
def test_feedback_errs_less_on_inputs_that_it_has_not_seen(type_):
    inputs, w = seen(correlated(0, 8192, 256)), weights(16, 256)
    how = How("default", "blend", 0.0)
    nearest = error_row(w, inputs, [type_], Rounder(how, codec_of, None))
    feedback = error_row(w, inputs, [type_], Rounder(how, codec_of, Feedback()))
    assert feedback[type_.name] < 0.8 * nearest[type_.name]


def test_errors_fall_with_bits_and_without_inputs_columns_count_alike():
    w = weights(16, 256)
    errors = error_row(w, None, [T.IQ2_XXS, T.Q4_K, T.Q8_0], Rounder(How(), codec_of, None))
    assert errors["IQ2_XXS"] > 5 * errors["Q4_K"] > 25 * errors["Q8_0"] > 0


class Numbered:
    """Weights whose rows hold their number."""

    def shape(self, name: str) -> tuple[int, ...]:
        return (384, 2048, 4)

    def read(self, name: str, begin: int, end: int) -> np.ndarray:
        return np.repeat(np.arange(begin, end, dtype=np.float32), 4).reshape(-1, 4)


def test_sampled_rows_are_spread_over_experts_and_over_their_rows():
    rows = sample_rows(Numbered(), "w")[:, 0].astype(int)
    assert len(set(rows.tolist())) == len(rows) <= 256
    assert len(set((rows // 2048).tolist())) == 16
    assert len(set((rows % 2048 // 256).tolist())) == 8


def test_a_cache_gives_what_was_made_and_forgets_the_oldest():
    made: list[int] = []
    cache = Cache(3 * 400)

    def get(k: int) -> float:
        def make() -> np.ndarray:
            made.append(k)
            return np.full(100, k, np.float32)

        return float(cache.get((k,), make)[0])

    assert [get(k) for k in (1, 2, 3, 1, 4, 1, 2)] == [1, 2, 3, 1, 4, 1, 2]
    assert made == [1, 2, 3, 4, 2]


def without_importance(type_: T):
    codec = codec_of(type_)
    return replace(codec, encode=lambda x, importance, how: codec.encode(x, None, how))


class Score:
    def __init__(self, n: int, n_copies: int) -> None:
        self.scorer = TileScorer(np.zeros(n, np.int64), n_copies)
        self.add = self.scorer.add

    def kld(self) -> np.ndarray:
        return self.scorer.finish().kld.sum(1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep over the fixture, and mean KL of any disturbed model by the evaluation."""
    work = tmp_path_factory.mktemp("sweep")
    chunks = np.random.default_rng(0).integers(0, 4000, (3, N_CTX)).astype(np.int32)
    rounder = Rounder(How("fast"), without_importance, None)
    settings = Settings(Compute(activations="exact"), 1 << 30, work)
    scored = np.array(scored_positions(N_CTX))
    with planned(Job(FIXTURE, "q8_0"), Silent()) as (_, decided):
        specs = [tensor.spec for tensor in decided.plans[-1].tensors]
    with opened(FIXTURE, "llama.cpp") as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "_STRENGTHS", (T.Q8_0, STRONG))  # which are quick
        subject = Subject(
            specs, model.weights, model.hyper, lambda spec: [T.Q8_0], lambda spec, t: False
        )
        text = Text(chunks, 2, np.add.outer(np.arange(2) * N_CTX, scored).ravel())
        told: list[float] = []
        found = measure(subject, text, rounder, settings, Score, ("d", "t"), told.append)

        def alone(types: dict[str, T]) -> float:
            disturbed = Disturbed(model.weights, Cache(1 << 28), types, rounder, {})
            base = Party("base", model.weights, model.hyper)
            quant = Party("quant", disturbed, model.hyper)
            text = Windows.of(chunks[:2], None)
            comparison = Comparison(base, [quant], text, settings, str(types))
            scores, _, sweep = compare(comparison, lambda part: None)
            sweep.clear()
            return float(scores.kld.mean())

        yield found, specs, alone, told


@pytest.mark.parametrize(
    "name", ["output", "token_embd", "routed_expert.down 3", "shared_expert.up 3", "dense_ffn.up 0"]
)
def test_a_copy_is_a_model_with_one_group_rounded(swept, name):
    found, _, alone, _ = swept
    group = next(g for g in found.groups if g.name == name)
    flips = name in ("token_embd", "dense_ffn.up 0")  # experts are chosen anew when run alone
    expected = alone(dict.fromkeys(group.tensors, STRONG))
    assert group.kld == pytest.approx(expected, rel=0.5 if flips else 1e-3)


def test_joint_copies_are_whole_models(swept):
    found, specs, alone, _ = swept
    strong = {s.name: STRONG for s in specs if s.keep is None}
    assert found.joint[-1][1] == pytest.approx(alone(strong), rel=1e-3)
    assert found.joint[0] < found.joint[1] < found.joint[2]


def test_every_tensor_that_may_change_has_errors_and_a_group(swept):
    found, specs, _, told = swept
    free = {s.name for s in specs if s.keep is None}
    assert set(found.errors) == free
    assert sorted(name for group in found.groups for name in group.tensors) == sorted(free)
    assert sum(told) == pytest.approx(1)
