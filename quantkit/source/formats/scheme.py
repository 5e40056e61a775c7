"""What config.json says of how weights are quantised.

What is stored decides whether a weight is quantised, so lists of modules that are not
(`ignore`, `modules_to_not_convert`) need not be read; the scheme says what the bits mean.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from quantkit.errors import SourceError, UnsupportedError
from quantkit.source.formats.stored import FLOATS, REMEDY, Tensors, where

METHODS = (
    "compressed-tensors",
    "fp8",
    "fbgemm_fp8",
    "modelopt",
    "mxfp4",
    "gptq",
    "awq",
    "auto-round",
    "bitsandbytes",
)
# The ways of storing that compressed-tensors knows and this package reads.
_CT_FORMATS = (
    None,
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_PATTERN_SECONDS = 60.0  # for all modules together; patterns of real checkpoints take below one
WHERE = "config.json: quantization_config"


class Scheme:
    """`quantization_config`, from the top level or from inside text_config; often there is none."""

    def __init__(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        self.declared = _quantization_config(config)
        self._example = _example(tensors)
        method = self.declared.get("quant_method")
        # AutoRound stores what other methods read, and says which.
        if method == "auto-round":
            packing = str(self.declared.get("packing_format"))[:80]
            method = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(packing)
            if method is None:
                raise self.fault(f"is stored by auto-round with packing_format {packing!r}")
        if tensors and method is not None and method not in METHODS:
            raise self.fault(f"is stored with quant_method {str(method)[:80]!r}")
        self.method = method
        self._seconds = _PATTERN_SECONDS
        self._groups = self._config_groups() if method == "compressed-tensors" else {}
        groups = self._groups.values()
        linear = [group for group in groups if "Linear" in _targets(group)]
        self._by_class = linear or [group for group in groups if _names_classes(group)]

    def arguments(self, module: str) -> dict[str, Any] | None:
        """What compressed-tensors says of a module's weights; None if it says nothing.

        One group holds for all. Of several, the first with the module's name among its targets,
        then one with a pattern that matches, then the only one for Linear or other classes.
        """
        if len(self._groups) <= 1:
            return next(iter(self._groups.values()), {}).get("weights")
        for wanted in (False, True):
            for group in self._groups.values():
                if any(self._matches(t, module, pattern=wanted) for t in _targets(group)):
                    return _weights(group)
        return _weights(self._by_class[0]) if len(self._by_class) == 1 else None

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the scheme itself."""
        return self.declared.get(key, default)

    def fault(self, reason: str) -> UnsupportedError:
        """The error for a scheme that is not known, by the name of a tensor that it is about."""
        return UnsupportedError(reason, where=self._example, hint=REMEDY)

    def _matches(self, target: str, module: str, *, pattern: bool) -> bool:
        if target.startswith("re:") is not pattern:
            return False
        if not pattern:
            return target == module
        import regex  # noqa: PLC0415 - only checkpoints of several schemes need it

        begin = time.monotonic()
        try:
            found = regex.match(target[3:], module, timeout=self._seconds)
        except (TimeoutError, regex.error) as error:
            reason = "takes too long" if isinstance(error, TimeoutError) else f"is wrong: {error}"
            raise SourceError(f"the target {target[:80]!r} {reason}", where=WHERE) from None
        self._seconds = max(self._seconds - (time.monotonic() - begin), 1e-3)
        return found is not None

    def _config_groups(self) -> dict[str, dict[str, Any]]:
        if (self.get("transform_config") or {}) not in ({}, {"config_groups": {}}):
            raise self.fault("was transformed (transform_config) before it was quantised")
        if self.get("sparsity_config") not in (None, {}) and _is_sparse(self.declared):
            raise self.fault("is stored sparse (sparsity_config)")
        groups = self.get("config_groups") or {}
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
            raise SourceError("config_groups must be an object of objects", where=WHERE)
        for name in (self.get("format"), *(g.get("format") for g in groups.values())):
            if name not in _CT_FORMATS:
                raise self.fault(f"is stored in compressed-tensors' format {str(name)[:80]!r}")
        for group in groups.values():
            if not isinstance(group.get("weights") or {}, dict):
                raise SourceError("a config group's weights must be an object", where=WHERE)
        return groups


def _quantization_config(config: Mapping[str, Any]) -> dict[str, Any]:
    text_config = config.get("text_config")
    levels = (config, text_config if isinstance(text_config, dict) else {})
    for level in levels:
        scheme = level.get("quantization_config")
        if isinstance(scheme, dict):
            return scheme
        if scheme is not None:
            raise SourceError(f"must be an object, got {type(scheme).__name__}", where=WHERE)
    return {}


def _example(tensors: Tensors) -> str:
    refs = tensors.values()
    found = next((ref for ref in refs if ref.dtype not in FLOATS), next(iter(refs), None))
    return where(found) if found else WHERE


def _is_sparse(declared: Mapping[str, Any]) -> bool:
    sparsity = declared["sparsity_config"]
    return not isinstance(sparsity, dict) or sparsity.get("format") not in (None, "dense")


def _weights(group: Mapping[str, Any]) -> dict[str, Any] | None:
    weights = group.get("weights")
    return weights if isinstance(weights, dict) else None


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []


def _names_classes(group: Mapping[str, Any]) -> bool:
    """Whether targets are classes, which modules are not called like."""
    return any(target[:1].isupper() for target in _targets(group))
