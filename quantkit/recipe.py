"""Recipes: which type every tensor gets, as a file that people read, edit and share.

A recipe is data: rules in order, the first that matches a tensor decides. Shipped recipes lie in
`quantkit/recipes/`, one commented YAML each; a path to one's own works as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
)

from quantkit.errors import RecipeError
from quantkit.run.settings import parse_settings, read_settings
from quantkit.types import GgmlType, TensorSpec, WeightFormat

# A pattern gets this long for one name of at most 63 bytes; an honest one takes microseconds.
_PATTERN_SECONDS = 0.05
_PATTERN_CHARS = 1000

# llama.cpp's `enum llama_ftype`, without `LLAMA_FTYPE_MOSTLY_`: the numbers of general.file_type.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22,
    "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29,
    "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "NVFP4": 39,
    "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip


def _type(value: object) -> GgmlType:
    if isinstance(value, GgmlType):
        return value
    name = str(value).upper()
    if name not in GgmlType.__members__:
        raise ValueError(f"unknown type {value!r}")
    return GgmlType[name]


def _file_type(value: object) -> str:
    name = str(value).upper()
    if name not in FILE_TYPES:
        raise ValueError(f"unknown file type {value!r}")
    return name


def _text(value: object) -> object:
    """YAML reads `8` as a number; the keys below are text that may look like one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


TypeName = Annotated[GgmlType, BeforeValidator(_type), PlainSerializer(lambda t: t.name)]
FileType = Annotated[str, BeforeValidator(_file_type)]
SourceFormat = Annotated[WeightFormat, PlainSerializer(lambda f: f.value)]
Count = Annotated[str, BeforeValidator(_text), Field(pattern=r"^[0-9]{1,6}\+?$")]
Portion = Annotated[str, BeforeValidator(_text), Field(pattern=r"^[0-9]{1,6}(/[1-9][0-9]{0,5})?$")]


def _gqa(shapes: Mapping[str, tuple[int, ...]]) -> int:
    q, k = shapes.get("attention.q"), shapes.get("attention.k")
    if q and k:
        return q[0] // k[0]
    qkv, out = shapes.get("attention.qkv"), shapes.get("attention.output")
    n_kv = qkv[0] - out[-1] if qkv and out else 0  # rows of K and V together
    return 2 * out[-1] // n_kv if out and n_kv > 0 else 0


@dataclass(frozen=True, slots=True)
class _Facts:
    """What rules may ask of a whole model, read off its tensors.

    `gqa` is the number of query heads per key head, 0 where that is not a matter of attention.k
    (MLA). `tied` says that the token embedding is the head as well.
    """

    n_layers: int
    n_experts: int
    gqa: int
    tied: bool

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> _Facts:
        shapes: dict[str, tuple[int, ...]] = {}
        n_layers = 0
        for tensor in tensors:
            n_layers = max(n_layers, 0 if tensor.layer is None else tensor.layer + 1)
            if len(tensor.shape) > 1:
                shapes.setdefault(tensor.role, tensor.shape)
        experts = shapes.get("routed_expert.down")
        return cls(
            n_layers,
            n_experts=experts[0] if experts else 0,
            gqa=_gqa(shapes),
            tied="output" not in shapes,
        )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(_Strict):
    """One line of a recipe: every condition given has to hold.

    `role` is a glob over roles (`routed_expert.*`), `layers` a list of numbers and ranges
    (`0-3,7`; `-1` counts from the end; `0-1/8` is the first eighth), `tensor` a regular expression
    searched for in the GGUF tensor name, as in llama-quantize's `--tensor-type`.

    `source` is how the checkpoint stores all of the tensor (`int4-g32`). `experts`, `gqa` and
    `n_layers` ask for a number of the model, `8` or `4+`. `first` stops the rule after so many
    tensors. `otherwise` replaces `type` where rows do not divide into blocks.
    """

    role: str | None = None
    layers: Annotated[str, BeforeValidator(_text)] | None = None
    tensor: str | None = None
    source: SourceFormat | None = None
    experts: Count | None = None
    gqa: Count | None = None
    n_layers: Count | None = None
    first: Portion | None = None
    type: TypeName
    otherwise: TypeName | None = None

    @field_validator("tensor")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            if len(pattern) > _PATTERN_CHARS:
                raise ValueError(f"a pattern of more than {_PATTERN_CHARS} characters")
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @field_validator("layers")
    @classmethod
    def _parses(cls, text: str | None) -> str | None:
        if text is not None:
            _layer_set(text, 1)
        return text


class _Bound:
    """A rule at work on one model; counts the tensors that it has decided."""

    def __init__(self, rule: Rule, facts: _Facts) -> None:
        self._rule = rule
        self._tied = facts.tied
        self._layers = _layer_set(rule.layers, facts.n_layers) if rule.layers else None
        self._left = _portion(rule.first, facts.n_layers) if rule.first else None
        self._off = not (
            _holds(rule.experts, facts.n_experts)
            and _holds(rule.gqa, facts.gqa)
            and _holds(rule.n_layers, facts.n_layers)
        )

    def decide(self, tensor: TensorSpec) -> GgmlType | None:
        """The type, if the rule speaks of this tensor."""
        if self._off or self._left == 0 or not self._matches(tensor):
            return None
        if self._left is not None:
            self._left -= 1
        rule = self._rule
        misfit = tensor.grid[1] % rule.type.block_size != 0
        return rule.otherwise if misfit and rule.otherwise is not None else rule.type

    def _matches(self, tensor: TensorSpec) -> bool:
        rule = self._rule
        if rule.role is not None and not any(
            fnmatchcase(role, rule.role) for role in self._roles(tensor)
        ):
            return False
        if self._layers is not None and tensor.layer not in self._layers:
            return False
        if rule.source is not None and _formats(tensor) != {rule.source}:
            return False
        if rule.tensor is None:
            return True
        try:
            return bool(regex.search(rule.tensor, tensor.name, timeout=_PATTERN_SECONDS))
        except TimeoutError:
            raise RecipeError(
                f"pattern {rule.tensor!r} takes too long on {tensor.name}",
                hint="avoid nested repetitions such as (a+)+",
            ) from None

    def _roles(self, tensor: TensorSpec) -> tuple[str, ...]:
        if self._tied and tensor.role == "token_embd":
            return "token_embd", "output"
        return (tensor.role, "attention.v") if tensor.role in _WITH_V else (tensor.role,)


# Matrices that hold V among others follow what rules say of it, as in llama-quantize.
_WITH_V = frozenset({"attention.qkv", "attention.kv_b"})


def _formats(tensor: TensorSpec) -> set[WeightFormat]:
    return {slab.weight.format for slab in tensor.slabs}


class Sampling(_Strict):
    """Sampling defaults written as `general.sampling.*`; llama.cpp uses them if not told others.

    `instant` holds what differs when thinking is off: advice only, a file has one set of defaults.
    """

    temp: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    penalty_repeat: float | None = Field(None, gt=0, allow_inf_nan=False)
    instant: dict[Literal["temp", "top_k", "top_p", "min_p", "penalty_repeat"], float] = Field(
        default_factory=dict
    )

    def values(self) -> dict[str, float]:
        """The values that go into the file."""
        return {
            key: value
            for key, value in self.model_dump(exclude={"instant"}).items()
            if value is not None
        }


class FeedbackOptions(_Strict):
    """How far rounding with feedback goes.

    `passes` go over all codes again after the first; `retarget` lets weights follow what their
    inputs become as the layers before them are rounded.
    """

    passes: int = Field(1, ge=0, le=8)
    retarget: bool = True


class Recipe(_Strict):
    """The whole file. `default` is the type of every tensor that no rule names.

    `file_type` is the preset that the file declares as `general.file_type`. `predicted_kld` is what
    `quantkit allocate` expects of it, in nats per token; it is no part of what the recipe means.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    file_type: FileType | None = None
    default: TypeName
    rules: tuple[Rule, ...] = ()
    effort: Literal["fast", "default", "best"] = "default"
    weighting: Literal["importance", "ggml", "blend"] = "blend"
    gain: float = Field(0.75, ge=0, le=1)
    rounding: Literal["nearest", "feedback"] = "nearest"
    feedback: FeedbackOptions = FeedbackOptions()
    sampling: Sampling = Sampling()
    predicted_kld: float | None = Field(None, ge=0, allow_inf_nan=False)

    def assign(self, tensors: Sequence[TensorSpec]) -> dict[str, GgmlType]:
        """The type that the recipe asks for, by name, of every tensor that a recipe may change.

        `tensors` are all of a model: rules may ask for the number of its layers or experts.
        Whether a shape allows a type is the plan's matter.
        """
        facts = _Facts.of(tensors)
        rules = [_Bound(rule, facts) for rule in self.rules]
        free = [tensor for tensor in tensors if tensor.keep is None]
        types = {}
        for tensor in sorted(free, key=lambda t: (-1 if t.layer is None else t.layer, t.name)):
            decisions = (rule.decide(tensor) for rule in rules)
            types[tensor.name] = next((t for t in decisions if t is not None), self.default)
        return types

    def types(self) -> frozenset[GgmlType]:
        """Every type the recipe may ask for."""
        asked = {self.default}
        for rule in self.rules:
            asked |= {rule.type, rule.type if rule.otherwise is None else rule.otherwise}
        return frozenset(asked)

    def canonical(self) -> dict[str, Any]:
        """Plain data, the same for recipes that mean the same; prose is left out."""
        return self.model_dump(exclude={"description"}, exclude_none=True)

    def digest(self) -> str:
        """sha256 of the canonical form, less the prediction."""
        data = {k: v for k, v in self.canonical().items() if k != "predicted_kld"}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name, or one from a file. Raises `RecipeError`."""
    path = Path(name_or_path)
    shipped = resources.files("quantkit") / "recipes" / f"{name_or_path.lower()}.yaml"
    if path.suffix in {".yaml", ".yml"}:
        return parse_recipe(read_settings(path, "recipe", RecipeError), where=str(path))
    if "/" in name_or_path or "\\" in name_or_path or not shipped.is_file():
        raise RecipeError(
            f"no recipe is called {name_or_path!r}",
            hint=f"shipped are: {', '.join(shipped_names())}; or give a path ending in .yaml",
        )
    return parse_recipe(shipped.read_text("utf-8"), where=f"recipe {name_or_path}")


def shipped_names() -> list[str]:
    """Names of the recipes that come with quantkit."""
    folder = resources.files("quantkit") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def parse_recipe(text: str, *, where: str) -> Recipe:
    """Parse and check a recipe's text."""
    return parse_settings(text, Recipe, where=where, hint=_SCHEMA_HINT, error=RecipeError)


_SCHEMA_HINT = "docs/recipes.md lists every key"


_END = r"(-?\d{1,6}|\d{1,6}/[1-9]\d{0,5})"
_RANGE = regex.compile(rf"{_END}(?:\s*-\s*{_END})?")


def _layer_set(text: str, n_layers: int) -> frozenset[int]:
    """Layers of a list such as `0-3,7`, `-1`, `1/8-7/8` or `more-bits`.

    A range up to a fraction of the depth stops before the layer that begins there.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if part.strip() == "more-bits":
            chosen |= _more_bits(n_layers)
        elif found and (found[2] or "/" not in found[1]):
            first, last = found[1], found[2] or found[1]
            low, high = (_place(end, n_layers) for end in (first, last))
            chosen.update(range(max(low, 0), min(high + ("/" not in last), n_layers)))
        else:
            raise ValueError(
                f"layers should look like 0-3,7 or -1 or 0-1/8 or more-bits, not {text!r}"
            )
    return frozenset(chosen)


def _more_bits(n_layers: int) -> set[int]:
    """First and last eighth and every third layer between, llama.cpp's `use_more_bits`."""
    early, late = n_layers // 8, 7 * n_layers // 8
    return {i for i in range(n_layers) if i < early or i >= late or (i - early) % 3 == 2}


def _place(end: str, n_layers: int) -> int:
    place = _portion(end, n_layers)
    return place + n_layers if place < 0 else place


def _portion(text: str, whole: int) -> int:
    """A number, or a fraction of `whole`, rounded down."""
    number, _, divisor = text.partition("/")
    return int(number) * whole // int(divisor) if divisor else int(number)


def _holds(condition: str | None, value: int) -> bool:
    if condition is None:
        return True
    wanted = int(condition.rstrip("+"))
    return value >= wanted if condition.endswith("+") else value == wanted
