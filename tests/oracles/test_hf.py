"""The transformers reference: exact expansion, and the switches that it documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.oracles import hf


def test_int4_experts_expand_to_level_times_scale(kimi_dir):
    stem = "language_model.model.layers.1.mlp.experts.3.down_proj"
    with safe_open(kimi_dir / "model-00002-of-000007.safetensors", framework="pt") as file:
        packed = file.get_tensor(f"{stem}.weight_packed").numpy().view(np.uint8)
        scale = file.get_tensor(f"{stem}.weight_scale").double().numpy()
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(scale.shape[0], -1) - 8.0
    expected = levels * scale.repeat(32, axis=1)
    weight = hf.expanded_tensors(kimi_dir)["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert weight.dtype == torch.float32
    np.testing.assert_array_equal(weight.double().numpy(), expected)


def test_latent_eps_reaches_both_norms_of_every_layer_and_no_other(kimi_dir):
    model = hf.load(kimi_dir, latent_eps=0.5)
    eps = {
        name.removeprefix("model."): module.variance_epsilon
        for name, module in model.named_modules()
        if hasattr(module, "variance_epsilon")
    }
    latent = {name for name, value in eps.items() if value == 0.5}
    parts = ("q_a_layernorm", "kv_a_layernorm")
    assert latent == {f"layers.{i}.self_attn.{part}" for i in range(4) for part in parts}
    assert eps["norm"] == 1e-5


def test_logits_depend_on_latent_eps(kimi_dir, token_ids):
    default = hf.reference_logits(kimi_dir, token_ids[0, :8])
    large = hf.reference_logits(kimi_dir, token_ids[0, :8], latent_eps=0.5)
    assert np.abs(default - large).max() > 1e-2


def test_an_image_of_odd_size_is_refused(kimi_dir):
    with pytest.raises(ValueError, match="multiples of 28"):
        hf.vision_reference(kimi_dir, np.zeros((28, 30, 3), np.uint8))
