"""llama.cpp loads what quantkit writes, sees the same numbers, and quantises with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from quantkit.calibrate.coverage import filled
from quantkit.calibrate.dat import write_dat
from quantkit.calibrate.imatrix import read_imatrix, write_imatrix
from quantkit.calibrate.statistics import Statistics, add
from quantkit.container.kv import string
from quantkit.errors import GgufError
from quantkit.pipeline import Job, Output, convert
from quantkit.run.events import Silent
from tests.calibrate import llamacpp_loader
from tests.calibrate.builders import RECORDED, f32s, gguf_imatrix, statistics

pytestmark = pytest.mark.skipif(
    llamacpp_loader.library() is None, reason="needs llama-cpp-python with libllama-common"
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
DOWN = "blk.2.ffn_down_exps.weight"


def seen(told: dict, name: str):
    sums, counts = told["entries"][name]
    return np.float32(sums), np.int64(counts)


def test_the_loader_sees_a_file_of_llama_imatrix_as_quantkit_does():
    told, stats = llamacpp_loader.load(RECORDED), read_imatrix(RECORDED)
    assert told["entries"].keys() == stats.sums.keys()
    assert (told["n_chunks"], told["chunk_size"]) == (stats.n_chunks, stats.chunk_size)
    assert tuple(told["datasets"]) == stats.datasets
    for name, sums in stats.sums.items():
        values, counts = seen(told, name)
        assert np.array_equal(values, sums.sum2.ravel())
        assert np.array_equal(counts, sums.counts)


def test_the_loader_accepts_a_file_of_quantkit_with_metadata_and_priors(tmp_path):
    stats = statistics({"blk.0.attn_q_a.weight": (1, 8), DOWN: (4, 6)}, n_tokens=1000)
    add(stats.priors, DOWN, np.arange(6.0), 3, row=1, n_rows=4)
    write_imatrix(tmp_path / "m.gguf", stats, {"quantkit.corpus": string("core")})
    told = llamacpp_loader.load(tmp_path / "m.gguf")
    assert told["has_metadata"]
    assert not told["is_legacy"]
    assert (told["n_chunks"], told["chunk_size"]) == (1, 512)
    assert told["entries"].keys() == {*stats.sums, f"{DOWN}@all"}
    for name, sums in stats.sums.items():
        values, counts = seen(told, name)
        assert np.array_equal(values, np.float32(sums.sum2.ravel()))
        assert np.array_equal(counts, sums.counts)


def test_the_loader_accepts_a_legacy_file_of_quantkit(tmp_path):
    stats = read_imatrix(RECORDED)
    write_dat(tmp_path / "m.dat", stats)
    told = llamacpp_loader.load(tmp_path / "m.dat")
    assert told["is_legacy"]
    assert (told["n_chunks"], told["datasets"]) == (60, list(stats.datasets))
    for name, sums in stats.sums.items():
        values, (n_chunks,) = seen(told, name)
        np.testing.assert_allclose(values / n_chunks, sums.mean().ravel(), rtol=2e-7)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a.in_sum2": f32s(1)},
        {"a.counts": f32s(1)},
    ],
)
def test_quantkit_refuses_what_the_loader_refuses(tmp_path, tensors):
    (tmp_path / "m").write_bytes(gguf_imatrix(tensors))
    assert llamacpp_loader.load(tmp_path / "m") is None
    with pytest.raises(GgufError, match=r"holds no statistics|without"):
        read_imatrix(tmp_path / "m")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("f32")
    convert(Job(FIXTURE, "f32", mmproj=None), Output(out, n_threads=1), Silent())
    (path,) = out.glob("*.gguf")
    return path


@pytest.fixture
def quantize():
    return pytest.importorskip("llama_quantize").quantize


@pytest.fixture(scope="module")
def q2_k(model, tmp_path_factory):
    """What llama.cpp makes of the model with llama-imatrix's file."""
    out = tmp_path_factory.mktemp("q2_k") / "q.gguf"
    pytest.importorskip("llama_quantize").quantize(model, out, "Q2_K", RECORDED)
    return out


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in GGUFReader(path).tensors}


# Sizes that llama-quantize itself gave for this model and imatrix.
def test_the_quantizer_makes_a_file_of_the_size_that_llama_quantize_makes(q2_k):
    assert q2_k.stat().st_size == 9_244_032


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "n_bytes"), [("IQ2_XXS", 7_430_272), ("IQ1_M", 6_828_672)])
def test_so_it_does_where_an_imatrix_is_required(model, quantize, preset, n_bytes, tmp_path):
    quantize(model, tmp_path / "q.gguf", preset, RECORDED)
    assert (tmp_path / "q.gguf").stat().st_size == n_bytes


def test_the_quantizer_takes_the_same_from_a_file_that_quantkit_rewrote(
    model, quantize, q2_k, tmp_path
):
    write_imatrix(tmp_path / "m.gguf", read_imatrix(RECORDED), {"quantkit.corpus": string("core")})
    quantize(model, tmp_path / "q.gguf", "Q2_K", tmp_path / "m.gguf")
    a, b = tensors(q2_k), tensors(tmp_path / "q.gguf")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_the_quantizer_uses_what_filling_changed_and_nothing_else(model, quantize, q2_k, tmp_path):
    made, missing = filled(read_imatrix(RECORDED))
    assert missing == ()
    write_imatrix(tmp_path / "filled.gguf", made)
    quantize(model, tmp_path / "q.gguf", "Q2_K", tmp_path / "filled.gguf")
    a, b = tensors(q2_k), tensors(tmp_path / "q.gguf")
    starved = 7  # the expert of layer 2 that saw seven tokens
    changed = [np.mean(a[DOWN][e] != b[DOWN][e]) for e in range(8)]
    assert changed[starved] > 0.3
    assert max(changed[:starved]) < 0.05
    assert np.array_equal(a["blk.0.attn_q_a.weight"], b["blk.0.attn_q_a.weight"])


def test_means_are_made_as_llama_quantize_makes_them():
    means = pytest.importorskip("llama_quantize").means
    stats = Statistics()
    add(stats.sums, "e", [3.0, 5.0], 3, row=1, n_rows=2)
    assert means(stats)["e"].tolist() == [1, 1, 1, np.float32(5) / np.float32(3)]
