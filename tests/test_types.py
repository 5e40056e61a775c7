"""The type table against the gguf package's."""

from __future__ import annotations

import gguf
import pytest

from quantkit.types import GgmlType

UNKNOWN_TO_GGUF = {"Q2_0"}  # newer than the released package


@pytest.mark.parametrize("type_", list(GgmlType), ids=lambda t: t.name)
def test_ids_and_block_sizes_are_ggmls(type_):
    if type_.name in UNKNOWN_TO_GGUF:
        pytest.skip("not in this gguf package")
    theirs = gguf.GGMLQuantizationType[type_.name]
    assert theirs.value == type_.value
    assert gguf.GGML_QUANT_SIZES[theirs] == (type_.block_size, type_.block_bytes)
