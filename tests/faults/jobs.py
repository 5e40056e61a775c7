"""A job small enough to be killed at every system call, and the processes that are killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.pipeline import Job, Output, convert
from quantkit.pipeline.planning import Planned
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from tests.builders.safetensors import bf16, write_checkpoint

HIDDEN, WIDTH, N_VOCAB, N_LAYERS = 32, 64, 257, 2

# What reaches the disk, as Python calls it. Of `open`, only what creates.
CALLS = ("open", "ftruncate", "pwrite", "write", "fsync", "replace", "unlink", "mkdir", "rmdir")
WRITES = ("pwrite", "write")


def write_model(folder: Path, seed: int = 1, **changes: Any) -> Path:
    """A llama of two narrow layers with a byte for a token; `changes` go into config.json."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> Any:
        return bf16(rng.standard_normal(shape) * 0.2)

    layers: dict[str, Any] = {"model.embed_tokens.weight": matrix(N_VOCAB, HIDDEN)}
    for i in range(N_LAYERS):
        at = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layers[f"{at}{norm}.weight"] = bf16(np.ones(HIDDEN))
        for part in "qkvo":
            layers[f"{at}self_attn.{part}_proj.weight"] = matrix(HIDDEN, HIDDEN)
        for part, shape in (
            ("gate", (WIDTH, HIDDEN)),
            ("up", (WIDTH, HIDDEN)),
            ("down", (HIDDEN, WIDTH)),
        ):
            layers[f"{at}mlp.{part}_proj.weight"] = matrix(*shape)
    layers["model.norm.weight"] = bf16(np.ones(HIDDEN))
    layers["lm_head.weight"] = matrix(N_VOCAB, HIDDEN)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": N_VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "eos_token_id": N_VOCAB - 1,
        **changes,
    }
    write_checkpoint(folder, {"model.safetensors": layers}, config)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


def tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE without merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    spelled = {byte: chr(byte) for byte in plain}
    spelled |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": 256, "content": "<end>", "special": True, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "added_tokens": [{**end, "single_word": False, "normalized": False}],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {char: n for n, char in enumerate(spelled[byte] for byte in range(256))},
            "merges": [],
        },
    }


@dataclass(frozen=True)
class Work:
    """A conversion that can be run again and again; two threads or more may end in any order."""

    model: Path
    recipe: str
    n_threads: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    max_shard_bytes: int | None = 12_000
    memory: int | None = None

    def run(self, folder: Path, *, restart: bool = False, force: bool = False) -> Planned:
        """To the end."""
        limits = Limits(self.max_shard_bytes)
        job = Job(self.model, self.recipe, limits, name="m", mmproj=None, **self.options)
        output = Output(folder, self.n_threads, restart, force, memory=self.memory)
        return convert(job, output, Silent())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file under a final name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.gguf")}


def leftovers(folder: Path) -> list[str]:
    """Names of everything that is neither a shard nor its manifest."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".gguf" and not _is_record(p))


def _is_record(path: Path) -> bool:
    return path.name.endswith(".manifest.json")


Hook = Callable[[int, str, tuple[Any, ...]], None]


@contextlib.contextmanager
def watched(folder: Path, before: Hook) -> Any:
    """`before(number, call, arguments)` is called ahead of everything that changes the folder."""
    real = {name: getattr(os, name) for name in CALLS}
    count = [0]

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            creates = name != "open" or (len(arguments) > 1 and arguments[1] & os.O_CREAT)
            if creates and path_of(arguments[0]).is_relative_to(folder):
                count[0] += 1
                before(count[0], name, arguments)
            return real[name](*arguments, **keywords)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def path_of(what: Any) -> Path:
    """Of a path or a descriptor."""
    return Path(os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else what)


@dataclass(frozen=True)
class Call:
    """A call that changes the disk: which, on what (of a rename, the old name), and where."""

    name: str
    path: Path
    offset: int | None = None


def calls_of(work: Work, folder: Path) -> list[Call]:
    """Everything that a conversion into a folder does to it, in order."""
    made: list[Call] = []

    def note(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        made.append(Call(name, path_of(arguments[0]), arguments[2] if name == "pwrite" else None))

    with watched(folder, note):
        work.run(folder)
    return made


def killed(work: Work, folder: Path, at: int, *, torn: bool = False, **options: bool) -> bool:
    """Convert in a process that gets SIGKILL ahead of its `at`-th call; whether it came that far.

    `torn`: half of the bytes of that call, a write, are written before.
    """
    write, pwrite, kill = os.write, os.pwrite, os.kill

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number != at:
            return
        if torn:
            half = memoryview(arguments[1]).cast("B")[: len(arguments[1]) // 2]
            (write if name == "write" else pwrite)(arguments[0], half, *arguments[2:])
        kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        with watched(folder, before):
            work.run(folder, **options)

    status = in_child(child)
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does this: 0, 1 after a traceback, or -signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads of pytest only wait
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
