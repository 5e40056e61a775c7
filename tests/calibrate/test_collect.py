"""Only the layer at work is in memory; its file holds it all."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.calibrate.collect import Collector, fold_files
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


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spans_kept_apart_fold_to_the_file_of_one_that_adds_them_up(tmp_path):
    """Also where an expert has no token in a span, and the spans' sizes differ widely."""
    together, apart = Collector(), Collector(3)
    for collector in (together, apart):
        for name in ("a", "b"):
            for span in range(3):
                collector.enter(span)
                for block in range(2):
                    collector.see((name,), 10.0**span * random(40, 6, seed=block))
        for expert in range(4):
            for span in range(3):
                collector.enter(span)
                if expert != 1 and (expert, span) != (2, 0):
                    x = random(30, 6, seed=10 * expert + span)
                    collector.see((GATE, UP), x, row=expert, n_rows=4)
                if span == 1:
                    collector.see_prior(DOWN, random(5, 4, seed=expert), expert, 4)
    together.save(tmp_path / "whole.gguf")
    parts = [tmp_path / f"{span}.gguf" for span in range(3)]
    apart.save(*parts)
    fold_files(parts, tmp_path / "folded.gguf")
    assert (tmp_path / "folded.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    stats = read_imatrix(tmp_path / "whole.gguf")
    assert stats.sums[GATE].counts.tolist() == [90, 0, 60, 90]
    assert not read_imatrix(parts[0]).priors


def test_a_spans_sums_are_rounded_before_they_are_added(tmp_path):
    """1 + 2^-24 is no f32: what a file would drop of a span is dropped by all alike."""
    collector = Collector()
    for span in range(2):
        collector.enter(span)
        collector.see(("a",), torch.tensor([[1.0], [2.0**-12]]))
    collector.save(tmp_path / "m.gguf")
    assert read_imatrix(tmp_path / "m.gguf").sums["a"].sum2.tolist() == [[2.0]]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_folding_takes_one_open_file_at_a_time(tmp_path):
    apart = Collector(20)
    for span in range(20):
        apart.enter(span)
        apart.see(("a",), torch.ones(2, 4))
    parts = [tmp_path / f"{span}.gguf" for span in range(20)]
    apart.save(*parts)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 8, hard))
    try:
        fold_files(parts, tmp_path / "folded.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read_imatrix(tmp_path / "folded.gguf").sums["a"].counts.tolist() == [40]


def test_a_span_that_f32_cannot_hold_is_refused():
    collector = Collector()
    collector.see(("a",), torch.full((2, 1), 1.5e19))
    with pytest.raises(NonFiniteError, match="more than an f32 can hold"):
        collector.enter(1)
