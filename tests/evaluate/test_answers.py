"""Answers of streamed models: the letters' logits, whatever else runs beside."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quantkit.errors import UsageError
from quantkit.evaluate import compare as module
from quantkit.evaluate.answers import answer
from quantkit.evaluate.choice import Encoded
from quantkit.evaluate.compare import Party
from quantkit.forward.hyper import read_hyper
from quantkit.forward.sweep import Settings
from tests.forward.support import EXACT, all_logits, moe_model, passed, stream_of

LETTERS = (3, 17, 30, 8)
N_CHOICES = (4, 2, 3, 4, 2)
PROMPTS = tuple(np.random.default_rng(n).integers(0, 40, n) for n in (1, 23, 9, 40, 2))
ASKED = Encoded(PROMPTS, LETTERS, N_CHOICES)


def party(seed: int = 0, **options) -> Party:
    model = moe_model(seed=seed, **options)
    return Party(f"model {seed}", model, read_hyper(model.kvs))


def run(parties, folder, asked=ASKED, n_bytes=1 << 30, progress=lambda part: None):
    return answer(parties, asked, Settings(EXACT, n_bytes, folder), "identity", progress)


def alone(one: Party) -> list[np.ndarray]:
    """Logits of the letters, each prompt run by itself and over the whole vocabulary."""
    return [
        all_logits(passed(stream_of(one.weights, ids[None])))[-1, list(LETTERS[:n])]
        for ids, n in zip(PROMPTS, N_CHOICES, strict=True)
    ]


def assert_close(found, wanted) -> None:
    assert [len(row) for row in found] == list(N_CHOICES)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_bytes", [1 << 30, 0], ids=["in memory", "on disk"])
def test_letters_have_the_logits_of_prompts_that_run_alone(n_bytes, tmp_path):
    parties = [party(0), party(1)]
    found, _ = run(parties, tmp_path, n_bytes=n_bytes)
    for one, answers in zip(parties, found, strict=True):
        assert_close(answers, alone(one))
    assert np.abs(found[0][0] - found[1][0]).max() > 0.1


def test_a_tied_head_is_found_in_the_embedding(tmp_path):
    model = moe_model()
    del model.arrays["output.weight"]
    tied = Party("tied", model, read_hyper(model.kvs))
    assert_close(run([tied], tmp_path)[0][0], alone(tied))


def test_portions_change_nothing(tmp_path, monkeypatch):
    whole = run([party()], tmp_path / "whole")[0][0]
    monkeypatch.setattr(module, "_HEAD_TOKENS", 2)
    for ours, theirs in zip(run([party()], tmp_path / "parts")[0][0], whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_progress_ends_at_one(tmp_path):
    parts = []
    run([party(0), party(1)], tmp_path, progress=parts.append)
    assert sum(parts) == pytest.approx(1)


def test_a_killed_run_goes_on_and_answers_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.forward.sweep._SHARE", 1e9)
    undisturbed = run([party(0), party(1)], tmp_path / "undisturbed")[0]
    told = []

    def dying(part: float) -> None:
        told.append(part)
        if sum(told) > 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([party(0), party(1)], tmp_path, progress=dying)
    said = json.loads((tmp_path / "sweep.state").read_bytes().split(b"\n")[0])
    assert said["layer"] == 2
    parts = []
    found, sweep = run([party(0), party(1)], tmp_path, progress=parts.append)
    assert parts[0] == pytest.approx(2 / 3)
    for ours, theirs in zip(found, undisturbed, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    sweep.clear()
    assert not (tmp_path / "sweep.state").exists()


def test_the_state_of_other_questions_is_not_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.forward.sweep._SHARE", 1e9)
    run([party()], tmp_path)
    parts = []
    # The same tokens, cut elsewhere.
    again = (np.concatenate(PROMPTS[:2]), *PROMPTS[2:])
    run([party()], tmp_path, Encoded(again, LETTERS, N_CHOICES[1:]), progress=parts.append)
    assert parts[0] == 0


def test_models_of_another_depth_are_refused(tmp_path):
    with pytest.raises(UsageError, match="layers 2, the base model model 0 has 3"):
        run([party(0), party(1, n_layers=2)], tmp_path)


def test_letters_beyond_the_head_are_refused(tmp_path):
    with pytest.raises(UsageError, match="token 40 in a vocabulary of 40"):
        run([party()], tmp_path, Encoded(PROMPTS, (3, 40), (2,) * len(PROMPTS)))
