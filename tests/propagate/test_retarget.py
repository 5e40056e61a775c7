"""A weight follows its inputs as least squares says, and only where that helps elsewhere too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.propagate.moments import Moments
from quantkit.propagate.retarget import LAMBDAS, Folds, Retarget, sampled_rows

N, ROWS = 12, 9


def moments_of(x, student, residual=None, *, every: int = 4) -> Moments:
    """Of tokens f32[n_tok, n], every fourth of them held back; residual f32[n_tok, rows]."""
    moments = Moments(1, x.shape[1], 0 if residual is None else residual.shape[1])
    held = torch.arange(len(x)) % every == every - 1
    moments.add(held, x[:, None], student[:, None], residual)
    return moments


def followed(moments: Moments, w: torch.Tensor) -> tuple[torch.Tensor, Retarget]:
    sampled = sampled_rows(len(w))
    aim = Retarget(Folds(moments, 0), w[sampled], sampled)
    return aim(w, 0), aim


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed(n_tok: int, *, noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x, and inputs of the student that are a mixture of x's columns and noise."""
    x = normal(n_tok, N, seed=seed)
    mixture = torch.eye(N) + 0.2 * normal(N, N, seed=99)
    return x, x @ mixture + noise * normal(n_tok, N, seed=seed + 1)


W = normal(ROWS, N, seed=5) / 3


def least_squares(x, student, residual, w) -> np.ndarray:
    """argmin over V of |x W' + residual - student V'|^2, in float64."""
    wanted = x.double().numpy() @ w.double().numpy().T
    if residual is not None:
        wanted = wanted + residual.double().numpy()
    solution = np.linalg.lstsq(student.double().numpy(), wanted, rcond=None)[0]
    return solution.T


@pytest.mark.parametrize("writes", [False, True])
def test_with_many_tokens_and_no_ridge_it_is_the_least_squares_solution(writes, monkeypatch):
    monkeypatch.setattr("quantkit.propagate.retarget.LAMBDAS", (1e-9,))
    x, student = mixed(40_000, noise=0.05)
    residual = None
    if writes:  # what the student's inputs foretell, and some that nothing does
        residual = student @ normal(N, ROWS, seed=8) / 5 + 0.05 * normal(40_000, ROWS, seed=9)
    aim, how = followed(moments_of(x, student, residual), W)
    assert how.strengths.alpha == pytest.approx(1, abs=5e-3)
    assert how.strengths.rho == (pytest.approx(1, abs=5e-3) if writes else 0)
    expected = least_squares(x, student, residual, W)
    moved = np.linalg.norm(expected - W.numpy())
    assert moved > 0.3 * np.linalg.norm(W)
    assert np.linalg.norm(aim.numpy() - expected) < 5e-3 * moved


def test_the_share_is_what_is_saved_on_the_tokens_held_back():
    """Of the sampled rows' output there; fitted on the others alone."""
    x, student = mixed(400, noise=0.3)
    moments = moments_of(x, student)
    how = followed(moments, W)[1].strengths
    fitted = moments.fitted()
    gram = fitted.gram[0].double()
    gram += how.ridge * gram.diagonal().mean() * torch.eye(N)
    step = torch.linalg.solve(gram, (W.double() @ fitted.drift[0].double()).T).T
    v = W + how.alpha * step
    held = torch.arange(400) % 4 == 3
    x, student = x[held].double(), student[held].double()
    before = (x @ W.T.double() - student @ W.T.double()).square().sum()
    after = (x @ W.T.double() - student @ v.T).square().sum()
    scale = (student @ W.T.double()).square().sum()
    assert float((before - after) / scale) == pytest.approx(how.share, rel=1e-3)
    assert how.share > 0.05


def test_the_ridge_is_the_one_that_saves_most(monkeypatch):
    chosen = set()
    for n_tok in (16, 40, 2000):
        moments = moments_of(*mixed(n_tok, noise=0.5, seed=n_tok))
        best = followed(moments, W)[1].strengths
        alone = {}
        for ridge in LAMBDAS:
            with monkeypatch.context() as patched:
                patched.setattr("quantkit.propagate.retarget.LAMBDAS", (ridge,))
                alone[ridge] = followed(moments, W)[1].strengths.share
        assert best.share == max(alone.values()) == alone[best.ridge]
        chosen.add(best.ridge)
    assert len(chosen) > 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n_tok", [16, 60, 400])
def test_strengths_lie_between_nothing_and_all(n_tok, seed):
    x, student = mixed(n_tok, noise=0.5, seed=seed)
    residual = 2 * normal(n_tok, ROWS, seed=seed + 100) - student @ normal(N, ROWS, seed=3)
    how = followed(moments_of(x, student, residual), W)[1].strengths
    assert 0 <= how.alpha <= 1
    assert 0 <= how.rho <= 1
    assert how.share >= 0
    assert how.ridge in (0, *LAMBDAS)


def test_inputs_that_have_not_changed_leave_the_weight_exactly_as_it_was():
    x, _ = mixed(300)
    for residual in (None, torch.zeros(300, ROWS)):
        aim, how = followed(moments_of(x, x.clone(), residual), W)
        assert torch.equal(aim, W)
        assert how.strengths.share == 0


def test_noise_that_tells_nothing_of_other_tokens_is_hardly_followed():
    """x = student + noise independent of it: all of the drift that is fitted is chance."""
    shares = []
    for seed in range(20):
        student = normal(200, N, seed=seed)
        x = student + 0.3 * normal(200, N, seed=seed + 50)
        aim, how = followed(moments_of(x, student), W)
        shares.append(how.strengths.share)
        if how.strengths.share == 0:
            assert torch.equal(aim, W)
        assert (aim - W).norm() < 0.1 * W.norm()
    assert np.mean(np.array(shares) == 0) >= 0.25
    assert max(shares) < 0.01


def test_tokens_of_one_fold_alone_move_nothing():
    x, student = mixed(100)
    for held in (False, True):
        moments = Moments(1, N)
        moments.add(torch.full((100,), held), x[:, None], student[:, None])
        aim, _ = followed(moments, W)
        assert torch.equal(aim, W)


def test_few_tokens_are_followed_less():
    def mean_alpha(n_tok: int) -> float:
        strengths = []
        for seed in range(12):
            x, student = mixed(n_tok, noise=0.5, seed=1000 * seed + 7)
            strengths.append(followed(moments_of(x, student), W)[1].strengths)
        return float(np.mean([s.alpha / (1 + 5 * s.ridge) for s in strengths]))

    alphas = [mean_alpha(n) for n in (16, 64, 1024)]
    assert alphas[0] < alphas[1] < alphas[2]


def test_rows_can_be_asked_for_in_parts():
    x, student = mixed(500, noise=0.1)
    residual = student @ normal(N, ROWS, seed=8)
    aim, how = followed(moments_of(x, student, residual), W)
    parts = [how(W[begin : begin + 4], begin) for begin in range(0, ROWS, 4)]
    torch.testing.assert_close(torch.cat(parts), aim)
    assert not torch.equal(aim, W)


def test_each_matrix_has_its_own_aim():
    x, student = mixed(500)
    calm = normal(500, N, seed=77)
    moments = Moments(2, N)
    held = torch.arange(500) % 4 == 3
    moments.add(held, torch.stack((calm, x), 1), torch.stack((calm, student), 1))
    sampled = sampled_rows(ROWS)
    assert torch.equal(Retarget(Folds(moments, 0), W[sampled], sampled)(W, 0), W)
    alone, _ = followed(moments_of(x, student), W)
    torch.testing.assert_close(Retarget(Folds(moments, 1), W[sampled], sampled)(W, 0), alone)


@pytest.mark.parametrize("n_rows", [1, 2, 127, 128, 129, 5000])
def test_sampled_rows_are_distinct_spread_and_at_most_128(n_rows):
    rows = sampled_rows(n_rows).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == min(n_rows, 128)
    assert (rows[0], rows[-1]) == (0, n_rows - 1)


def test_a_dead_column_is_no_obstacle():
    """A column that is always zero makes the Gram matrix singular."""
    x, student = mixed(300)
    x[:, 3] = student[:, 3] = 0
    aim, how = followed(moments_of(x, student), W)
    assert torch.isfinite(aim).all()
    torch.testing.assert_close(aim[:, 3], W[:, 3])
    assert how.strengths.share > 0
