"""What a conversion leaves behind, read back by gguf-py."""

from __future__ import annotations

import hashlib
import json
import os

import gguf
import numpy as np
import pytest

from quantkit.pipeline import Job, Output, convert
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.packed import read_tile


def tensors_of(folder, pattern="m-*.gguf"):
    found = {}
    for path in sorted(folder.glob(pattern)):
        for tensor in gguf.GGUFReader(path).tensors:
            found[tensor.name] = (tensor.tensor_type, np.array(tensor.data))
    return found


def values(found, name):
    type_, data = found[name]
    return gguf.quants.dequantize(data, type_)


def source(fixture_model, name):
    with open_checkpoint(fixture_model) as checkpoint:
        weight = checkpoint.weights[name]
        return read_tile(checkpoint, weight, 0, weight.n_rows)


LAYER = "language_model.model.layers.2."


def test_int4_experts_are_bit_equal_to_the_source_in_q4_x(converted, fixture_model):
    found = tensors_of(converted("q4_x"))
    for part in ("gate", "up", "down"):
        stacked = values(found, f"blk.2.ffn_{part}_exps.weight")
        assert stacked.shape[0] == 8
        for e in range(8):
            theirs = source(fixture_model, f"{LAYER}mlp.experts.{e}.{part}_proj.weight")
            assert np.array_equal(stacked[e].view(np.uint32), theirs.view(np.uint32))


def test_bf16_keeps_every_stored_bit_and_splits_kv_b_per_head(converted, fixture_model):
    found = tensors_of(converted("bf16"))
    kv_b = source(fixture_model, f"{LAYER}self_attn.kv_b_proj.weight").reshape(8, 128, 256)
    assert np.array_equal(values(found, "blk.2.attn_k_b.weight"), kv_b[:, :64].transpose(0, 2, 1))
    assert np.array_equal(values(found, "blk.2.attn_v_b.weight"), kv_b[:, 64:])
    q_a = source(fixture_model, f"{LAYER}self_attn.q_a_proj.weight")
    assert np.array_equal(values(found, "blk.2.attn_q_a.weight"), q_a)


def test_norms_router_and_biases_stay_f32_whatever_the_recipe(converted):
    found = tensors_of(converted("q4_x"))
    for name, (type_, data) in found.items():
        protected = data.ndim == 1 or "norm" in name or "ffn_gate_inp" in name
        assert (type_ == gguf.GGMLQuantizationType.F32) == protected, name


def test_a_split_conversion_holds_the_same_bytes_as_a_single_file(converted):
    whole, split = converted("q8_0"), converted("q8_0", 6_000_000)
    shards = sorted(split.glob("m-*.gguf"))
    assert len(shards) >= 3
    assert all(path.stat().st_size <= 6_000_000 for path in shards)
    one, many = tensors_of(whole), tensors_of(split)
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name][1], many[name][1]) for name in one)


def test_the_plan_says_what_is_then_written(converted, fixture_model, tmp_path):
    from click.testing import CliRunner

    from quantkit.cli import cli

    folder = converted("q4_x", 6_000_000)
    arguments = ["--recipe", "q4_x", "--name", "m", "--max-shard-size", "6MB", "--json"]
    result = CliRunner().invoke(cli, ["plan", str(fixture_model), *arguments])
    data = json.loads(result.stdout)
    written = {path.name: path.stat().st_size for path in folder.glob("*.gguf")}
    assert {s["file"]: s["n_bytes"] for plan in data["files"] for s in plan["shards"]} == written
    for plan in data["files"]:
        readers = {s["file"]: gguf.GGUFReader(folder / s["file"]) for s in plan["shards"]}
        for tensor in plan["tensors"]:
            (theirs,) = (t for t in readers[tensor["shard"]].tensors if t.name == tensor["name"])
            assert theirs.data_offset == tensor["begin"]
            assert theirs.n_bytes == tensor["n_bytes"]
            assert theirs.tensor_type.name == tensor["type"]


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_bytes_do_not_depend_on_threads(converted, fixture_model, tmp_path, n_threads):
    expected = converted("q8_0", 6_000_000)
    job = Job(fixture_model, "q8_0", Limits(6_000_000), name="m")
    convert(job, Output(tmp_path, n_threads), Silent())
    assert digests(tmp_path) == digests(expected)


def test_the_bytes_do_not_depend_on_the_tile_size(converted, fixture_model, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.plan.tiles.TILE_WEIGHTS", 7 * 512)
    job = Job(fixture_model, "q4_x", Limits(None), name="m")
    convert(job, Output(tmp_path, 2), Silent())
    assert digests(tmp_path) == digests(converted("q4_x"))


def test_nothing_but_files_and_manifests_is_left(converted):
    names = {path.name for path in converted("q4_x").iterdir()}
    assert names == {
        "m-Q4_X.gguf",
        "m-Q4_X.manifest.json",
        "mmproj-m-F16.gguf",
        "mmproj-m-F16.manifest.json",
    }


def test_running_again_does_nothing(fixture_model, tmp_path):
    job = Job(fixture_model, "q4_x", Limits(None), name="m", mmproj=None)
    convert(job, Output(tmp_path, 2), Silent())
    before = os.stat(tmp_path / "m-Q4_X.gguf")
    convert(job, Output(tmp_path, 2), Silent())
    after = os.stat(tmp_path / "m-Q4_X.gguf")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.gguf")}
