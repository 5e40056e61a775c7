"""Recipes named like llama.cpp's presets give the types that llama-quantize gives."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.arch.base import Config, Model, WeightMap
from quantkit.arch.deepseek import DeepSeek
from quantkit.arch.llama import Llama
from quantkit.container.kv import string, u32
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.pipeline import Job, planned
from quantkit.plan.build import TypeChooser
from quantkit.recipe import load_recipe
from quantkit.run.events import Silent
from quantkit.types import GgmlType, TensorRef, TensorSpec, Weight, WeightFormat

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"

# name -> llama.cpp's number for the preset, `enum llama_ftype`
PRESETS = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
    "iq2_xxs": 19, "iq2_xs": 20, "q2_k_s": 21, "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24,
    "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28, "iq2_m": 29, "iq4_xs": 30, "iq1_m": 31,
    "tq1_0": 36, "tq2_0": 37, "mxfp4_moe": 38, "q1_0": 40, "q2_0": 41,
}  # fmt: skip


class AnyWeights(WeightMap):
    """Has every weight that a family asks for, in the shape that it expects, and no more."""

    def __init__(self) -> None:
        super().__init__({})

    def take(self, name: str, *shape: int) -> Weight:
        ref = TensorRef(name, "BF16", shape, "model.safetensors", 0, 0)
        return Weight(name, WeightFormat.BF16, shape, ref)


def llama(n_layers: int, n_heads: int = 8, n_kv: int = 2, hidden: int = 256, tied: bool = False):
    config = {
        "vocab_size": 512,
        "num_hidden_layers": n_layers,
        "hidden_size": hidden,
        "intermediate_size": 512,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
    }
    return Llama().describe(Config(config), AnyWeights())


def mixture(model: Model, n_experts: int) -> Model:
    """A Llama with its MLPs made experts, in the way of Mixtral."""

    def stacked(tensor: TensorSpec) -> TensorSpec:
        if not tensor.role.startswith("dense_ffn"):
            return tensor
        return replace(
            tensor,
            name=tensor.name.replace(".weight", "_exps.weight"),
            role=tensor.role.replace("dense_ffn", "routed_expert"),
            shape=(n_experts, *tensor.shape),
        )

    kvs = {"llama.expert_count": u32(n_experts), "llama.expert_used_count": u32(2)}
    return replace(model, tensors=tuple(map(stacked, model.tensors)), kvs=model.kvs | kvs)


def deepseek(n_layers: int, n_experts: int, n_dense: int = 1, hidden: int = 256, **fields):
    config = {
        "vocab_size": 512,
        "num_hidden_layers": n_layers,
        "hidden_size": hidden,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": n_dense,
        "n_routed_experts": n_experts,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 2048,
    }
    return DeepSeek().describe(Config(config | fields), AnyWeights())


def fixture() -> Model:
    with planned(Job(FIXTURE, "bf16", mmproj=None), Silent()) as (_, decided):
        plan = decided.plans[-1]
        return Model(plan.arch, tuple(t.spec for t in plan.tensors), dict(plan.kvs))


V2_LITE = {"q_lora_rank": None, "scoring_func": "softmax", "topk_method": "greedy"}
MODELS = {
    "the fixture": fixture,
    "kimi k2.5's depth and experts": lambda: deepseek(61, 384),
    "deepseek v3": lambda: deepseek(61, 256, n_dense=3),
    "deepseek v2-lite": lambda: deepseek(27, 64, **V2_LITE),
    "mla with 8 experts": lambda: deepseek(27, 8, **V2_LITE),
    "mla with 16 experts": lambda: deepseek(16, 16, n_dense=2),
    "mla in narrow rows": lambda: deepseek(27, 16, hidden=192, **V2_LITE),
    "llama 8b": lambda: llama(32),
    "llama with gqa 4, tied": lambda: llama(16, tied=True),
    "llama without gqa": lambda: llama(22, n_kv=8),
    "llama with gqa 2": lambda: llama(17, n_kv=4),
    "llama 70b": lambda: llama(80, n_kv=1),
    "80 layers with gqa 2": lambda: llama(80, n_kv=4),
    "llama 65b": lambda: llama(80, n_kv=8),
    "shallow llama": lambda: llama(2),
    "smollm2 135m": lambda: llama(30, n_heads=9, n_kv=3, hidden=576, tied=True),
    "untied in narrow rows": lambda: llama(9, n_heads=9, n_kv=3, hidden=576),
    "mixtral": lambda: mixture(llama(32), 8),
    "mixtral's experts without gqa": lambda: mixture(llama(32, n_kv=8), 8),
    "80 layers of mixtral": lambda: mixture(llama(80), 8),
    "3 experts": lambda: mixture(llama(20, n_kv=8), 3),
    "60 experts": lambda: mixture(llama(20, n_kv=4), 60),
}


@dataclass(frozen=True)
class Quantizer:
    """llama-quantize with an imatrix, as a dry run: it tells types and writes nothing."""

    api: Any

    def types(self, gguf: Path, preset: int) -> dict[str, GgmlType] | None:
        """Types by tensor name; None where llama-quantize has no type for a row length."""
        api = self.api
        said: list[bytes] = []

        @api.llama_log_callback
        def listen(_level, text, _data):
            said.append(text)

        ones = (ctypes.c_float * 1)(1.0)
        entries = (api.llama_model_imatrix_data * 2)()
        entries[0].name, entries[0].data, entries[0].size = b"x.weight", ones, 1
        params = api.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.dry_run = 1, preset, True
        params.imatrix = entries
        api.llama_log_set(listen, None)
        try:
            failed = api.llama_model_quantize(
                os.fsencode(gguf), b"not-written.gguf", ctypes.byref(params)
            )
        finally:
            api.llama_log_set(api._logger.llama_log_callback, None)
        text = b"".join(said).decode()
        if failed and "no tensor type fallback is defined" in text:
            return None
        assert not failed, text[-500:]
        return dict(_told(text))


_LINE = re.compile(
    r"\] (?P<name>\S+) +- \[.*?\], type = +(?P<old>\w+), size = .*?(?:MiB)"
    r"(?: -> .*? MiB \((?P<new>\w+)\))?$",
    re.MULTILINE,
)


def _told(text: str):
    for line in _LINE.finditer(text):
        yield line["name"], GgmlType[(line["new"] or line["old"]).upper()]


@pytest.fixture(scope="module")
def quantizer():
    return Quantizer(pytest.importorskip("llama_cpp", reason="needs llama-cpp-python"))


def empty_gguf(model: Model, path: Path) -> Path:
    """A file of the model with BF16 matrices and a hole for data."""
    tensors = [
        TensorEntry(t.name, t.shape, GgmlType.BF16 if t.keep is None else t.keep)
        for t in model.tensors
    ]
    kvs = {"general.architecture": string(model.arch)} | model.kvs
    (shard,) = lay_out("m", kvs, tensors, max_shard_bytes=None, max_shard_tensors=None)
    with path.open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.n_bytes)
    return path


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_preset_gives_every_tensor_the_type_that_llama_quantize_gives(
    model, quantizer, tmp_path
):
    described = model()
    gguf = empty_gguf(described, tmp_path / "m.gguf")
    differing = []
    for name, number in PRESETS.items():
        chooser = TypeChooser(load_recipe(name), described.tensors, frozenset(GgmlType))
        ours = {t.name: chooser.choose(t).type for t in described.tensors}
        theirs = quantizer.types(gguf, number)
        if theirs is None:
            assert name == "q1_0", "the only default type without a substitute"
            continue
        assert ours.keys() == theirs.keys()
        differing += [
            f"{name} {tensor}: {type_.name}, llama-quantize {theirs[tensor].name}"
            for tensor, type_ in ours.items()
            if type_ is not theirs[tensor]
        ]
    assert not differing
