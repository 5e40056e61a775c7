"""The kernels that round with feedback as functions of tensors, like those of a torch device."""

from __future__ import annotations

import numpy as np
import torch

from quantkit.quantize.kernels import feedback as kernels

Tensor = torch.Tensor


def round_levels(
    z: Tensor, ref: Tensor, scale: Tensor, offset: Tensor, values: Tensor, couple: Tensor
) -> tuple[Tensor, Tensor]:
    """See `torch.feedback.round_levels`; all are contiguous, and z is used up."""
    places, chosen = np.empty(z.shape, np.uint8), np.empty(z.shape, np.float32)
    kernels.round_levels(
        z.numpy(),
        ref.numpy(),
        scale.numpy(),
        offset.numpy(),
        values.numpy(),
        couple.numpy(),
        places,
        chosen,
    )
    return torch.from_numpy(places), torch.from_numpy(chosen)


def round_entries(
    z: Tensor, ref: Tensor, scale: Tensor, shape: tuple[int, int, bool], levels: Tensor,
    metric: Tensor, couple: Tensor, n_scans: int, keep: bool, entries: Tensor, marks: Tensor,
) -> Tensor:  # fmt: skip
    """See `torch.feedback.round_entries`; all are contiguous."""
    chosen, found = np.empty(z.shape, np.float32), entries.numpy().astype(np.uint16)
    kernels.round_entries(
        z.numpy(),
        ref.numpy(),
        scale.numpy(),
        shape,
        np.ascontiguousarray(levels.numpy().T).ravel(),
        metric.numpy().ravel(),
        couple.numpy(),
        n_scans,
        keep,
        found,
        marks.numpy(),
        chosen,
    )
    entries.numpy()[:] = found
    return torch.from_numpy(chosen)
