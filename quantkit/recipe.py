"""Recipes: which type every tensor gets, as a file that people read, edit and share.

A recipe is data: rules in order, the first that matches a tensor decides. Shipped recipes lie in
`quantkit/recipes/`, one commented YAML each; a path to one's own works as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from quantkit.errors import RecipeError
from quantkit.types import GgmlType, TensorSpec

_MAX_BYTES = 4 << 20
# A pattern gets this long for one name of at most 63 bytes; an honest one takes microseconds.
_PATTERN_SECONDS = 0.05


def _type(value: object) -> GgmlType:
    if isinstance(value, GgmlType):
        return value
    name = str(value).upper()
    if name not in GgmlType.__members__:
        raise ValueError(f"unknown type {value!r}")
    return GgmlType[name]


TypeName = Annotated[GgmlType, BeforeValidator(_type)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(_Strict):
    """One line of a recipe: every condition given has to hold.

    `role` is a glob over roles (`routed_expert.*`), `layers` a list of numbers and ranges
    (`0-3,7`; `-1` counts from the end), `tensor` a regular expression searched for in the GGUF
    tensor name, as in llama-quantize's `--tensor-type`.
    """

    role: str | None = None
    layers: str | None = None
    tensor: str | None = None
    type: TypeName

    @field_validator("tensor")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @field_validator("layers", mode="before")
    @classmethod
    def _parses(cls, text: object) -> object:
        if isinstance(text, int) and not isinstance(text, bool):
            text = str(text)
        if isinstance(text, str):
            _layer_set(text, 1)
        return text

    def matches(self, tensor: TensorSpec, n_layers: int) -> bool:
        """Whether the rule speaks of this tensor."""
        if self.role is not None and not fnmatchcase(tensor.role, self.role):
            return False
        if self.layers is not None and tensor.layer not in _layer_set(self.layers, n_layers):
            return False
        if self.tensor is None:
            return True
        try:
            return bool(regex.search(self.tensor, tensor.name, timeout=_PATTERN_SECONDS))
        except TimeoutError:
            raise RecipeError(
                f"pattern {self.tensor!r} takes too long on {tensor.name}",
                hint="avoid nested repetitions such as (a+)+",
            ) from None


class Sampling(_Strict):
    """Sampling defaults written as `general.sampling.*`; llama.cpp uses them if not told others.

    `instant` holds what differs when thinking is off: advice only, a file has one set of defaults.
    """

    temp: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    penalty_repeat: float | None = Field(None, gt=0)
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


class Recipe(_Strict):
    """The whole file. `default` is the type of every tensor that no rule names."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    default: TypeName
    rules: tuple[Rule, ...] = ()
    effort: Literal["fast", "default", "best"] = "default"
    sampling: Sampling = Sampling()

    def type_of(self, tensor: TensorSpec, n_layers: int) -> GgmlType:
        """The type the recipe asks for; whether the shape allows it is the plan's matter."""
        for rule in self.rules:
            if rule.matches(tensor, n_layers):
                return rule.type
        return self.default

    def types(self) -> frozenset[GgmlType]:
        """Every type the recipe may ask for."""
        return frozenset({self.default, *(rule.type for rule in self.rules)})

    def canonical(self) -> dict[str, Any]:
        """Plain data, the same for recipes that mean the same; prose is left out."""
        data = self.model_dump(exclude={"description"})
        data["default"] = self.default.name
        for rule, dumped in zip(self.rules, data["rules"], strict=True):
            dumped["type"] = rule.type.name
        return data

    def digest(self) -> str:
        """sha256 of the canonical form."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name, or one from a file. Raises `RecipeError`."""
    path = Path(name_or_path)
    shipped = resources.files("quantkit") / "recipes" / f"{name_or_path.lower()}.yaml"
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RecipeError("no such recipe file", where=str(path))
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError("larger than 4 MiB", where=str(path))
        return parse_recipe(path.read_text("utf-8", errors="strict"), where=str(path))
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
    try:
        data = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader with less
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=where) from None
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("; ".join(_problems(error)), where=where, hint=_SCHEMA_HINT) from None


_SCHEMA_HINT = "docs/recipes.md lists every key"


def _problems(error: ValidationError) -> Iterable[str]:
    for problem in error.errors()[:8]:
        place = ".".join(str(part) for part in problem["loc"]) or "recipe"
        if problem["type"] == "extra_forbidden":
            yield f"unknown key {place}"
        else:
            yield f"{place}: {problem['msg'].removeprefix('Value error, ')}"


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases (no bombs) and without silent duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"key {', '.join(sorted(twice))} is given twice")
        return super().construct_mapping(node, deep=deep)


def _layer_set(text: str, n_layers: int) -> frozenset[int]:
    chosen: set[int] = set()
    for part in text.split(","):
        found = regex.fullmatch(r"\s*(-?\d{1,6})(?:\s*-\s*(-?\d{1,6}))?\s*", part)
        if not found:
            raise ValueError(f"layers should look like 0-3,7 or -1, not {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        low, high = (n + n_layers if n < 0 else n for n in (first, last))
        chosen.update(range(low, min(high, 1 << 16) + 1))
    return frozenset(chosen)
