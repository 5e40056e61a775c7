"""What a family has to tell, and the strict readers that families use to find it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeVar

from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import GgmlType, Kv, Slab, SlabOp, TensorSpec, Weight, WeightFormat

_T = TypeVar("_T", int, float, str, bool)

# A count in config.json beyond this is an attack or a typo; nothing real comes near it.
_MAX_COUNT = 1 << 31
_MAX_F32 = 3.4028234e38

# What works for a model that no family here describes.
OTHER_WAY = (
    "if llama.cpp's own converter takes the model, give quantkit the F16, BF16 or F32 GGUF that it "
    "makes"
)

# Checkpoints of one family are published under several prefixes; families see none of them.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")


class SideFiles(Protocol):
    """The small files beside the weights; each call gives None where there is no such file."""

    def read_json(self, name: str) -> Any:
        """A parsed JSON file."""

    def read_text(self, name: str, max_bytes: int) -> str | None:
        """A UTF-8 text."""

    def read_bytes(self, name: str, max_bytes: int) -> bytes | None:
        """Raw bytes."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What somebody who runs the file has to know: llama.cpp flags and the reason for each."""

    flag: str
    reason: str


@dataclass(frozen=True)
class Model:
    """A checkpoint in GGUF terms, before any type is chosen. `ignored` maps weight -> reason."""

    arch: str
    tensors: tuple[TensorSpec, ...]
    kvs: dict[str, Kv]
    advice: tuple[Advice, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)


class Family(Protocol):
    """One row of the table of families: the class names in config.json, and the description."""

    @property
    def title(self) -> str:
        """What people call the models."""

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """Class names as in config.json."""

    def describe(self, config: Config, weights: WeightMap) -> Model:
        """Every GGUF tensor and every architecture KV, from metadata alone."""


class Config:
    """config.json with `text_config` laid over the root, read by key, type and bounds."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        text = raw.get("text_config")
        self.raw = raw
        self.text: dict[str, Any] = {**raw, **text} if isinstance(text, dict) else dict(raw)

    def over(self, defaults: Mapping[str, Any]) -> Config:
        """This config with `defaults` for what it does not say."""
        config = Config(self.raw)
        config.text = {**defaults, **{k: v for k, v in self.text.items() if v is not None}}
        return config

    def count(self, key: str, default: int | None = None) -> int:
        """A non-negative integer; `default` where the key is absent or null."""
        value = self._get(key, int, default)
        if not 0 <= value < _MAX_COUNT:
            raise SourceError(f"{key} = {value} is out of range", where="config.json")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float that an f32 can hold."""
        return float(self._get(key, float, default))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A boolean."""
        return self._get(key, bool, default)

    def string(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self._get(key, str, default)

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.text.get(key) is not None

    def section(self, key: str) -> Config | None:
        """A nested object, or None."""
        value = self.text.get(key)
        return Config(value) if isinstance(value, dict) else None

    def _get(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self.text.get(key)
        if value is None:
            if default is None:
                raise SourceError(f"{key} is missing", where="config.json")
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and is_number:
            if not abs(value) <= _MAX_F32:
                raise SourceError(f"{key} = {value!r:.60} is out of range", where="config.json")
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise SourceError(
                f"{key} should be {kind.__name__}, not {value!r:.60}", where="config.json"
            )
        return value


class WeightMap:
    """The checkpoint's weights under canonical names; every one has to be taken or ignored."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights: dict[str, Weight] = {}
        for name, weight in weights.items():
            canonical = canonical_name(name)
            if canonical in self._weights:
                raise SourceError(
                    f"two tensors mean {canonical}: {self._weights[canonical].name} and {name}",
                    where=weight.data.file,
                )
            self._weights[canonical] = weight
        self._left = dict.fromkeys(self._weights)
        self.ignored: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def take(self, name: str, *shape: int) -> Weight:
        """The weight of that name, which must have that shape."""
        weight = self._weights.get(name)
        if weight is None:
            raise SourceError(
                f"tensor {name} is missing",
                where="checkpoint",
                hint="the checkpoint is incomplete, or config.json belongs to another model",
            )
        if weight.shape != shape:
            raise SourceError(
                f"tensor {weight.name} has shape {list(weight.shape)}, "
                f"config.json says {list(shape)}",
                where=weight.data.file,
            )
        self._left.pop(name, None)
        return weight

    def format(self, name: str) -> WeightFormat | None:
        """How a weight is stored, or None where there is none of that name."""
        weight = self._weights.get(name)
        return weight.format if weight else None

    def ignore(self, name: str, reason: str) -> None:
        """Say that a weight is left out on purpose."""
        if name in self._left:
            del self._left[name]
            self.ignored[name] = reason

    def names(self) -> Iterator[str]:
        """Canonical names of all weights."""
        return iter(self._weights)

    def refuse_leftovers(self, family: str) -> None:
        """Raise `UnsupportedError` if any weight was neither taken nor ignored."""
        if self._left:
            some = ", ".join(list(self._left)[:5])
            raise UnsupportedError(
                f"{len(self._left)} tensors have no place in a {family} model: {some}",
                where="checkpoint",
                hint="a converted file would silently lack them, so nothing is converted",
            )


def refuse(message: str) -> NoReturn:
    """Raise `UnsupportedError` for a config that llama.cpp would run as something else."""
    raise UnsupportedError(message, where="config.json", hint=OTHER_WAY)


def canonical_name(name: str) -> str:
    """The family's own name of a tensor, without the wrapper's prefix.

    Text tensors come out as `layers.N...`, `embed_tokens.weight`, `norm.weight`,
    `lm_head.weight`; vision and projector tensors keep theirs.
    """
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def whole(weight: Weight, op: SlabOp = SlabOp.COPY) -> tuple[Slab, ...]:
    """The one slab of a tensor that is all of a weight."""
    n_rows = weight.shape[0] if len(weight.shape) == 1 else weight.n_rows
    return (Slab(weight, 0, n_rows, op),)


def matrix(name: str, role: str, layer: int | None, weight: Weight) -> TensorSpec:
    """A matrix that keeps its rows and may take any type."""
    return TensorSpec(name, role, layer, weight.shape, whole(weight))


def norm(name: str, layer: int | None, weight: Weight) -> TensorSpec:
    """A norm weight: always F32."""
    return TensorSpec(name, "norm", layer, weight.shape, whole(weight), keep=GgmlType.F32)


def protected(name: str, role: str, layer: int | None, weight: Weight) -> TensorSpec:
    """A bias or router, small and touchy: always F32."""
    return TensorSpec(name, role, layer, weight.shape, whole(weight), keep=GgmlType.F32)


def stack(name: str, role: str, layer: int, experts: list[Weight]) -> TensorSpec:
    """Routed experts as one 3-D tensor in order of expert id."""
    slabs = tuple(Slab(weight, 0, weight.n_rows) for weight in experts)
    return TensorSpec(name, role, layer, (len(experts), *experts[0].shape), slabs)


def ends(config: Config, weights: WeightMap) -> tuple[TensorSpec, list[TensorSpec]]:
    """The token embedding, and what follows the last layer: norm and, unless tied, the head."""
    vocab, hidden = config.count("vocab_size"), config.count("hidden_size")
    table = weights.take("embed_tokens.weight", vocab, hidden)
    last = [norm("output_norm.weight", None, weights.take("norm.weight", hidden))]
    if config.flag("tie_word_embeddings", False):
        weights.ignore("lm_head.weight", "tied to the token embedding")
    else:
        head = weights.take("lm_head.weight", vocab, hidden)
        last.append(matrix("output.weight", "output", None, head))
    return matrix("token_embd.weight", "token_embd", None, table), last


def swiglu_shapes(width: int, hidden: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Names and shapes of a SwiGLU MLP's three matrices."""
    return ("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))


def swiglu(
    weights: WeightMap,
    hf: str,
    blk: str,
    role: str,
    layer: int,
    size: tuple[int, int],
    suffix: str = "",
) -> list[TensorSpec]:
    """A SwiGLU MLP of `size` = (width, hidden): `ffn_gate`, `ffn_up` and `ffn_down`."""
    return [
        matrix(
            f"{blk}ffn_{part}{suffix}.weight",
            f"{role}.{part}",
            layer,
            weights.take(f"{hf}{part}_proj.weight", *shape),
        )
        for part, shape in swiglu_shapes(*size)
    ]
