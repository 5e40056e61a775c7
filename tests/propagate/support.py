"""Small random models of every kind of layer, and quantisers that remember what they were shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantkit.forward import blocks
from quantkit.forward.hyper import read_hyper
from quantkit.forward.matrices import Matrices
from quantkit.forward.rows import RamRows
from quantkit.forward.stream import Sequences, Stream
from quantkit.forward.sweep import Settings
from quantkit.propagate.layer import Quantiser
from quantkit.propagate.moments import Moments, Sums
from quantkit.propagate.student import StudentWeights
from quantkit.propagate.sweep import propagate
from quantkit.types import GgmlType, Kv, KvType
from tests.forward.support import EXACT, ArrayWeights, moe_model

Shapes = dict[str, tuple[int, ...]]


def llama_model(n_layers: int = 2, seed: int = 0) -> ArrayWeights:
    """A random Llama of width 32: four query heads share two keys."""
    numbers = {
        "block_count": n_layers,
        "embedding_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    kvs = {f"llama.{key}": Kv(KvType.U32, value) for key, value in numbers.items()}
    kvs["llama.attention.layer_norm_rms_epsilon"] = Kv(KvType.F32, 1e-5)
    kvs["general.architecture"] = Kv(KvType.STRING, "llama")
    shapes: Shapes = {
        "token_embd.weight": (40, 32),
        "output.weight": (40, 32),
        "output_norm.weight": (32,),
    }
    for layer in range(n_layers):
        parts: Shapes = {
            "attn_norm": (32,),
            "ffn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "ffn_gate": (48, 32),
            "ffn_up": (48, 32),
            "ffn_down": (32, 48),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return _filled(kvs, shapes, seed)


def deepseek_model(seed: int = 0) -> ArrayWeights:
    """`moe_model` with a low-rank query and shared experts: two layers, the second routed."""
    model = moe_model(2, seed)
    shapes = {name: array.shape for name, array in model.arrays.items()}
    for layer in range(2):
        del shapes[f"blk.{layer}.attn_q.weight"]
        shapes[f"blk.{layer}.attn_q_a.weight"] = (24, 32)
        shapes[f"blk.{layer}.attn_q_a_norm.weight"] = (24,)
        shapes[f"blk.{layer}.attn_q_b.weight"] = (32, 24)
    for part, shape in {"gate": (24, 32), "up": (24, 32), "down": (32, 24)}.items():
        shapes[f"blk.1.ffn_{part}_shexp.weight"] = shape
    return _filled(model.kvs, shapes, seed)


def _filled(kvs, shapes: Shapes, seed: int) -> ArrayWeights:
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in sorted(shapes.items()):
        x = rng.standard_normal(shape, np.float32)
        arrays[name] = 1 + x / 10 if "norm" in name else x * np.float32(shape[-1] ** -0.5)
    return ArrayWeights(kvs, arrays)


MODELS: dict[str, Callable[[], ArrayWeights]] = {
    "llama": llama_model,
    "deepseek": deepseek_model,
    "deepseek without q_lora and shared experts": lambda: moe_model(2),
}

IDS = np.random.default_rng(3).integers(0, 40, (4, 24))


def weights_of(model: ArrayWeights) -> list[str]:
    """Every matrix that has inputs."""
    return [n for n, a in model.arrays.items() if a.ndim > 1 and n != "token_embd.weight"]


def untouched(name: str, rows: np.ndarray, matrix: int) -> np.ndarray:
    """Tensors that are not rounded by their inputs stay exact."""
    return rows


@dataclass
class Shown:
    """One matrix as it was handed over."""

    name: str
    matrix: int
    all: Sums
    fitted: Sums
    held: Sums


class Remembering:
    """Takes the tensors `wanted`, keeps what it was shown, and puts what `change` makes of them."""

    def __init__(
        self,
        model: ArrayWeights,
        student: StudentWeights,
        wanted: list[str],
        change: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self._model, self._student, self._wanted = model, student, wanted
        self._change = change
        self.shown: list[Shown] = []
        self.final = ArrayWeights(model.kvs, {n: a.copy() for n, a in model.arrays.items()})

    def wants(self, name: str) -> bool:
        return name in self._wanted

    def take(self, name: str, matrix: int, moments: Moments, at: int) -> None:
        sums = (m.of(at) for m in (moments.all(), moments.fitted(), moments.held()))
        self.shown.append(Shown(name, matrix, *sums))
        array = self._model.arrays[name]
        rows = array if array.ndim == 2 else array[matrix]
        new = np.ascontiguousarray(self._change(rows), np.float32)
        self._student.put(name, matrix, GgmlType.F32, new.view(np.uint8))
        if array.ndim == 2:
            self.final.arrays[name] = new
        else:
            self.final.arrays[name][matrix] = new

    def forget(self, name: str, matrix: int) -> None:
        self._student.forget(name, matrix)


def same(rows: np.ndarray) -> np.ndarray:
    """Not quantised at all."""
    return rows


def coarse(rows: np.ndarray) -> np.ndarray:
    """Rounded to steps of 0.1, enough to change every input behind."""
    return np.round(rows * 10) / 10


def passed_pair(
    model: ArrayWeights,
    student: StudentWeights,
    quantiser: Quantiser,
    monkeypatch,
    ids: np.ndarray = IDS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of teacher and student behind the last layer."""
    streams = []
    start = Stream.embed

    def embed(stream: Stream) -> None:
        streams.append(stream)
        start(stream)

    monkeypatch.setattr(Stream, "embed", embed)
    settings = Settings(EXACT, 1 << 30, Path())
    propagate(
        model,
        student,
        read_hyper(model.kvs, "llama.cpp"),
        ids,
        quantiser,
        settings,
        (None, "", 0),
        lambda layer: None,
        lambda done: None,
    )
    monkeypatch.setattr(Stream, "embed", start)
    teacher, pupil = (stream.hidden.read(0, ids.size) for stream in streams)
    return teacher, pupil


class Inputs:
    """An observer: (tensor, expert or None) -> its inputs f32[n_tok, n], in the tokens' order."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, int | None], list[torch.Tensor]] = {}

    def see(self, names: tuple[str, ...], x: torch.Tensor, row: int = 0, n_rows: int = 1) -> None:
        for name in names:
            self.parts.setdefault((name, row if n_rows > 1 else None), []).append(x.clone())

    def wants_prior(self, name: str, n_tok: int) -> bool:
        return False

    def see_prior(self, name: str, x: torch.Tensor, row: int, n_rows: int) -> None:
        raise NotImplementedError

    def of(self, name: str, expert: int | None) -> torch.Tensor:
        return torch.cat(self.parts[name, expert])


@dataclass
class Plain:
    """A run of a model by `Stream.advance` alone, seen by an observer.

    `routes` are the experts and gates that each routed layer chose, `hidden` the states behind
    every layer.
    """

    inputs: Inputs
    routes: list[tuple[torch.Tensor, torch.Tensor]]
    hidden: list[torch.Tensor]


def plain_run(
    weights: ArrayWeights, monkeypatch, routes: list | None = None, ids: np.ndarray = IDS
) -> Plain:
    """Run it; with `routes` of another run, through that run's experts."""
    inputs, taken, hidden = Inputs(), [], []
    route = blocks.route

    def routed(m, moe, layer, x, chosen=None):
        forced = routes[len(taken)][0] if routes is not None else None
        taken.append(route(m, moe, layer, x, forced))
        return taken[-1]

    matrices = Matrices(weights, EXACT, inputs)
    stream = Stream(matrices, read_hyper(weights.kvs, "llama.cpp"), Sequences.of(ids), RamRows)
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "route", routed)
        patched.setattr(Stream, "n_block", 1 << 20)
        stream.embed()
        for layer in range(stream.hyper.n_layers):
            stream.advance(layer)
            hidden.append(stream.hidden.read(0, ids.size))
    stream.observe_output()
    return Plain(inputs, taken, hidden)
