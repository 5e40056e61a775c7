"""Every family and source format: converted to f32 exactly, and llama.cpp computes the same.

The checkpoints are tiny, random, and made by Hugging Face's own classes. Files are f32 so that no
rounding hides a wrong permutation, key or scale.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from make_hf_checkpoint import FAMILIES, make

from quantkit.cli import cli
from tests.oracles import llamacpp
from tests.oracles.compare import mean_kl, same_top1

N_TOKENS = 200
BETA_FAST = {"kimi-k2": 1.0, "kimi-k2-thinking": 1.0}  # llama.cpp has to be told; see the plan


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families") / request.param
    make(request.param, folder)
    return request.param, folder


def test_llamacpp_computes_what_transformers_computes(family, converted):
    from tests.oracles import hf

    name, checkpoint = family
    config = json.loads((checkpoint / "config.json").read_text())
    ids = np.random.default_rng(7).integers(3, config["vocab_size"], N_TOKENS)
    path = converted("f32", model=checkpoint) / "m-F32.gguf"
    ours = llamacpp.logits(path, ids, kv_f32=True, yarn_beta_fast=BETA_FAST.get(name))
    theirs = hf.reference_logits(checkpoint, ids, latent_eps=config.get("rms_norm_eps"))
    assert same_top1(theirs, ours) == 1.0
    assert mean_kl(theirs, ours) < 1e-8


def test_the_plan_says_where_llamacpp_needs_a_flag(family):
    from click.testing import CliRunner

    name, checkpoint = family
    done = CliRunner().invoke(cli, ["plan", str(checkpoint), "-r", "q8_0"], catch_exceptions=False)
    assert done.exit_code == 0
    assert ("--yarn-beta-fast 1" in done.stdout) == (name in BETA_FAST)


@pytest.mark.parametrize("recipe", ["q8_0", "f16", "bf16", "q4_x"])
def test_every_recipe_loads(family, converted, recipe):
    _, checkpoint = family
    path = converted(recipe, model=checkpoint) / f"m-{recipe.upper()}.gguf"
    loaded, log = llamacpp.loads(path)
    assert loaded, log
