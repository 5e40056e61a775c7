"""The forward pass over a checkpoint computes what transformers computes, for every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_hf_checkpoint import FAMILIES

from quantkit.forward.stream import Sequences
from quantkit.pipeline.opening import opened
from tests.forward.support import all_logits, logits_of, passed, stream_of

# Largest difference over largest logit: what sums of other order and transformers' f32 cosines
# leave. A wrong constant or permutation gives 1e-4 and far more.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("tests.oracles.hf")


def random_ids(folder, shape, seed: int = 7) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text())
    return np.random.default_rng(seed).integers(3, config.get("vocab_size", 4000), shape)


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "fixture"])
def test_logits_equal_those_of_transformers(family, checkpoint, hf):
    folder = checkpoint(family)
    ids = random_ids(folder, 60 if family == "deepseek-v2-lite" else 300)
    assert distance(logits_of(folder, ids), hf.reference_logits(folder, ids)) < CLOSE


@pytest.mark.parametrize("family", ["llama", "kimi-k2-thinking"])
def test_sequences_of_any_length_do_not_see_each_other(family, checkpoint):
    folder = checkpoint(family)
    parts = [random_ids(folder, n, seed=n) for n in (1, 37, 2, 150, 64)]
    with opened(folder, "config") as model:
        joint = Sequences(np.concatenate(parts), tuple(map(len, parts)))
        together = all_logits(passed(stream_of(model.weights, joint, "config")))
        alone = [all_logits(passed(stream_of(model.weights, p[None], "config"))) for p in parts]
    assert distance(together, np.concatenate(alone)) < CLOSE


def test_blocks_of_sequences_and_of_tokens_change_nothing(checkpoint, monkeypatch):
    folder = checkpoint("deepseek-v3")
    ids = random_ids(folder, (5, 90))
    whole = logits_of(folder, ids)
    monkeypatch.setattr("quantkit.forward.stream._WORK_BYTES", 0)  # 64 tokens
    monkeypatch.setattr("quantkit.forward.matrices._TILE_BYTES", 4 * 256 * 10)  # 10 rows
    monkeypatch.setattr("quantkit.forward.blocks._SCORE_BYTES", 0)  # 16 queries
    assert distance(logits_of(folder, ids), whole) < CLOSE


def reconfigured(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(folder, to)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_constants_decide_which_epsilon_the_latent_norms_have(checkpoint, hf, tmp_path):
    """llama.cpp takes the model's, here a large one; transformers 1e-6 whatever the config says."""
    folder = reconfigured(
        checkpoint("kimi-k2-thinking"),
        tmp_path / "large epsilon",
        lambda config: config.update(rms_norm_eps=0.1, rope_scaling=None),
    )
    ids = random_ids(folder, 100)
    as_llamacpp = hf.reference_logits(folder, ids, latent_eps=0.1)
    as_transformers = hf.reference_logits(folder, ids)
    assert distance(as_llamacpp, as_transformers) > 1e-2
    assert distance(logits_of(folder, ids, "llama.cpp"), as_llamacpp) < CLOSE
    assert distance(logits_of(folder, ids, "config"), as_transformers) < CLOSE


def test_constants_decide_between_the_configs_beta_fast_and_32(checkpoint, hf, tmp_path):
    """kimi-k2 has beta_fast 1; the same weights with 32 in the config are what llama.cpp runs."""
    folder = checkpoint("kimi-k2")
    other = reconfigured(
        folder, tmp_path / "32", lambda config: config["rope_scaling"].update(beta_fast=32)
    )
    ids = random_ids(folder, 300)
    as_configured = hf.reference_logits(folder, ids)
    as_llamacpp = hf.reference_logits(other, ids, latent_eps=1e-5)
    assert distance(as_configured, as_llamacpp) > 1e-2
    assert distance(logits_of(folder, ids, "config"), as_configured) < CLOSE
    assert distance(logits_of(folder, ids, "llama.cpp"), as_llamacpp) < CLOSE
