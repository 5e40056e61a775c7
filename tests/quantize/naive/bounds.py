"""How close encoders of i-quants come to an exhaustive search, as checks for each type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from quantkit.quantize import Effort, Weighting, decode, encode
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.ggml import ggml_decode
from tests.quantize.naive import iq
from tests.quantize.naive.codebook import best_numbers, least_error

F64 = npt.NDArray[np.float64]
_INFINITY = 0x7C00  # as f16; what lies below is finite


def encoded(
    type_: GgmlType, effort: Effort, weighting: Weighting, seed: int = 1
) -> Iterator[tuple[bytes, F64, F64]]:
    """Blocks of normal, heavy-tailed and int4 weights with the weights and error weights."""
    q = laws.log_normal(2 * iq.SUPER)
    for make in laws.DATA.values():
        x = make(1, q.size, seed)
        blocks = encode(x, type_.name, q, effort, weighting)
        shape = (-1, iq.SUPER)
        for block, v, w in zip(
            blocks.reshape(-1, type_.block_bytes),
            x.astype(np.float64).reshape(shape),
            q.astype(np.float64).reshape(shape),
            strict=True,
        ):
            if weighting != "importance":
                root = np.sqrt(iq.FORMS[type_].c * (v**2).mean() + v**2)
                w = w * (root if weighting == "ggml" else np.sqrt(root))  # noqa: PLW2901
            yield block.tobytes(), v, w


def check_layout(type_: GgmlType) -> None:
    """Every bit belongs to one number, and the numbers decode to what the codec decodes."""
    layout = iq.LAYOUTS[type_]
    bits = [
        at for field, n in iq.counts(type_).items() for k in range(n) for at in layout[field](k)
    ]
    assert sorted(bits) == list(range(8 * type_.block_bytes))
    rng = np.random.default_rng(11)
    for _ in range(20):
        numbers = {
            field: rng.integers(0, 1 << len(layout[field](0)), n).tolist()
            for field, n in iq.counts(type_).items()
        }
        numbers["d"] = [int(rng.integers(0, _INFINITY))]
        block = iq.pack(numbers, type_)
        assert iq.unpack(block, type_) == numbers
        decoded = decode(np.frombuffer(block, np.uint8)[np.newaxis], type_.name)
        assert np.array_equal(iq.value(block, type_), decoded[0])


def check_choices(
    type_: GgmlType, effort: Effort, weighting: Weighting, *, slack: float, missed: float
) -> None:
    """At the stored scales no entries, signs and shifts do better by more than `slack` in all.

    Errors are relative to their super-block's weights; `missed` is the share of choices that are
    not the best. Blocks written with what the exhaustive search finds decode, in ggml, to the
    errors that it claims.
    """
    ours, ideal, n_missed, n = 0.0, 0.0, 0, 0
    for block, x, w in encoded(type_, effort, weighting):
        numbers = iq.unpack(block, type_)
        found, bound = best_numbers(x, w, iq.block_scales(numbers, type_), type_)
        best = np.frombuffer(iq.pack(numbers | found, type_), np.uint8)
        decoded = ggml_decode(best[np.newaxis], type_)[0]
        reached, theirs = (
            (w * (x - values) ** 2).reshape(bound.size, -1).sum(axis=1)
            for values in (iq.value(block, type_), decoded)
        )
        assert np.allclose(theirs, bound, rtol=1e-9, atol=1e-12 * bound.sum())
        whole = float((w * x**2).sum())
        assert (reached >= bound - 1e-12 * whole).all()
        ours += reached.sum() / whole
        ideal += bound.sum() / whole
        n_missed += int((reached > bound * (1 + 1e-6)).sum())
        n += bound.size
    assert ours <= ideal * (1 + slack)
    assert n_missed <= missed * n


def check_scale(type_: GgmlType, effort: Effort, weighting: Weighting) -> None:
    """With all else kept, neither neighbour of the stored f16 scale has less error."""
    for block, x, w in encoded(type_, effort, weighting):
        numbers = iq.unpack(block, type_)
        bits = numbers["d"][0]
        levels = iq.value(block, type_) / iq.f16(bits)
        lower, stored, upper = (
            float((w * (x - iq.f16(trial) * levels) ** 2).sum())
            for trial in (bits - 1, bits, bits + 1)
        )
        # The sums behind the choice are f32.
        assert stored <= min(lower, upper) * (1 + 1e-6)


def check_joint_search(type_: GgmlType, effort: Effort, *, slack: float) -> None:
    """No scales, entries, signs and shifts together do better by more than `slack`."""
    ours, ideal = 0.0, 0.0
    for block, x, w in encoded(type_, effort, "importance"):
        error = float((w * (x - iq.value(block, type_)) ** 2).sum())
        bound = least_error(x, w, iq.f16(iq.unpack(block, type_)["d"][0]), type_)
        assert error >= bound * (1 - 1e-9)
        whole = float((w * x**2).sum())
        ours += error / whole
        ideal += bound / whole
    assert ours <= ideal * (1 + slack)
