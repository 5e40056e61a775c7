"""Make a two-layer Kimi K2.5 text checkpoint of the real width with random weights.

    python scripts/make_wide_layer.py OUT --experts 64

One dense and one mixture-of-experts layer; hidden size 7168, experts of 2048, INT4 groups of 32.
The vocabulary is small and there is no vision tower. 3 GB of disk with 64 experts, about 1 GB of
memory: values come from a random pool, entered at a random place for each tensor.
"""

from __future__ import annotations

import argparse
import zlib
from math import prod
from pathlib import Path
from typing import Any

import _kimi
import numpy as np
from _common import Entry, to_bf16, write_checkpoint
from numpy.typing import NDArray

_POOL = 1 << 24


class _Weights:
    """Random data by tensor name: the same name and seed give the same bytes."""

    def __init__(self, text: dict[str, Any], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.text = text
        self.seed = seed
        self.normal = rng.standard_normal(_POOL, np.float32)
        # 15 levels, as the published experts have: -8, nibble 0, does not occur.
        levels = np.clip(np.rint(self.normal * 2.5), -7, 7).astype(np.int8) + 8
        self.nibbles = levels.astype(np.uint8)[::2] | levels.astype(np.uint8)[1::2] << 4

    def data(self, entry: Entry) -> memoryview:
        rng = np.random.default_rng([self.seed, zlib.crc32(entry.name.encode())])
        leaf = entry.name.rsplit(".", 1)[-1]
        if leaf == "weight_shape":
            return np.array(_kimi.weight_shape(self.text, entry.name), "<i4").data.cast("B")
        if leaf == "weight_packed":
            return np.resize(_cut(self.nibbles, entry.n_bytes, rng), entry.n_bytes).data
        count = prod(entry.shape)
        normal: NDArray[np.float32] = _cut(self.normal, count, rng)
        if leaf == "e_score_correction_bias":
            return (normal * np.float32(0.01)).data.cast("B")
        if leaf == "weight_scale":
            values = np.float32(0.004) * np.exp2(normal * np.float32(0.3))
        elif len(entry.shape) == 1:
            values = np.float32(1) + normal * np.float32(0.1)
        else:
            values = normal * np.float32(entry.shape[-1] ** -0.5)
        return np.resize(to_bf16(values), count).data.cast("B")


def _cut(pool: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[Any]:
    """`count` consecutive values from a random place of the pool, or all of it if it has fewer."""
    start = int(rng.integers(max(1, pool.size - count)))
    return pool[start : start + count]


def make(out: Path, *, seed: int = 0, **text_fields: Any) -> None:
    """Write the checkpoint into the folder `out`; `text_fields` replace those of `text_config`."""
    config = _kimi.config(num_hidden_layers=2, **text_fields)
    text = config["text_config"]
    shards = [_kimi.layer_entries(text, 0), _kimi.layer_entries(text, 1), _kimi.top_entries(text)]
    write_checkpoint(out, shards, _Weights(text, seed).data, _kimi.SHARD_NAME)
    _kimi.write_aux_files(out, config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A two-layer Kimi K2.5 checkpoint of real width.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(
        arguments.out,
        seed=arguments.seed,
        n_routed_experts=arguments.experts,
        vocab_size=arguments.vocab_size,
    )
