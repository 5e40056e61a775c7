"""Settings that people write and share, recipes and corpora: strict YAML into a pydantic model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from quantkit.errors import UsageError

_MAX_BYTES = 4 << 20

M = TypeVar("M", bound=BaseModel)


def read_settings(path: Path, what: str, error: type[UsageError] = UsageError) -> str:
    """The text of a settings file; refuses a missing one, one above 4 MiB and what is not UTF-8."""
    if not path.is_file():
        raise error(f"no such {what} file", where=str(path))
    if path.stat().st_size > _MAX_BYTES:
        raise error("larger than 4 MiB", where=str(path))
    try:
        return path.read_text("utf-8", errors="strict")
    except UnicodeDecodeError as problem:
        raise error(f"not UTF-8 at byte {problem.start}", where=str(path)) from None


def parse_settings(
    text: str, model: type[M], *, where: str, hint: str, error: type[UsageError] = UsageError
) -> M:
    """`text` as a `model`. Refuses aliases (bombs), repeated keys and what the model refuses."""
    try:
        data = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader with less
    except yaml.YAMLError as problem:
        raise error(f"not valid YAML: {problem}", where=where) from None
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        message = "; ".join(_problems(problem, model.__name__.lower()))
        raise error(message, where=where, hint=hint) from None


def _problems(error: ValidationError, whole: str) -> Iterator[str]:
    for problem in error.errors()[:8]:
        place = ".".join(str(part) for part in problem["loc"]) or whole
        if problem["type"] == "extra_forbidden":
            yield f"unknown key {place}"
        else:
            yield f"{place}: {problem['msg'].removeprefix('Value error, ')}"


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases and without silent duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"key {', '.join(sorted(twice))} is given twice")
        return super().construct_mapping(node, deep=deep)
