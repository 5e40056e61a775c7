"""llama.cpp and the forward pass run every family as transformers runs its checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.arch.registry import FAMILIES
from tests.forward.support import logits_of
from tests.oracles import llamacpp
from tests.oracles.compare import mean_kl, same_top1

hf = pytest.importorskip("tests.oracles.hf")
models = pytest.importorskip("tests.families.models")
NAMES = sorted(models.TINY)

# Largest difference over largest logit; what sums in another order leave.
CLOSE = 1e-5
# Of a distribution to the same one by other hands, in nats. llama.cpp's GELU is a table of f16.
SAME = 1e-6


def ids_of(n_tok: int = 240) -> np.ndarray:
    return np.random.default_rng(5).integers(0, models.N_VOCAB - 4, (1, n_tok))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_f32_is_the_checkpoint(name, tiny, file_of):
    folder, ids = tiny(name), ids_of()
    expected = hf.reference_logits(folder, ids)
    file = file_of(folder)
    run = llamacpp.logits(file, ids, kv_f32=True)
    assert same_top1(expected, run) >= 0.99
    assert mean_kl(expected, run) < 1e-3
    assert distance(logits_of(folder, ids, "config"), expected) < CLOSE
    assert mean_kl(run, logits_of(file, ids, "llama.cpp")) < SAME


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_bf16_holds_the_weights_of_a_bf16_checkpoint(name, tiny, file_of):
    folder, ids = tiny(name, torch.bfloat16), ids_of(60)
    assert (
        distance(logits_of(file_of(folder, "bf16"), ids), hf.reference_logits(folder, ids)) < CLOSE
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_llamacpp_runs_a_file_in_bf16(name, tiny, file_of):
    """It rounds inputs to bf16 as well, by which random routers now and then change an expert."""
    folder, ids = tiny(name, torch.bfloat16), ids_of()
    run = llamacpp.logits(file_of(folder, "bf16"), ids, kv_f32=True)
    expected = hf.reference_logits(folder, ids)
    assert mean_kl(expected, run) < (
        2e-2 if "num_experts_per_tok" in models.TINY[name].config else 1e-3
    )


def test_a_long_context_takes_the_long_factors_of_longrope(tiny, file_of):
    """The short ones serve up to 256 tokens, above; llama.cpp goes by the size of its context."""
    folder, ids = tiny("phi3-longrope"), ids_of(300)
    expected = hf.reference_logits(folder, ids)
    run = llamacpp.logits(file_of(folder), ids, kv_f32=True)
    assert mean_kl(expected, run) < SAME
    ours = logits_of(folder, ids)
    assert distance(ours, expected) < CLOSE
    assert distance(logits_of(folder, ids[:, :200]), ours[:, :200]) > 1e-3


def test_every_family_that_is_offered_is_tested_here_or_with_the_forward_pass():
    scripted = pytest.importorskip("make_hf_checkpoint").FAMILIES
    tested = {f"{tiny.name}ForCausalLM" for tiny in models.TINY.values()} | {
        model.model({**model.config}).__class__.__name__
        for name, model in scripted.items()
        if name in ("llama", "deepseek-v2-lite", "deepseek-v3")
    }
    for family in FAMILIES:
        assert tested & set(family.architectures), family.title
