"""A model to run, whatever it is stored as: a checkpoint's folder or a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.arch.base import Config
from quantkit.arch.general import describe_name, general_kvs
from quantkit.arch.registry import describe_text
from quantkit.calibrate.statistics import N_CTX
from quantkit.container.names import escaped, shown
from quantkit.container.shardset import ShardSet, open_shards
from quantkit.errors import UsageError
from quantkit.forward.hyper import Constants, Hyper, read_hyper
from quantkit.forward.matrices import Activations, Compute
from quantkit.forward.sweep import Settings
from quantkit.forward.weights import CheckpointWeights, GgufWeights, Weights
from quantkit.hub.folder import HubFile
from quantkit.hub.session import Place
from quantkit.quantize.torch.devices import device_of
from quantkit.source.checkpoint import open_checkpoint
from quantkit.text.chat import ChatTemplate, read_chat_template
from quantkit.text.corpus import load_corpus
from quantkit.text.tokenizer import Tokenizer, open_tokenizer
from quantkit.text.tokens import TokenSet, load_tokens, tokenise
from quantkit.types import Kvs

MODEL = "model"
_KINDS = {"imatrix": "an imatrix", "mmproj": "a vision tower (mmproj)", "adapter": "an adapter"}


@dataclass(frozen=True)
class Running:
    """How models are run. `memory` bounds the hidden states that are kept in memory, bytes."""

    device: str = "auto"
    dtype: str = "f32"
    activations: Activations = "llama.cpp"
    constants: Constants = "llama.cpp"
    memory: int = 2 << 30

    def compute(self) -> Compute:
        """Raises `UsageError` for a device that is not there."""
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        return Compute(_device(self.device), dtype, self.activations)

    def settings(self, work: Path) -> Settings:
        """For a sweep that keeps its state in `work`."""
        return Settings(self.compute(), self.memory, work)


@dataclass(frozen=True)
class Opened:
    """A model ready to run; `tokenizer` is None for a GGUF file, whose text comes as tokens.

    `identity` names weights and constants. `bos` is what stands first in every chunk, if anything.
    """

    name: str
    weights: Weights
    hyper: Hyper
    identity: str
    bos: int | None
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    shards: ShardSet | None = None


@dataclass(frozen=True)
class Reading:
    """What text to run: a corpus (a name, YAML, text or JSONL file), or a saved token set.

    `budget` is the most tokens to take; `parse_special` overrules the corpus.
    """

    corpus: str
    budget: int | None = None
    n_ctx: int = N_CTX
    parse_special: bool | None = None


@contextmanager
def opened(path: Place, constants: Constants) -> Iterator[Opened]:
    """Open a checkpoint's folder or a GGUF file for running; raises what opening raises."""
    if isinstance(path, HubFile) or (isinstance(path, Path) and path.suffix == ".gguf"):
        with opened_gguf(path, constants) as file:
            yield file
        return
    with open_checkpoint(path) as checkpoint:
        config = Config(checkpoint.config)
        model = describe_text(config, checkpoint.weights, checkpoint, with_vocab=False)
        weights = CheckpointWeights(checkpoint, model)
        general = general_kvs(
            model.arch, "model", checkpoint.root, checkpoint, model.tensors, 0, {}
        )
        tokenizer = open_tokenizer(checkpoint, checkpoint.config)
        yield Opened(
            describe_name(general, checkpoint.root.resolve().name),
            weights,
            read_hyper(weights.kvs, constants),
            f"{checkpoint.fingerprint()} {constants}",
            tokenizer.bos if tokenizer.add_bos else None,
            tokenizer,
            read_chat_template(checkpoint),
        )


@contextmanager
def opened_gguf(path: Path | HubFile, constants: Constants) -> Iterator[Opened]:
    """Open a GGUF file, or the shard set that it belongs to; `UsageError` if it is no model."""
    shards = open_shards(path)
    if (kind := kind_of(shards)) != MODEL:
        raise UsageError(
            f"is {_KINDS.get(kind, f'a file of type {shown(kind)!r}')}, not a model",
            where=escaped(str(path)),
        )
    weights = GgufWeights(shards)
    stamps = [(file.path.name, *file.stamp()) for file in shards.files]
    place = path.resolve() if isinstance(path, Path) else path
    identity = hashlib.sha256(repr((str(place), stamps, constants)).encode()).hexdigest()
    try:
        hyper = read_hyper(weights.kvs, constants)
        yield Opened(path.name, weights, hyper, identity, _bos(weights.kvs), None, None, shards)
    finally:
        weights.close()


def kind_of(shards: ShardSet) -> str:
    """What a GGUF file holds, by `general.type`; files without one are models."""
    kv = shards.kvs.get("general.type")
    return str(kv.value) if kv else MODEL


def read_tokens(model: Opened, reading: Reading) -> TokenSet:
    """The text as tokens of the model. Tokens of another tokenizer are a `UsageError`."""
    if reading.corpus.endswith(".safetensors"):
        if reading.budget is not None:
            raise UsageError("saved tokens are taken whole, without a budget", where=reading.corpus)
        tokens = load_tokens(Path(reading.corpus))
        if model.tokenizer and model.tokenizer.digest != tokens.tokenizer:
            raise UsageError(
                f"was made with another tokenizer than {model.name}'s",
                where=reading.corpus,
                hint="give the text itself, or tokens that `calibrate` saved for this model",
            )
        return tokens
    if model.tokenizer is None:
        raise UsageError(
            "a GGUF file is run here without its tokenizer",
            where=model.name,
            hint="name the checkpoint's folder instead, or give the tokens that `calibrate` saved",
        )
    return tokenise(
        load_corpus(reading.corpus),
        model.tokenizer,
        template=model.template,
        budget=reading.budget,
        parse_special=reading.parse_special,
    )


def _bos(kvs: Kvs) -> int | None:
    adds = kvs.get("tokenizer.ggml.add_bos_token")
    token = kvs.get("tokenizer.ggml.bos_token_id")
    return int(token.value) if adds and adds.value is True and token else None


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return device_of(name)
