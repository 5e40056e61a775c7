"""Settings that people write and share, recipes and corpora: strict YAML into a pydantic model."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from quantkit.errors import UsageError

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_NODES = 50_000  # a rule has some eight
_MAX_SAID = 200  # characters of a problem

M = TypeVar("M", bound=BaseModel)


def read_settings(path: Path, what: str, error: type[UsageError] = UsageError) -> str:
    """The text of a settings file; refuses a missing one, one above 1 MiB and what is not UTF-8."""
    if not path.is_file():
        raise error(f"no such {what} file", where=str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror}", where=str(path)) from None
    if len(raw) > _MAX_BYTES:
        raise error("larger than 1 MiB", where=str(path))
    try:
        return raw.decode()
    except UnicodeDecodeError as problem:
        raise error(f"not UTF-8 at byte {problem.start}", where=str(path)) from None


def parse_settings(
    text: str, model: type[M], *, where: str, hint: str, error: type[UsageError] = UsageError
) -> M:
    """`text` as a `model`.

    Refuses aliases (bombs), what is nested deeply or of very many parts, repeated keys, and what
    the model refuses.
    """
    try:
        _check_size(text)
        data = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader with less
    except (yaml.YAMLError, ValueError, OverflowError) as problem:  # of dates and numbers, too
        raise error(f"not valid YAML: {str(problem)[:_MAX_SAID]}", where=where) from None
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        message = "; ".join(_problems(problem, model.__name__.lower()))
        raise error(message, where=where, hint=hint) from None


def _problems(error: ValidationError, whole: str) -> Iterator[str]:
    for problem in error.errors()[:8]:
        place = ".".join(str(part) for part in problem["loc"]) or whole
        if problem["type"] == "extra_forbidden":
            yield f"unknown key {place[:_MAX_SAID]}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{place[:_MAX_SAID]}: {message[:_MAX_SAID]}"


def _check_size(text: str) -> None:
    """Refuse what composing would take long for; events come one by one."""
    depth = n_nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        n_nodes += isinstance(event, yaml.NodeEvent)
        if depth > _MAX_DEPTH or n_nodes > _MAX_NODES:
            raise yaml.YAMLError(f"more than {_MAX_DEPTH} levels or {_MAX_NODES:,} parts")


# libyaml reads ten times as fast, where PyYAML was built with it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _PlainLoader(_Loader):  # type: ignore[misc]
    """Safe YAML without silent duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for name, _ in node.value:
            key = self.construct_object(name, deep=True)
            if not isinstance(key, Hashable):
                break  # the loader itself refuses it
            if key in seen:
                raise yaml.YAMLError(f"key {key} is given twice")
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping
