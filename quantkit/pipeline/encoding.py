"""What encodes a plan's tensors, and what that will read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from quantkit.quantize.codec import Codec, codec_of
from quantkit.types import GgmlType, Plan, Weight


def codecs(plan: Plan, device: str) -> Callable[[GgmlType], Codec]:
    """numba's codecs, or torch's on another device, which is tried before anything is written."""
    if device == "cpu":
        return codec_of
    from quantkit.quantize.torch import torch_codec  # noqa: PLC0415 - brings torch

    found = {type_: torch_codec(type_, device) for type_ in {t.type for t in plan.tensors}}
    return lambda type_: found.get(type_) or codec_of(type_)


def in_order(plan: Plan, keys: Iterable[tuple[int, int]]) -> Iterator[Weight]:
    """Weights in the order in which making the tiles `keys`, (tensor, tile), will read them."""
    last: Weight | None = None
    for number, tile in keys:
        tensor = plan.tensors[number]
        if tensor.spec.slabs and (weight := tensor.spec.slabs[tensor.tile(tile)[0]].weight) != last:
            last = weight
            yield weight
