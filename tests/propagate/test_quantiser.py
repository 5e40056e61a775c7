"""Matrices in, blocks out: the same in the student and in the file, better than nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.propagate import quantiser as module
from quantkit.propagate.moments import Moments
from quantkit.propagate.quantiser import FeedbackQuantiser, Rounding
from quantkit.propagate.student import StudentWeights
from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.feedback import Feedback, Metric
from quantkit.types import GgmlType
from tests.forward.support import ArrayWeights
from tests.propagate.support import untouched

N, ROWS, N_EXPERTS = 64, 48, 4
TYPE = GgmlType.Q4_0
MODEL = ArrayWeights(
    {}, {"experts": np.random.default_rng(1).standard_normal((N_EXPERTS, ROWS, N), np.float32)}
)


class Setup:
    """A quantiser of `MODEL`, its student, and what went into the file."""

    def __init__(self, **options) -> None:
        self.student = StudentWeights(MODEL, untouched)
        self.sunk: dict[tuple[str, int], np.ndarray] = {}
        self.quantiser = FeedbackQuantiser(
            MODEL,
            self.student,
            {"experts": TYPE},
            codec_of,
            Rounding(How(), Feedback(), **options),
            lambda name, matrix, blocks: self.sunk.__setitem__((name, matrix), blocks),
        )

    def take(self, matrix: int, moments: Moments, at: int = 0) -> np.ndarray:
        self.quantiser.take("experts", matrix, moments, at)
        return codec_of(TYPE).decode(self.sunk["experts", matrix])


def inputs(n_tok: int, seed: int = 0) -> torch.Tensor:
    """Inputs of a few strong directions, f32[n_tok, N]."""
    make = torch.Generator().manual_seed(seed)
    mixing = torch.randn(N, N, generator=make) * torch.logspace(0, -2, N)[:, None]
    return torch.randn(n_tok, N, generator=make) @ mixing


def moments_of(x: torch.Tensor, student: torch.Tensor | None = None) -> Moments:
    moments = Moments(1, N)
    held = torch.arange(len(x)) % 4 == 3
    moments.add(held, x[:, None], (x if student is None else student)[:, None])
    return moments


def output_error(w: np.ndarray, matrix: int, x: torch.Tensor) -> float:
    error = torch.from_numpy(w - MODEL.arrays["experts"][matrix])
    return float((x @ error.T).square().sum())


def nearest(matrix: int) -> np.ndarray:
    codec = codec_of(TYPE)
    return codec.decode(codec.encode(MODEL.arrays["experts"][matrix], None, How()))


def test_the_student_reads_what_the_file_holds():
    setup = Setup()
    for matrix in (2, 0):
        w = setup.take(matrix, moments_of(inputs(2000)))
        rows = setup.student.read("experts", matrix * ROWS, (matrix + 1) * ROWS)
        np.testing.assert_array_equal(rows, w)
    assert list(setup.sunk) == [("experts", 2), ("experts", 0)]
    setup.quantiser.forget("experts", 2)
    exact = MODEL.arrays["experts"][2]
    np.testing.assert_array_equal(setup.student.read("experts", 2 * ROWS, 3 * ROWS), exact)


def test_outputs_are_nearer_than_with_nearest_on_other_tokens_too():
    x = inputs(3000)
    w = Setup().take(1, moments_of(x[:2000]))
    for seen in (x[:2000], x[2000:]):
        assert output_error(w, 1, seen) < 0.5 * output_error(nearest(1), 1, seen)


@pytest.mark.parametrize("n_tok", [0, 1, 2, 5, 40])
def test_few_tokens_or_none_are_no_worse_than_nearest(n_tok):
    """On tokens of the same kind that were not seen."""
    w = Setup().take(1, moments_of(inputs(3000)[:n_tok]))
    x = inputs(3000)[1000:]
    assert output_error(w, 1, x) < 1.15 * output_error(nearest(1), 1, x)
    plain = np.square(nearest(1) - MODEL.arrays["experts"][1]).sum()
    if n_tok == 0:
        assert np.square(w - MODEL.arrays["experts"][1]).sum() < 1.1 * plain


def test_fewer_tokens_are_damped_more(monkeypatch):
    """In the metric and in the importance that scales are searched with."""
    raised = []

    class Seen(Metric):
        def __init__(self, gram, damping) -> None:
            super().__init__(gram, damping)
            mean = moments.all().gram[0].diagonal().mean() / moments.all().n_tokens
            smallest = (self.importance.min(), self.gram.diagonal().min())
            raised.append([float(part / mean) for part in smallest])

    monkeypatch.setattr(module, "Metric", Seen)
    for n_tok in (4, 40, 20 * N, 100 * N):
        moments = moments_of(inputs(n_tok))
        Setup().take(0, moments)
    smallest = float(inputs(100 * N).square().mean(0).min() / inputs(100 * N).square().mean())
    assert raised[0][0] > raised[1][0] > smallest + 0.2
    assert raised[2][0] == pytest.approx(smallest, rel=0.1)
    assert raised[0][1] > raised[1][1] > raised[2][1] == pytest.approx(raised[3][1], rel=0.1)


def test_a_weight_follows_its_inputs_unless_told_not_to():
    x = inputs(4000)
    make = torch.Generator().manual_seed(9)
    student = x @ (torch.eye(N) + 0.05 * torch.randn(N, N, generator=make))
    moments = moments_of(x, student)
    wanted = x @ torch.from_numpy(MODEL.arrays["experts"][0]).T

    def error(w: np.ndarray) -> float:
        return float((wanted - student @ torch.from_numpy(w).T).square().sum())

    following, staying = Setup(), Setup(retargets=False)
    assert error(following.take(0, moments)) < 0.3 * error(staying.take(0, moments))
    assert following.quantiser.strengths["experts", 0, 0].alpha > 0.9
    assert not staying.quantiser.strengths


@pytest.mark.parametrize("at_once", [N, 7 * N, ROWS * N // 2])
def test_rows_treated_in_parts_give_the_same_bytes(at_once, monkeypatch):
    x = inputs(2000)
    moments = moments_of(x, x * 1.1)
    whole = Setup()
    whole.take(3, moments)
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    cut = Setup()
    cut.take(3, moments)
    np.testing.assert_array_equal(whole.sunk["experts", 3], cut.sunk["experts", 3])


def test_threads_do_not_show_in_the_bytes():
    moments = moments_of(inputs(2000), inputs(2000) * 1.1)
    one, two = Setup(), Setup(n_threads=2)
    one.take(0, moments)
    two.take(0, moments)
    np.testing.assert_array_equal(one.sunk["experts", 0], two.sunk["experts", 0])


def test_what_experts_share_is_factored_once(monkeypatch):
    """Also when each has inputs of its own in between, as down projections have."""
    made = []

    class Counted(Metric):
        def __init__(self, gram, damping) -> None:
            made.append(damping)
            super().__init__(gram, damping)

    monkeypatch.setattr(module, "Metric", Counted)
    shared, setup = moments_of(inputs(2000)), Setup()
    for expert in range(N_EXPERTS):
        setup.take(expert, shared)
        setup.take(expert, moments_of(inputs(500, seed=expert)))
    assert len(made) == 1 + N_EXPERTS
    assert len(setup.quantiser._metrics._made) == 1, "what is not in use any more is dropped"


def test_each_head_is_rounded_by_inputs_of_its_own():
    x = torch.stack([inputs(2000, seed=k) for k in range(N_EXPERTS)], 1)
    moments = Moments(N_EXPERTS, N)
    moments.add(torch.arange(2000) % 4 == 3, x, x)
    setup = Setup()
    for head in range(N_EXPERTS):
        together = setup.take(head, moments, head)
        alone = Setup().take(head, moments_of(x[:, head]))
        assert output_error(together, head, x[:, head]) == pytest.approx(
            output_error(alone, head, x[:, head]), rel=0.05
        )
        assert output_error(together, head, x[:, head]) < 0.6 * output_error(
            nearest(head), head, x[:, head]
        )
