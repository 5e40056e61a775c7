"""A zero-padded copy of a Llama checkpoint: the same function, rows that divide into super-blocks.

    python benchmarks/padded.py SRC DST

K-quants and i-quants want rows of whole super-blocks of 256 weights, which small models do not have
(SmolLM2-135M: 576). Here the hidden size, the heads and the MLP's width grow to the next multiple
that does, filled with zeros, so that a small model can stand in for a large one.

The mean square that RMS norm divides by is then taken over more columns, all of them zero. With
r = old / new hidden size, norm weights times sqrt(r) and an epsilon times r undo that:
sqrt(r) x / sqrt(r mean(x^2) + r eps) = x / sqrt(mean(x^2) + eps).

Head sizes stay, and are written out as `head_dim`. transformers runs the result only where the
hidden size is still a multiple of the number of heads; quantkit and llama.cpp do not mind.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from math import lcm, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROW = 256  # weights of a super-block
_FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM"}
_INDEX = "model.safetensors.index.json"

# Which size each axis of a tensor has; a name that matches none of these is refused.
_AXES = {
    r"model\.embed_tokens\.weight": ("vocab", "hidden"),
    r"lm_head\.weight": ("vocab", "hidden"),
    r"model\.norm\.weight": ("hidden",),
    r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight": ("hidden",),
    r"model\.layers\.\d+\.self_attn\.q_proj\.weight": ("q", "hidden"),
    r"model\.layers\.\d+\.self_attn\.[kv]_proj\.weight": ("kv", "hidden"),
    r"model\.layers\.\d+\.self_attn\.o_proj\.weight": ("hidden", "q"),
    r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.weight": ("ffn", "hidden"),
    r"model\.layers\.\d+\.mlp\.down_proj\.weight": ("hidden", "ffn"),
}
_ROLES = [(re.compile(pattern), axes) for pattern, axes in _AXES.items()]


@dataclass(frozen=True)
class Sizes:
    """A model's sizes; heads and key heads keep their ratio, so old heads keep their key heads."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        """What config.json says; SystemExit for what is not a plain Llama."""
        family = (config.get("architectures") or ["no architecture"])[0]
        if family not in _FAMILIES:
            raise SystemExit(f"{family} is none of {', '.join(sorted(_FAMILIES))}")
        if config.get("quantization_config"):
            raise SystemExit("the weights are quantised; dequantise them first")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        if heads % kv_heads:
            raise SystemExit(f"{heads} heads do not share {kv_heads} key heads evenly")
        return cls(
            config["vocab_size"], hidden, heads, kv_heads, head_dim, config["intermediate_size"]
        )

    def padded(self) -> Sizes:
        """The next sizes whose rows are multiples of `ROW`."""
        group = self.heads // self.kv_heads
        kv_step = lcm(group * self.head_dim, ROW) // (group * self.head_dim)
        kv_heads = _up(self.kv_heads, kv_step)
        return Sizes(
            self.vocab,
            _up(self.hidden, ROW),
            kv_heads * group,
            kv_heads,
            self.head_dim,
            _up(self.ffn, ROW),
        )

    def axis(self, name: str) -> int:
        """Length of an axis that `_AXES` names."""
        lengths = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "ffn": self.ffn,
        }
        return lengths[name]


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def pad(source: Path, out: Path) -> Sizes:
    """Write the padded checkpoint into the new folder `out` and return its sizes.

    One tensor file is in memory at a time. Norms are stored as F32, as their factor is no power of
    two; the rest keeps its type and every bit.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    old = Sizes.of(config)
    new = old.padded()
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    n_bytes = 0
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: _padded(name, file.get_tensor(name), old, new) for name in file.keys()}  # noqa: SIM118 - no mapping
        save_file(tensors, out / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        n_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if not weight_map:
        raise SystemExit(f"{source}: no .safetensors file")
    if (source / _INDEX).exists():
        index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
        _write_json(out / _INDEX, index)
    _write_json(out / "config.json", _config(config, old, new))
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
    return new


def _padded(name: str, tensor: torch.Tensor, old: Sizes, new: Sizes) -> torch.Tensor:
    axes = next((axes for pattern, axes in _ROLES if pattern.fullmatch(name)), None)
    if axes is None:
        raise SystemExit(f"{name}: how to pad this is not known")
    expected = tuple(old.axis(axis) for axis in axes)
    if tuple(tensor.shape) != expected:
        raise SystemExit(f"{name}: shape {tuple(tensor.shape)}, config.json says {expected}")
    if len(axes) == 1:
        tensor = (tensor.double() * sqrt(old.hidden / new.hidden)).float()
    padded = tensor.new_zeros([new.axis(axis) for axis in axes])
    padded[tuple(slice(n) for n in expected)] = tensor
    return padded


def _config(config: dict[str, Any], old: Sizes, new: Sizes) -> dict[str, Any]:
    eps = config.get("rms_norm_eps", 1e-6)  # transformers' default
    return config | {
        "hidden_size": new.hidden,
        "num_attention_heads": new.heads,
        "num_key_value_heads": new.kv_heads,
        "head_dim": new.head_dim,
        "intermediate_size": new.ffn,
        "rms_norm_eps": eps * old.hidden / new.hidden,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("out", type=Path, metavar="DST")
    args = parser.parse_args()
    print(f"{args.out}: {pad(args.source, args.out)}")


if __name__ == "__main__":
    main()
