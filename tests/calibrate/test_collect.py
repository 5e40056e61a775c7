"""Only the layer at work is in memory; its file holds it all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.calibrate.collect import Collector
from quantkit.calibrate.imatrix import read_imatrix
from quantkit.errors import NonFiniteError, UsageError

GATE, UP, DOWN = (f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))


def test_a_layer_is_written_and_forgotten(tmp_path):
    collector = Collector()
    collector.see(("a",), torch.ones(3, 4))
    collector.save(tmp_path / "0.gguf")
    collector.see(("b",), torch.ones(2, 4))
    collector.save(tmp_path / "1.gguf")
    assert set(read_imatrix(tmp_path / "1.gguf").sums) == {"b"}
    assert collector.arrays() == {}
    with pytest.raises(UsageError, match="no statistics"):
        collector.save(tmp_path / "2.gguf")


def test_weights_with_one_input_get_the_same_sums_once(tmp_path):
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    collector = Collector()
    for part in x.split(77):
        collector.see((GATE, UP), part, row=1, n_rows=3)
    collector.save(tmp_path / "m.gguf")
    stats = read_imatrix(tmp_path / "m.gguf")
    expected = (x.double() ** 2).sum(0).numpy().astype(np.float32)
    for name in (GATE, UP):
        np.testing.assert_allclose(stats.sums[name].sum2[1], expected, rtol=1e-7)
        assert stats.sums[name].counts.tolist() == [0, 300, 0]


def test_experts_that_saw_little_want_a_sample_of_all_tokens(tmp_path):
    collector = Collector()
    assert collector.wants_prior(DOWN, 10)
    assert not collector.wants_prior(DOWN, 100_000)
    collector.see_prior(DOWN, 2 * torch.ones(7, 4), 2, 3)
    collector.save(tmp_path / "m.gguf")
    stats = read_imatrix(tmp_path / "m.gguf")
    assert not stats.sums
    assert stats.priors[DOWN].sum2.tolist() == [[0] * 4, [0] * 4, [28] * 4]
    assert stats.priors[DOWN].counts.tolist() == [0, 0, 7]


def test_an_overflow_is_refused_by_weight_and_column():
    x = torch.ones(100, 4)
    x[70, 2] = 1e30  # its square is beyond f32
    with pytest.raises(NonFiniteError, match="tensor a: inf in column 2"):
        Collector().see(("a",), x)
