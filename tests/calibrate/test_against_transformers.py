"""Sums of squares are those of transformers' own forward, and of llama-imatrix."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.calibrate.imatrix import read_imatrix
from quantkit.calibrate.measure import Measuring, measure
from quantkit.evaluate.summary import with_bos
from quantkit.forward.matrices import Compute
from quantkit.forward.sweep import Settings
from quantkit.pipeline.calibration import Calibration, calibrate
from quantkit.pipeline.opening import Reading, opened, read_tokens
from quantkit.run.events import Silent
from quantkit.text.tokens import chunks
from tests.calibrate.builders import RECORDED
from tests.oracles import hf

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
TEXT = os.environ.get("QUANTKIT_CALIBRATION_TEXT", "")
N_CHUNKS, N_CTX = 3, 128


class Hooked:
    """Squares of the inputs of every matrix of a DeepSeek-V3 of transformers, by GGUF name."""

    def __init__(self, model):
        self.sum2 = defaultdict(float)  # [n], or [experts, n]
        self.counts = defaultdict(float)
        self._latent = {}
        config = model.config
        self._n_nope, self._n_experts = config.qk_nope_head_dim, config.n_routed_experts
        self._n_heads = config.num_attention_heads
        model.lm_head.register_forward_pre_hook(self._inputs("output.weight"))
        for at, layer in enumerate(model.model.layers):
            self._attention(f"blk.{at}.attn_", layer.self_attn)
            if hasattr(layer.mlp, "experts"):
                names = [f"blk.{at}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
                layer.mlp.experts.register_forward_pre_hook(self._experts(*names))
                gate = self._inputs(f"blk.{at}.ffn_gate_inp.weight")
                layer.mlp.gate.register_forward_pre_hook(gate)
                self._mlp(f"blk.{at}.ffn_", "_shexp", layer.mlp.shared_experts)
            else:
                self._mlp(f"blk.{at}.ffn_", "", layer.mlp)

    def _add(self, name, x):
        x = x.detach().double().flatten(0, -2)
        self.sum2[name] += x.square().sum(0).numpy()
        self.counts[name] += len(x)

    def _inputs(self, name):
        return lambda module, args: self._add(name, args[0])

    def _mlp(self, prefix, suffix, mlp):
        for part in ("gate", "up", "down"):
            module = getattr(mlp, f"{part}_proj")
            module.register_forward_pre_hook(self._inputs(f"{prefix}{part}{suffix}.weight"))

    def _attention(self, prefix, attn):
        modules = {
            "q_a": attn.q_a_proj,
            "kv_a_mqa": attn.kv_a_proj_with_mqa,
            "q_b": attn.q_b_proj,
            "output": attn.o_proj,
        }
        for name, module in modules.items():
            module.register_forward_pre_hook(self._inputs(f"{prefix}{name}.weight"))

        def queries(module, args, q):
            nope = q.unflatten(-1, (self._n_heads, -1))[..., : self._n_nope]
            self._add(f"{prefix}k_b.weight", nope.flatten(-2))

        def latent(module, args, normed):
            self._latent[prefix] = normed

        def mixed(module, args, outputs):  # probabilities [1, heads, n, n] by latents [1, n, rank]
            per_head = outputs[1] @ self._latent[prefix][:, None]
            self._add(f"{prefix}v_b.weight", per_head.transpose(1, 2).flatten(-2))

        attn.q_b_proj.register_forward_hook(queries)
        attn.kv_a_layernorm.register_forward_hook(latent)
        attn.register_forward_hook(mixed)

    def _experts(self, gate, up, down):
        def see(module, args):
            x, chosen, _ = args
            for expert in range(self._n_experts):
                own = x[(chosen == expert).any(-1)]
                g, u = (own @ module.gate_up_proj[expert].T).chunk(2, -1)
                inner = torch.nn.functional.silu(g) * u
                for name, seen in ((gate, own), (up, own), (down, inner)):
                    row = np.zeros((self._n_experts, seen.shape[-1]))
                    row[expert] = seen.double().square().sum(0).numpy()
                    self.sum2[name] += row
                    self.counts[name] += len(seen) * np.eye(self._n_experts)[expert]

        return see


def test_sums_and_counts_are_those_of_transformers_inputs(tmp_path):
    with opened(FIXTURE, "config") as model, torch.no_grad():
        tokens = read_tokens(model, Reading("core", N_CHUNKS * N_CTX))
        cut = with_bos(chunks(tokens, N_CTX), model.bos)
        settings = Settings(Compute(activations="exact"), 1 << 30, tmp_path)
        job = Measuring(model.weights, model.hyper, cut, settings, "x")
        stats = measure(job, lambda _: None, lambda _: None)
        reference = hf.load(FIXTURE)
        hooked = Hooked(reference)
        for ids in cut:
            reference(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    assert stats.sums.keys() == hooked.sum2.keys()
    for name, sums in stats.sums.items():
        assert np.array_equal(sums.counts, np.atleast_1d(hooked.counts[name])), name
        expected = np.atleast_2d(hooked.sum2[name])
        np.testing.assert_allclose(sums.sum2, expected, rtol=1e-4, err_msg=name)


def test_rare_experts_also_see_a_sample_of_all_tokens(tmp_path):
    with opened(FIXTURE, "llama.cpp") as model:
        cut = chunks(read_tokens(model, Reading("core", 128)), 128)
        settings = Settings(Compute(), 1 << 30, tmp_path)
        job = Measuring(model.weights, model.hyper, cut, settings, "x")
        stats = measure(job, lambda _: None, lambda _: None)
    assert set(stats.priors) == {f"blk.{layer}.ffn_down_exps.weight" for layer in (1, 2, 3)}
    for sums in stats.priors.values():
        assert (sums.counts == 128).all(), "a text shorter than the sample is taken whole"
        assert (sums.sum2.sum(1) > 0).all()


@pytest.mark.slow
@pytest.mark.skipif(not TEXT, reason="needs the text that the recorded file was made on")
def test_sums_are_those_of_llama_imatrix(tmp_path):
    recorded = read_imatrix(RECORDED)
    reading = Reading(TEXT, recorded.n_tokens, recorded.chunk_size, parse_special=False)
    calibrate(Calibration(FIXTURE, reading), tmp_path / "m.gguf", Silent())
    made = read_imatrix(tmp_path / "m.gguf")
    assert made.sums.keys() == recorded.sums.keys()
    for name, theirs in recorded.sums.items():
        ours = made.sums[name]
        a, b = ours.sum2.ravel(), theirs.sum2.ravel()
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.999, name
        difference = np.abs(ours.counts - theirs.counts).sum()
        assert difference <= 0.01 * theirs.counts.sum(), name
