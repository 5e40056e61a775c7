"""Importance for the encoder, out of a file that stays on disk."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from quantkit.calibrate import lookup as module
from quantkit.calibrate.coverage import importance
from quantkit.calibrate.imatrix import read_imatrix, write_imatrix
from quantkit.calibrate.lookup import Lookup
from quantkit.errors import GgufError, NonFiniteError
from quantkit.pipeline.importance import load_importance
from quantkit.types import TensorSpec
from tests.calibrate.builders import PAIR, f32s, gguf_imatrix, statistics

SHAPES = {f"blk.{layer}.ffn_up_exps.weight": (4, 32) for layer in range(6)}
TENSORS = tuple(TensorSpec(name, "", None, (m, 8, n)) for name, (m, n) in SHAPES.items())


@pytest.fixture
def path(tmp_path):
    write_imatrix(tmp_path / "m.gguf", statistics(SHAPES))
    return tmp_path / "m.gguf"


def test_threads_that_ask_for_anything_get_what_one_would(path, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_BYTES", 2 * 4 * 32 * 4)  # two tensors
    lookup, stats = Lookup(read_imatrix(path), TENSORS), read_imatrix(path)
    names = np.random.default_rng(0).choice(list(SHAPES), 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        for name, values in zip(names, pool.map(lookup.get, names), strict=True):
            assert np.array_equal(values, importance(stats, name, (4, 8, 32)).values)


def test_a_tensor_is_read_once_while_its_tiles_are_made(path, monkeypatch):
    lookup = Lookup(read_imatrix(path), TENSORS)
    first = lookup.get(TENSORS[0].name)
    assert lookup.get(TENSORS[0].name) is first


def test_what_there_are_no_statistics_of_gives_nothing(path):
    norm = TensorSpec("blk.0.attn_norm.weight", "", None, (32,))
    lookup = Lookup(read_imatrix(path), (*TENSORS, norm))
    assert lookup.get("blk.0.attn_norm.weight") is None
    assert lookup.get("no.such.weight") is None
    assert lookup.covered() == list(SHAPES)


def test_another_model_is_refused_before_a_value_is_needed(path):
    other = TensorSpec("blk.5.ffn_up_exps.weight", "", None, (4, 8, 64))
    with pytest.raises(GgufError, match=r"blk\.5\.ffn_up_exps\.weight: .* takes 4 × 64"):
        Lookup(read_imatrix(path), (*TENSORS[:5], other))


def test_a_conversion_learns_of_a_damaged_value_before_it_starts(tmp_path):
    bad = {"b.weight.in_sum2": f32s(1, float("nan")), "b.weight.counts": f32s(1)}
    (tmp_path / "m.gguf").write_bytes(gguf_imatrix(PAIR | bad))
    with pytest.raises(NonFiniteError, match=r"b\.weight"):
        load_importance(tmp_path / "m.gguf", (TensorSpec("a.weight", "", None, (8, 4)),))


def test_a_file_that_is_replaced_is_read_as_it_was(path):
    stats, before = read_imatrix(path), read_imatrix(path).sums[TENSORS[3].name].sum2
    write_imatrix(path, statistics(SHAPES, seed=1))
    assert np.array_equal(stats.sums[TENSORS[3].name].sum2, before)


def test_a_file_that_shrinks_is_refused_with_its_tensor(path):
    stats = read_imatrix(path)
    os.truncate(path, path.stat().st_size - 64)
    with pytest.raises(GgufError, match=r"tensor blk\.5\.ffn_up_exps\.weight: the file shrank"):
        _ = stats.sums["blk.5.ffn_up_exps.weight"]


def test_open_files_are_closed_when_nobody_can_read_them_any_more(path):
    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = n_open()
    stats = read_imatrix(path)
    assert n_open() == before + 1
    del stats
    assert n_open() == before
