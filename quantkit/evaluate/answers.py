"""What models answer: all prompts of all of them in one sweep, and the letters' logits at the end.

Of the head only the letters' rows are needed: which letter is largest does not depend on the rest
of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.errors import UsageError
from quantkit.evaluate.choice import Encoded
from quantkit.evaluate.compare import Party, Progress, Traces, advanced, portions
from quantkit.forward.matrices import output_name
from quantkit.forward.stream import Sequences, Stream
from quantkit.forward.sweep import Settings, Sweep

Answers = list[npt.NDArray[np.floating[Any]]]


def answer(
    parties: Sequence[Party],
    asked: Encoded,
    settings: Settings,
    identity: str,
    progress: Progress,
) -> tuple[list[Answers], Sweep]:
    """For each party and question the logits of its letters as the next token, f32[n_choices].

    `identity` names models and settings, for resuming. Raises `UsageError` where models differ in
    vocabulary or depth, or have no such tokens.
    """
    lengths = tuple(map(len, asked.prompts))
    sequences = Sequences(np.concatenate(asked.prompts), lengths)
    last = np.cumsum(lengths) - 1
    with torch.inference_mode():
        # Answers are compared, not hidden states.
        nothing = Traces(0, parties[0].hyper.n_layers)
        streams, sweep = advanced(parties, sequences, settings, identity, nothing, progress)
        found = []
        for party, stream in zip(parties, streams, strict=True):
            logits = _logits(party, stream, last, asked.letters)
            found.append([row[:n] for row, n in zip(logits, asked.n_choices, strict=True)])
    return found, sweep


def _logits(
    party: Party, stream: Stream, places: npt.NDArray[np.int64], tokens: Sequence[int]
) -> npt.NDArray[np.float32]:
    """Logits f32[n_places, n_tokens] of some tokens."""
    m, name = stream.matrices, output_name(party.weights)
    n_vocab = party.weights.shape(name)[0]
    if max(tokens) >= n_vocab:
        raise UsageError(f"token {max(tokens)} in a vocabulary of {n_vocab}", where=party.name)
    rows = np.concatenate([party.weights.read(name, token, token + 1) for token in tokens])
    head = torch.from_numpy(rows).to(m.compute.device, m.compute.dtype)
    parts = [
        m.product(name, stream.final(torch.from_numpy(part)), head).cpu()
        for _, part in portions(places)
    ]
    logits: npt.NDArray[np.float32] = torch.cat(parts).numpy()
    return logits
