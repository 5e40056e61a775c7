"""A checkpoint in each format converts to the same file as the weights that it means."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from make_hf_checkpoint import make
from safetensors.torch import load_file

from quantkit.pipeline import Job, Output, convert
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from quantkit.write.manifest import load_manifest, manifest_path
from tests.builders import formats as build
from tests.builders.safetensors import f32, write_checkpoint

RNG = np.random.default_rng(23)


def scales(*shape):
    return (RNG.uniform(1e-3, 1e-2, shape)).astype(np.float16).astype(np.float32)


def codes(bits, *shape):
    return RNG.integers(0, 1 << bits, shape)


def linear(bits, *, size=32, **weights):
    return build.ct_config(
        g=(["Linear"], build.ct_weights(bits, size=size, **weights), None)
    )["quantization_config"]  # fmt: skip


def packed(bits, size, *, zero):
    def store(name, rows, cols):
        z = codes(bits, rows, cols // size) if zero else None
        return build.packed_integers(
            name, codes(bits, rows, cols), scales(rows, cols // size), bits, z
        )

    return store, linear(bits, size=size, symmetric=not zero)


def gptq(*, order):
    def store(name, rows, cols):
        g_idx = RNG.permutation(cols) // 32 if order else None
        zero = RNG.integers(1, 16, (rows, cols // 32)) if order else np.full((rows, cols // 32), 8)
        return build.gptq(
            name, codes(4, rows, cols), zero, scales(rows, cols // 32), 4, g_idx=g_idx
        )

    declared = {"bits": 4, "group_size": 32, "desc_act": order, "sym": not order}
    return store, {"quant_method": "gptq", **declared}


def awq():
    def store(name, rows, cols):
        groups = (rows, cols // 32)
        return build.awq(name, codes(4, rows, cols), codes(4, *groups), scales(*groups))

    return store, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def mxfp4():
    def store(name, rows, cols):
        exponents = RNG.integers(116, 122, (rows, cols // 32))
        return build.mxfp4(name, codes(4, rows, cols), exponents)

    return store, linear(4, type="float")


def nvfp4():
    def store(name, rows, cols):
        return build.nvfp4(
            name, codes(4, rows, cols), RNG.integers(1, 127, (rows, cols // 16)), 9000.0
        )

    return store, linear(4, size=16, type="float", strategy="tensor_group")


def fp8():
    def store(name, rows, cols):
        return build.fp8(name, codes(8, rows, cols) & 0xFE, scales(rows, 1))

    return store, linear(8, size=None, type="float", strategy="channel")


def nf4():
    def store(name, rows, cols):
        n_blocks = rows * cols // 64
        nested = (np.linspace(-1, 1, 256), scales(-(-n_blocks // 256)), 256, 0.02)
        return build.bnb_4bit(name, codes(4, rows, cols), codes(8, n_blocks), 64, "nf4", nested)

    return store, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def int8():
    def store(name, rows, cols):
        return build.bnb_int8(name, RNG.integers(-127, 128, (rows, cols)), scales(rows))

    return store, {"quant_method": "bitsandbytes", "load_in_8bit": True}


FORMATS = {
    "int4, groups of 64": packed(4, 64, zero=False),
    "int8, groups of 128": packed(8, 128, zero=False),
    "int8 with zeros": packed(8, 32, zero=True),
    "int3 with zeros": packed(3, 64, zero=True),
    "gptq": gptq(order=False),
    "gptq, desc_act": gptq(order=True),
    "awq": awq(),
    "mxfp4": mxfp4(),
    "nvfp4": nvfp4(),
    "fp8 by row": fp8(),
    "nf4": nf4(),
    "llm.int8": int8(),
}
EXACT = {
    "int4, groups of 64": "Q4_0",
    "gptq": "Q4_0",
    "int8, groups of 128": "Q8_0",
    "mxfp4": "MXFP4",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A llama with every tensor in F32, and its folder, from which side files are taken."""
    folder = tmp_path_factory.mktemp("plain")
    make("llama", folder)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    return folder, {name: tensor.float().numpy() for name, tensor in tensors.items()}


def both(plain, format_, root):
    """The same model stored in a format, and as the values that it stands for."""
    folder, tensors = plain
    store, scheme = FORMATS[format_]
    stored, meant = {}, {}
    for name, values in tensors.items():
        parts, means = {name: f32(values)}, values
        if name.endswith("_proj.weight"):
            parts, means = store(name, *values.shape)
        stored |= parts
        meant[name] = f32(means)
    config = json.loads((folder / "config.json").read_text())
    quantised = {**config, "quantization_config": scheme}
    for path, parts, settings in (("a", stored, quantised), ("b", meant, config)):
        for side in folder.iterdir():
            if "safetensors" not in side.name:
                (root / path).mkdir(exist_ok=True)
                shutil.copy(side, root / path)
        write_checkpoint(root / path, {"model.safetensors": parts}, settings)
    return root / "a", root / "b"


def converted(model, recipe, out):
    convert(Job(model, recipe, Limits(None), name="m"), Output(out, 1), Silent())
    (file,) = out.glob("*.gguf")
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_checkpoint_converts_as_what_it_means(format_, plain, tmp_path):
    quantised, meant = both(plain, format_, tmp_path)
    ours = converted(quantised, "f32", tmp_path / "ours")
    theirs = converted(meant, "f32", tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.data.view(np.uint32) == theirs[name].data.view(np.uint32)).all(), name


@pytest.mark.parametrize("format_", EXACT)
def test_levels_that_a_type_has_are_copied_into_it_whatever_the_order_of_rows(
    format_, plain, tmp_path
):
    """The rows of q and k are interleaved on the way."""
    quantised, meant = both(plain, format_, tmp_path)
    (tmp_path / "r.yaml").write_text(f"name: r\ndefault: {EXACT[format_]}\n")
    ours = converted(quantised, str(tmp_path / "r.yaml"), tmp_path / "ours")
    theirs = converted(meant, "f32", tmp_path / "theirs")
    manifest = load_manifest(manifest_path(tmp_path / "ours", "m-r"))
    copied = {t.name for shard in manifest.shards for t in shard.tensors if t.repacked}
    assert len(copied) == 2 * 7
    for name in copied:
        assert ours[name].tensor_type.name == EXACT[format_]
        values = dequantize(ours[name].data, ours[name].tensor_type)
        assert (values == theirs[name].data).all(), name
