"""What the tests of the forward pass run: checkpoints, files, and small models in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from quantkit.forward.hyper import Constants, read_hyper
from quantkit.forward.matrices import Compute, Matrices
from quantkit.forward.rows import RamRows
from quantkit.forward.stream import Sequences, Stream
from quantkit.pipeline.opening import opened
from quantkit.types import GgmlType, Kv, KvType

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
EXACT = Compute(activations="exact")


class ArrayWeights:
    """Weights in memory."""

    def __init__(self, kvs: Mapping[str, Kv], arrays: Mapping[str, np.ndarray]) -> None:
        self.kvs, self.arrays = kvs, arrays

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def type(self, name: str) -> GgmlType:
        return GgmlType.F32

    def read(self, name: str, begin: int, end: int) -> np.ndarray:
        array = self.arrays[name]
        return array.reshape(-1, array.shape[-1])[begin:end].copy()


def moe_model(n_layers: int = 3, seed: int = 0) -> ArrayWeights:
    """A random DeepSeek-V3 of width 32, one dense layer, four experts of which two are used."""
    u32, f32 = KvType.U32, KvType.F32
    numbers = {
        "block_count": n_layers,
        "embedding_length": 32,
        "attention.head_count": 2,
        "attention.kv_lora_rank": 16,
        "attention.key_length_mla": 16,
        "attention.value_length_mla": 8,
        "rope.dimension_count": 8,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_gating_func": 2,
    }
    kvs = {f"deepseek2.{key}": Kv(u32, value) for key, value in numbers.items()}
    kvs["deepseek2.attention.layer_norm_rms_epsilon"] = Kv(f32, 1e-5)
    kvs["deepseek2.expert_weights_norm"] = Kv(KvType.BOOL, True)
    kvs["general.architecture"] = Kv(KvType.STRING, "deepseek2")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (40, 32),
        "output.weight": (40, 32),
        "output_norm.weight": (32,),
    }
    for layer in range(n_layers):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (32,),
            "ffn_norm": (32,),
            "attn_q": (32, 32),
            "attn_kv_a_mqa": (24, 32),
            "attn_kv_a_norm": (16,),
            "attn_k_b": (2, 16, 8),
            "attn_v_b": (2, 8, 16),
            "attn_output": (32, 16),
        }
        if layer == 0:
            parts |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
        else:
            parts |= {
                "ffn_gate_inp": (4, 32),
                "ffn_gate_exps": (4, 16, 32),
                "ffn_up_exps": (4, 16, 32),
                "ffn_down_exps": (4, 32, 16),
            }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
    rng = np.random.default_rng(seed)
    return ArrayWeights(
        kvs, {name: _fill(rng, name, shape) for name, shape in sorted(shapes.items())}
    )


def _fill(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape, np.float32)
    return 1 + x / 10 if "norm" in name else x * np.float32(shape[-1] ** -0.5)


def stream_of(weights, ids: np.ndarray | Sequences, constants: Constants = "llama.cpp", **kwargs):
    """A stream that has not started: `compute` and `rows` may be given."""
    sequences = ids if isinstance(ids, Sequences) else Sequences.of(ids)
    hyper = read_hyper(weights.kvs, constants)
    matrices = Matrices(weights, kwargs.get("compute", EXACT), kwargs.get("observer"))
    return Stream(matrices, hyper, sequences, kwargs.get("rows", RamRows))


def passed(stream: Stream) -> Stream:
    """The same stream behind its last layer."""
    with torch.inference_mode():
        stream.embed()
        for layer in range(stream.hyper.n_layers):
            stream.advance(layer)
    return stream


def all_logits(stream: Stream) -> np.ndarray:
    """f32[n_tok, n_vocab] of a stream behind its last layer."""
    with torch.inference_mode():
        tiles = [tile for _, tile in stream.logits(np.arange(len(stream.sequences)))]
        return torch.cat(tiles, 1).numpy()


def logits_of(
    path: Path, ids: np.ndarray, constants: Constants = "config", compute: Compute = EXACT
) -> np.ndarray:
    """f32[*ids.shape, n_vocab] of a checkpoint's folder or a GGUF file."""
    with opened(path, constants) as model:
        stream = stream_of(model.weights, np.atleast_2d(ids), constants, compute=compute)
        return all_logits(passed(stream)).reshape(*ids.shape, -1)
