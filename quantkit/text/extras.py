"""Libraries that converting does not need: imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from quantkit.errors import UsageError

_EXTRAS = {"datasets": "datasets"}


def require(package: str) -> Any:
    """The package of that name; `UsageError` where it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise UsageError(
            f"the package {package} is missing or broken: {error}",
            hint=f"pip install 'quantkit[{_EXTRAS.get(package, 'calibrate')}]'",
        ) from None
