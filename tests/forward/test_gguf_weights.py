"""A GGUF file runs as the checkpoint does that it was made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.container.reader import read_gguf
from quantkit.errors import NonFiniteError, UnsupportedError, UsageError
from quantkit.forward.hyper import read_hyper
from quantkit.forward.matrices import Compute
from quantkit.pipeline.opening import opened, opened_gguf
from quantkit.types import GgmlType, Kv, KvType
from tests.forward.support import (
    FIXTURE,
    ArrayWeights,
    all_logits,
    logits_of,
    moe_model,
    passed,
    stream_of,
)
from tests.quantize.ggml import ggml_decode

FAMILIES = ["llama", "llama-tied", "mistral", "deepseek-v3-grouped", "kimi-k2-thinking", "fixture"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_f32_file_gives_the_checkpoints_logits_bit_for_bit(family, checkpoint, converted):
    folder = checkpoint(family)
    ids = np.random.default_rng(1).integers(3, 500, (2, 40))
    from_file = logits_of(converted("f32", folder), ids)
    assert from_file.tobytes() == logits_of(folder, ids).tobytes()


@pytest.mark.parametrize("recipe", ["q8_0", "q2_k"])
def test_a_quantised_file_runs_the_weights_that_ggml_decodes(recipe, converted):
    path = converted(recipe)
    arrays = {}
    file = read_gguf(path)
    raw = path.read_bytes()
    for tensor in file.tensors:
        data = np.frombuffer(raw, np.uint8, tensor.n_bytes, tensor.begin)
        rows = ggml_decode(data.reshape(-1, tensor.type.row_bytes(tensor.shape[-1])), tensor.type)
        arrays[tensor.name] = rows.reshape(tensor.shape)
    ids = np.random.default_rng(1).integers(3, 4000, (2, 40))
    decoded = all_logits(passed(stream_of(ArrayWeights(file.kvs, arrays), ids, "config")))
    assert logits_of(path, ids).reshape(decoded.shape).tobytes() == decoded.tobytes()


def test_activations_are_rounded_by_the_stored_type_of_the_weight_they_meet(converted):
    ids = np.random.default_rng(1).integers(3, 4000, (1, 40))
    rounding = Compute(activations="llama.cpp")
    exact = logits_of(converted("q8_0"), ids)
    off = np.abs(logits_of(converted("q8_0"), ids, compute=rounding) - exact).max()
    assert 1e-3 < off / np.abs(exact).max() < 0.1
    # Nothing but the cache is rounded where the weights are f32.
    off = np.abs(logits_of(FIXTURE, ids, compute=rounding) - logits_of(FIXTURE, ids)).max()
    assert 0 < off / np.abs(exact).max() < 1e-2


def test_bf16_computes_nearly_the_same():
    ids = np.random.default_rng(1).integers(3, 4000, (1, 40))
    exact = logits_of(FIXTURE, ids)
    coarse = logits_of(FIXTURE, ids, compute=Compute(dtype=torch.bfloat16, activations="exact"))
    assert coarse.dtype == np.float32
    assert 1e-4 < np.abs(coarse - exact).max() / np.abs(exact).max() < 0.1


def test_logits_come_in_tiles_that_memory_bounds(monkeypatch):
    """However many rows of a narrow head fit into a tile of weights."""
    monkeypatch.setattr("quantkit.forward.stream._LOGIT_BYTES", 4 * 12 * 7)
    stream = passed(stream_of(moe_model(), np.arange(12)[None]))
    with torch.inference_mode():
        tiles = list(stream.logits(np.arange(12)))
    assert [first for first, _ in tiles] == list(range(0, 40, 7))
    assert [tile.shape[1] for _, tile in tiles] == [7, 7, 7, 7, 7, 5]


def test_weights_that_overflow_are_named_by_their_layer():
    model = moe_model()
    model.arrays["blk.1.ffn_down_exps.weight"][:] = np.float32(3e38)
    with pytest.raises(NonFiniteError, match="after layer 1"):
        passed(stream_of(model, np.arange(30)[None]))


def test_a_file_with_nan_among_its_weights_is_refused(converted, tmp_path):
    path = converted("f32")
    tensor = next(t for t in read_gguf(path).tensors if t.name == "blk.2.attn_output.weight")
    raw = bytearray(path.read_bytes())
    raw[tensor.begin : tensor.begin + 4] = np.float32(np.nan).tobytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(raw)
    with pytest.raises(NonFiniteError, match=r"blk\.2\.attn_output\.weight") as caught:
        logits_of(damaged, np.arange(8)[None])
    assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("token", [-1, 40])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(UsageError, match="vocabulary of 40"):
        passed(stream_of(moe_model(), np.array([[1, token]])))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", Kv(KvType.STRING, "gpt2"), "gpt2"),
        ("deepseek2.expert_gating_func", Kv(KvType.U32, 7), "expert_gating_func 7"),
        ("deepseek2.rope.scaling.type", Kv(KvType.STRING, "longrope"), "longrope"),
        (
            "deepseek2.attention.head_count",
            Kv(KvType.ARRAY, [2, 2, 4], KvType.U32),
            "from layer to layer",
        ),
    ],
)
def test_what_has_no_blocks_here_is_refused(key, value, message):
    kvs = {**moe_model().kvs, key: value}
    kvs["deepseek2.rope.scaling.factor"] = Kv(KvType.F32, 4.0)
    with pytest.raises(UnsupportedError, match=message):
        read_hyper(kvs)


def test_shards_are_one_model(checkpoint, converted, tmp_path):
    from quantkit.pipeline import Job, Output, convert
    from quantkit.plan.build import Limits
    from quantkit.run.events import Silent

    folder = checkpoint("llama")
    job = Job(folder, "f32", Limits(max_shard_tensors=5), name="m", mmproj=None)
    convert(job, Output(tmp_path, 1), Silent())
    first = min(tmp_path.glob("*.gguf"))
    assert len(list(tmp_path.glob("*.gguf"))) > 2
    ids = np.arange(3, 40)[None]
    assert logits_of(first, ids).tobytes() == logits_of(folder, ids).tobytes()


def test_a_closed_file_leaves_no_descriptor(converted):
    import os

    path = converted("f32")
    before = len(os.listdir("/proc/self/fd"))
    with opened_gguf(path, "config"), opened(path, "config"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_types_are_those_of_the_file(converted):
    with opened_gguf(converted("q2_k"), "config") as model:
        assert model.weights.type("blk.0.ffn_up.weight") is GgmlType.Q2_K
    with opened(FIXTURE, "config") as model:
        assert model.weights.type("blk.0.ffn_up.weight") is GgmlType.F32
