"""What was measured of a model: output errors by tensor and type, and what errors do to KL.

With t^2 the relative error of a tensor's outputs, a tensor costs alpha t^2 by itself, and costs add
up (the linearity theorem of HIGGS, arXiv 2411.17525, with errors of outputs in place of weights).
What all tensors do together was measured too, and turns the sum into a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, inf, log
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import UsageError
from quantkit.run.json_size import parsed_bytes
from quantkit.types import GgmlType, TensorSpec

_MAX_BYTES = 8 << 20
_MAX_PARSED_BYTES = 16 << 20
_STEEPEST = 2.0  # growth of KL with t^2, as a power; measured ones beyond are noise
_FLATTEST = 0.5

Value = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Point = tuple[Value, Value]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasuredGroup(_Strict):
    """Tensors that were disturbed together, with t^2 `error` on average, and the KL in nats."""

    name: str
    tensors: tuple[str, ...] = Field(min_length=1)
    error: Value
    kld: Value


class Sensitivity(_Strict):
    """All of it. `digest` names model, text and settings; `errors` hold t^2 by tensor and type.

    `joint` are pairs of a sum of groups' KL and the KL of all these groups disturbed at once.
    """

    digest: str
    text: str
    errors: dict[str, dict[str, Value]]
    groups: tuple[MeasuredGroup, ...]
    joint: tuple[Point, ...]

    def costs(self) -> Costs:
        """What types cost."""
        return Costs(self)

    def predicted(self, cost: float) -> float:
        """KL of a whole model in nats whose groups cost so much in sum."""
        return _read_off(_rising(self.joint), cost)

    def save_as(self) -> bytes:
        """JSON."""
        return self.model_dump_json(indent=1).encode() + b"\n"


class Costs:
    """Expected KL of a tensor in a type, in nats, by itself."""

    def __init__(self, sensitivity: Sensitivity) -> None:
        self._errors = sensitivity.errors
        self._alphas = {
            tensor: group.kld / max(group.error, 1e-30) / len(group.tensors)
            for group in sensitivity.groups
            for tensor in group.tensors
        }

    def __call__(self, spec: TensorSpec, type_: GgmlType) -> float:
        """Infinite for a type that was not measured."""
        error = self._errors.get(spec.name, {}).get(type_.name)
        if error is None or spec.name not in self._alphas:
            return 0.0 if type_.block_size == 1 else inf
        return self._alphas[spec.name] * error

    def total(self, specs: Sequence[TensorSpec], types: Mapping[str, GgmlType]) -> float:
        """The sum over a whole model."""
        return sum(self(spec, types[spec.name]) for spec in specs if spec.keep is None)


def load_sensitivity(path: Path) -> Sensitivity:
    """Read what `save_as` gave; raises `UsageError`."""
    if path.stat().st_size > _MAX_BYTES:
        raise UsageError("is too large to be sensitivities", where=str(path))
    raw = path.read_bytes()
    if parsed_bytes(raw) > _MAX_PARSED_BYTES:
        raise UsageError("takes too much memory, unlike any sensitivities", where=str(path))
    try:
        return Sensitivity.model_validate_json(raw)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"holds no sensitivities: {place}: {first['msg']}",
            where=str(path),
            hint="remove it, and they are measured again",
        ) from None


def _rising(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Logarithms of points by x, each as far above the one before as a plausible power has it."""
    found: list[tuple[float, float]] = []
    for x, y in sorted((log(x), log(y)) for x, y in points if x > 0 and y > 0):
        if found:
            by, base = x - found[-1][0], found[-1][1]
            if by <= 0:
                continue
            found.append((x, min(max(y, base + _FLATTEST * by), base + _STEEPEST * by)))
        else:
            found.append((x, y))
    return found


def _read_off(points: list[tuple[float, float]], x: float) -> float:
    """A power law through neighbouring points; below the first one, y grows with x."""
    if x <= 0 or not points:
        return max(x, 0.0)
    at = log(x)
    if at <= points[0][0] or len(points) == 1:
        return exp(points[0][1] + at - points[0][0])
    k = next((i for i in range(1, len(points)) if at <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[k - 1], points[k]
    return exp(y1 + (y1 - y0) / (x1 - x0) * (at - x1))
