"""What fits where: the published cases of Kimi K2.5, and llama.cpp's own figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.container.kv import string
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.errors import UsageError
from quantkit.guide.memory import (
    Machine,
    Place,
    cache_bytes,
    compute_bytes,
    context,
    fit,
    longest_ctx,
)
from quantkit.types import GgmlType
from tests.guide.builders import LLAMA_8B, SMOLLM2, dense, kimi, kimi_file, llama_file

GB, GIB = 10**9, 2**30


def test_98304_tokens_of_kimi_k2_5_take_6_4_gib_of_cache():
    n_bytes = cache_bytes(kimi_file().shape, 98_304)
    assert n_bytes == 98_304 * 61 * 576 * 2
    assert round(n_bytes / GIB, 1) == 6.4


def test_24_gb_and_256_gb_run_the_smallest_kimi_k2_5_with_experts_in_ram():
    model = kimi_file("ud-tq1_0")
    laid = fit(model, Machine(24 * GB, 256 * GB), 98_304)
    assert model.n_bytes <= 240 * GB
    assert laid.place is Place.RAM
    assert laid.n_gpu_layers == 62, "all layers, and the head"
    experts = sum(t.n_bytes for t in laid.in_ram)
    assert experts > 0.98 * sum(t.n_bytes for t in model.experts)
    assert laid.vram.total <= 24 * GB
    assert laid.ram.total <= 256 * GB


@pytest.mark.parametrize(
    ("machine", "place"),
    [
        (Machine(24 * GB, 256 * GB, 250 * GB), Place.RAM),
        (Machine(0, 256 * GB), Place.RAM),
        (Machine(80 * GB, 192 * GB), Place.RAM),
        (Machine(4 * 80 * GB, 64 * GB), Place.VRAM),
        (Machine(24 * GB, 128 * GB), Place.DISK),
        (Machine(0, 240 * GB), Place.DISK),
        (Machine(24 * GB, 256 * GB, 239 * GB), Place.NOWHERE),
        (Machine(24 * GB, 4 * GB), Place.NOWHERE),
        (Machine(0, 10 * GB), Place.NOWHERE),
    ],
)
def test_where_the_smallest_kimi_k2_5_runs_from(machine, place):
    assert fit(kimi_file("ud-tq1_0"), machine, 98_304).place is place


def test_more_vram_takes_the_experts_of_the_last_layers():
    laid = fit(kimi_file(), Machine(96 * GB, 256 * GB), 98_304)
    layers = {tensor.layer for tensor in laid.in_ram}
    assert min(layers) == 1
    assert layers == set(range(1, max(layers) + 1))
    assert 30 < max(layers) < 60


def test_types_without_cuda_kernels_stay_in_ram():
    laid = fit(kimi_file("tq1_0"), Machine(640 * GB, 640 * GB), 98_304)
    assert laid.in_ram == kimi_file("tq1_0").experts


def test_a_dense_model_that_does_not_fit_is_split_by_layers():
    model = llama_file()
    laid = fit(model, Machine(6 * GB, 32 * GB), 8192)
    assert laid.place is Place.RAM
    assert 1 < laid.n_gpu_layers <= model.shape.n_layers
    assert not laid.in_ram


def test_a_tied_embedding_is_held_on_both_sides():
    model = llama_file("q8_0", small=True)
    laid = fit(model, Machine(24 * GB, 32 * GB), 8192)
    embedding = next(t.n_bytes for t in model.tensors if t.name == "token_embd.weight")
    assert laid.place is Place.VRAM
    assert laid.vram.weights + laid.ram.weights == model.weights_bytes + embedding


@settings(max_examples=60, deadline=None)
@given(vram=st.integers(0, 700), ram=st.integers(1, 700), n_ctx=st.integers(1, 262_144))
def test_every_tensor_lies_in_one_place_and_vram_is_never_exceeded(vram, ram, n_ctx):
    model = kimi_file()
    laid = fit(model, Machine(vram * GB, ram * GB), n_ctx)
    assert laid.vram.weights + laid.ram.weights == model.weights_bytes
    assert laid.vram.cache + laid.ram.cache == cache_bytes(model.shape, n_ctx)
    assert laid.vram.total <= vram * GB
    if laid.place in (Place.VRAM, Place.RAM):
        assert laid.ram.total <= ram * GB


@pytest.mark.parametrize("gigabytes", [17, 20, 24, 32])
def test_the_longest_context_is_the_last_that_fits(gigabytes):
    model, machine = kimi_file(), Machine(gigabytes * GB, 256 * GB)
    longest = longest_ctx(model, machine)
    assert fit(model, machine, longest).n_gpu_layers == 62
    if longest < model.shape.n_ctx:
        assert fit(model, machine, longest + 1024).n_gpu_layers < 62


def test_the_context_is_what_the_model_allows():
    shape = llama_file(small=True).shape
    assert context(shape, None) == 8192
    assert context(kimi_file().shape, None) == 98_304
    with pytest.raises(UsageError, match="more than the model's 8,192"):
        context(shape, 8193)


def test_a_machine_without_ram_is_refused():
    with pytest.raises(UsageError, match="more than 0 bytes"):
        Machine(24 * GB, 0)


# llama.cpp loads a file without its data (no_alloc) and tells what a context would take.
_MEASURE = """
import sys, llama_cpp as api
said = []
@api.llama_log_callback
def listen(_level, text, _data):
    said.append(text.decode(errors="replace"))
api.llama_log_set(listen, None)
params = api.llama_model_default_params()
params.no_alloc, params.load_mode, params.n_gpu_layers = True, 0, 0
model = api.llama_model_load_from_file(sys.argv[1].encode(), params)
assert model, "".join(said)[-800:]
for n_ctx, type_ in zip(sys.argv[2::2], sys.argv[3::2]):
    options = api.llama_context_default_params()
    options.n_ctx, options.type_k, options.type_v = int(n_ctx), int(type_), int(type_)
    assert api.llama_init_from_model(model, options), "".join(said)[-800:]
print("".join(said))
"""
_CASES = [(512, 1), (1000, 1), (32_768, 1), (98_304, 1), (98_304, 8)]


@pytest.mark.parametrize(
    ("described", "file"),
    [
        (kimi, kimi_file),
        (lambda: dense(LLAMA_8B), llama_file),
        (lambda: dense(SMOLLM2), lambda: llama_file(small=True)),
    ],
    ids=["kimi k2.5", "llama 8b", "smollm2"],
)
def test_cache_and_buffers_are_what_llama_cpp_allocates(described, file, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    gguf = _hollow(described(), tmp_path / "m.gguf")
    arguments = [str(n) for case in _CASES for n in case]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(gguf), *arguments],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    caches = re.findall(r"kv_cache: size = +([\d.]+) MiB", done.stdout)
    buffers = re.findall(r"compute buffer size = +([\d.]+) MiB", done.stdout)
    assert len(caches) == len(buffers) == len(_CASES)
    shape = file().shape
    for (n_ctx, type_), cache, buffer in zip(_CASES, caches, buffers, strict=True):
        ours = cache_bytes(shape, n_ctx, GgmlType(type_)) / 2**20
        assert ours == pytest.approx(float(cache), abs=0.006)
        estimate = compute_bytes(shape, n_ctx) / 2**20
        assert float(buffer) <= estimate <= 2 * float(buffer) + 16, f"{n_ctx}: {buffer} MiB"


def _hollow(model, path: Path) -> Path:
    """A file of the model with a hole for data; Q8_0, and no vocabulary."""
    tensors = [
        TensorEntry(t.name, t.shape, GgmlType.Q8_0 if t.keep is None else t.keep)
        for t in model.tensors
    ]
    kvs = {
        "general.architecture": string(model.arch),
        "tokenizer.ggml.model": string("none"),
        **model.kvs,
    }
    (shard,) = lay_out("m", kvs, tensors, max_shard_bytes=None, max_shard_tensors=None)
    with path.open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.n_bytes)
    return path
