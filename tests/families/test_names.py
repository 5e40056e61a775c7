"""Names, shapes and numbers are those that llama.cpp's converter writes: gguf-py has its tables."""

from __future__ import annotations

import re

import gguf
import pytest
from safetensors import safe_open

from quantkit.container.reader import read_gguf

models = pytest.importorskip("tests.families.models")
NAMES = sorted(models.TINY)
ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
# Experts one by one become one tensor, gate and up of gpt-oss two.
_EXPERT = re.compile(r"experts\.\d+\.")


def mapped(name: str, table: gguf.TensorNameMap) -> set[str]:
    """GGUF names of a checkpoint's tensor by gguf-py's table."""
    name = _EXPERT.sub("experts.", name).replace("block_sparse_moe.experts.w", "mlp.experts.w")
    name = name.replace("self_attn.sinks", "self_attn.sinks.weight")
    name = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
    name = re.sub(r"(experts\.\w+_proj)_bias$", r"\1.bias", name)
    name = re.sub(r"(experts\.\w+_proj)$", r"\1.weight", name)
    parts = [name]
    if "experts.gate_up_proj" in name:
        parts = [name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
    if "mlp.experts.w" in name:
        parts = [name.replace("mlp.experts.w", "block_sparse_moe.experts.w")]
    found = {table.get_name(part, try_suffixes=(".weight", ".bias")) for part in parts}
    if None in found:  # Mixtral's experts go by Llama's own names
        parts = [
            re.sub(r"model\.(layers\.\d+\.)block_sparse_moe", r"\1feed_forward", p) for p in parts
        ]
        found = {table.get_name(part, try_suffixes=(".weight", ".bias")) for part in parts}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_checkpoint_gets_the_name_of_gguf_pys_table(name, tiny, file_of):
    folder = tiny(name)
    file = read_gguf(file_of(folder))
    arch = str(file.kvs["general.architecture"].value)
    table = gguf.get_tensor_name_map(ARCHS[arch], 8)
    with safe_open(folder / "model.safetensors", "pt") as checkpoint:
        expected = set().union(*(mapped(key, table) for key in checkpoint.keys()))  # noqa: SIM118
    constants = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    assert {tensor.name for tensor in file.tensors} - constants == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_one_of_gguf_pys(name, tiny, file_of):
    kvs = read_gguf(file_of(tiny(name))).kvs
    arch = str(kvs["general.architecture"].value)
    known = {
        value.replace("{arch}", arch)
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    assert {key for key in kvs if key.startswith(arch)} <= known
