"""An imatrix as a conversion uses it: values for the encoder, keys for the file, a digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quantkit.calibrate.imatrix import read_imatrix
from quantkit.calibrate.lookup import Lookup
from quantkit.container.kv import string, u32
from quantkit.errors import UsageError
from quantkit.types import Kv, TensorSpec

_MAX_KEY_CHARS = 127  # llama-quantize cuts the file's name there


@dataclass(frozen=True)
class Importance:
    """`lookup` by tensor, `kvs` as llama-quantize writes them, sha256 of the file."""

    lookup: Lookup
    kvs: dict[str, Kv]
    digest: str


def load_importance(path: Path, tensors: tuple[TensorSpec, ...]) -> Importance:
    """Open an imatrix for a model's tensors, all of it checked.

    Raises `UsageError` or `GgufError` for one of another model.
    """
    statistics = read_imatrix(path)
    statistics.check()
    lookup = Lookup(statistics, tensors)
    n_covered = len(lookup.covered())
    if not n_covered:
        raise UsageError(
            "has statistics of none of the model's tensors",
            where=str(path),
            hint="it was made of another model; make one with `quantkit calibrate`",
        )
    kvs = {
        "quantize.imatrix.file": string(path.name[:_MAX_KEY_CHARS]),
        "quantize.imatrix.entries_count": u32(n_covered),
    }
    if statistics.datasets:
        kvs["quantize.imatrix.dataset"] = string(statistics.datasets[0][:_MAX_KEY_CHARS])
    if statistics.n_chunks:
        kvs["quantize.imatrix.chunks_count"] = u32(statistics.n_chunks)
    with path.open("rb") as file:
        return Importance(lookup, kvs, hashlib.file_digest(file, "sha256").hexdigest())
