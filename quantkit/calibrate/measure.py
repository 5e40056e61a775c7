"""One sweep over the calibration text: importance statistics of every matrix of a model.

Only the layer at work is in memory. What it gave is written to the work folder before the hidden
states behind it are saved, so a killed run finds the layers that it does not do again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from quantkit.calibrate.collect import Collector
from quantkit.calibrate.imatrix import read_imatrix
from quantkit.calibrate.statistics import Statistics, added
from quantkit.errors import OutputError
from quantkit.forward.hyper import Hyper
from quantkit.forward.matrices import Matrices
from quantkit.forward.stream import Sequences, Stream
from quantkit.forward.sweep import Settings, Sweep, clear_state
from quantkit.forward.weights import Weights
from quantkit.run import fs

_PARTS = "part-"  # what the names of the layers' files begin with


def measure(
    weights: Weights,
    hyper: Hyper,
    chunks: npt.NDArray[np.int32],
    settings: Settings,
    identity: str,
    progress: Callable[[float], None],
    resumed: Callable[[int], None],
) -> Statistics:
    """Statistics of `chunks` i32[n_chunks, n_ctx], each a sequence of its own.

    They are read from the work folder when they are asked for: the caller calls `clear` once the
    result is safe. `identity` names the model and its text; a state of the same identity in the
    work folder is taken up, with the same result as if nothing had happened, and `resumed` told
    the number of layers that it holds. `progress` is told parts of the whole, up to 1.
    """
    digest = _digest(identity, chunks, settings)
    parts = [_part(settings.work, digest, layer) for layer in range(hyper.n_layers + 1)]
    collector = Collector()
    with torch.inference_mode():
        matrices = Matrices(weights, settings.compute, collector)
        rows = settings.rows_for(hyper, chunks.size, 1)
        stream = Stream(matrices, hyper, Sequences.of(chunks), rows)
        sweep = Sweep([stream], collector, settings.work, digest)
        first = sweep.start()
        if first:
            _require(parts[:first])
            resumed(first)
        progress(first / hyper.n_layers)
        fs.make_folder(settings.work)
        sweep.run(
            first,
            lambda layer: collector.save(parts[layer]),
            lambda part: progress(part / hyper.n_layers),
        )
        stream.observe_output()
        collector.save(parts[-1])
    read = [read_imatrix(part) for part in parts]
    return Statistics(
        chunk_size=chunks.shape[1],
        n_tokens=chunks.size,
        sums=added([part.sums for part in read]),
        priors=added([part.priors for part in read]),
    )


def clear(work: Path) -> None:
    """Remove what measuring leaves in its work folder, whatever run it was of."""
    clear_state(work)
    for part in work.glob(f"{_PARTS}*.gguf*"):
        fs.remove(part)
    fs.remove_folder(work)


def _part(work: Path, digest: str, layer: int) -> Path:
    """The digest in its name keeps a layer apart from those of a run with other settings."""
    return work / f"{_PARTS}{digest[:16]}-{layer:05}.gguf"


def _require(parts: list[Path]) -> None:
    for part in parts:
        if not part.is_file():
            raise OutputError(
                "the saved work lacks this file",
                where=str(part),
                hint=f"remove the folder {part.parent} to start over",
            )


def _digest(identity: str, chunks: npt.NDArray[np.int32], settings: Settings) -> str:
    said = f"{identity} {chunks.shape} {settings.compute}".encode()
    return hashlib.sha256(said + np.ascontiguousarray(chunks).tobytes()).hexdigest()
