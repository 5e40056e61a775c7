"""Rounding with feedback: what block LDLQ, coordinate descent and refitted scales promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch

from quantkit.errors import NonFiniteError, UsageError
from quantkit.quantize import _on_host, layout
from quantkit.quantize import feedback as module
from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.feedback import Feedback, Metric, encode_with_feedback, supports
from quantkit.quantize.torch import feedback as on_device
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.ggml import ggml_valid

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

TYPES = sorted((*layout.LEVELS, *layout.BOOKS), key=lambda t: t.name)
# One of every kind: affine, by a scale alone, by a table, and every kind of codebook.
FEW = ("Q2_K", "Q4_0", "IQ4_XS", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S")
HOW = How("default", "importance", 0.0)
FIRST, SECOND = Feedback(n_passes=0), Feedback(n_passes=1)
CODES_ONLY = Feedback(n_passes=1, ridge=1e30)  # such a ridge holds every scale where it is


def over(types: list[GgmlType]) -> pytest.MarkDecorator:
    """A law for each of these types, for those beyond `FEW` among the slow tests."""
    marked = [pytest.param(t, marks=[pytest.mark.slow] * (t.name not in FEW)) for t in types]
    return pytest.mark.parametrize("type_", marked, ids=[t.name for t in types])


every_type, every_book = over(TYPES), over([t for t in TYPES if t in layout.BOOKS])
every_scalar = over([t for t in TYPES if t in layout.LEVELS])

numba_and_torch = pytest.mark.parametrize("chooser", [_on_host, on_device], ids=["numba", "torch"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def autoregressive(n: int, seed: int = 1) -> torch.Tensor:
    """Neighbours correlate by 0.9; columns of very different size."""
    at = np.arange(n)
    size = np.exp(0.5 * np.random.default_rng(seed).standard_normal(n))
    return torch.from_numpy((0.9 ** abs(at[:, None] - at) * np.outer(size, size)).astype("f4"))


def low_rank(n: int, seed: int = 2) -> torch.Tensor:
    """An eighth of the directions carries nearly everything."""
    x = np.random.default_rng(seed).standard_normal((n // 8, n))
    return torch.from_numpy((x.T @ x / (n // 8) + 0.05 * np.eye(n)).astype("f4"))


def white(n: int) -> torch.Tensor:
    return torch.eye(n)


def scattered(n: int, seed: int = 3) -> torch.Tensor:
    """Uncorrelated columns of very different size."""
    return torch.diag(
        torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal(n)))
    ).float()


GRAMS = {"autoregressive": autoregressive, "low rank": low_rank}


@cache
def metric_of(gram: Callable[[int], torch.Tensor], n: int = 512, damping: float = 0.01) -> Metric:
    """What tests share, with its factors."""
    return Metric(gram(n), damping)


def cost(x: F32, decoded: F32, metric: Metric) -> F64:
    """(x - x^) H (x - x^)' of every row."""
    lost = x.astype(np.float64) - decoded
    return np.asarray(((lost @ metric.gram.double().numpy()) * lost).sum(1))


def rounded(type_: GgmlType, x: F32, metric: Metric, feedback: Feedback = SECOND) -> F32:
    """What x becomes."""
    codec = codec_of(type_)
    return codec.decode(encode_with_feedback(codec, x, metric, HOW, feedback))


def nearest(type_: GgmlType, x: F32, metric: Metric) -> F32:
    codec = codec_of(type_)
    return codec.decode(codec.encode(x, metric.importance, HOW))


def textbook_aims(x: F32, chosen: F32, gram: torch.Tensor) -> F64:
    """What GPTQ (arXiv 2210.17323) aims at column by column, from H^-1 = U'U and choices."""
    u = np.linalg.cholesky(np.linalg.inv(gram.double().numpy())).T
    w = x.astype(np.float64)
    for k in range(x.shape[1] - 1):
        w[:, k + 1 :] -= np.outer((w[:, k] - chosen[:, k]) / u[k, k], u[k, k + 1 :])
    return w


def test_every_type_with_codes_or_entries_can_be_rounded_with_feedback():
    assert all(supports(type_) for type_ in TYPES)
    assert not any(supports(type_) for type_ in (GgmlType.F32, GgmlType.F16, GgmlType.BF16))


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_blocks_are_valid_and_decode_to_what_was_chosen_and_beat_nearest_rounding(type_):
    """Above all that signs of even parity, of which blocks hold seven of eight, are chosen so."""
    codec, x, metric = codec_of(type_), laws.student(3, 512), metric_of(low_rank)
    before = cost(x, nearest(type_, x, metric), metric).sum()
    rounder = module._Rounder(codec, metric, HOW, SECOND)
    target = torch.from_numpy(x)
    blocks, chosen = rounder._first_pass(target)
    for _ in range(2):
        np.testing.assert_allclose(codec.decode(blocks.reshape(3, -1)), chosen, rtol=1e-6)
        assert ggml_valid(blocks.reshape(3, -1), type_)
        assert cost(x, chosen.numpy(), metric).sum() <= before
        rounder._descend(target, blocks, chosen)


@every_scalar
@numba_and_torch
def test_codes_are_those_of_the_textbook_given_scales_and_the_codes_before(
    type_, chooser, monkeypatch
):
    monkeypatch.setattr(module, "_kernels_of", lambda device: chooser)
    x, metric = laws.gauss(8, 512), metric_of(autoregressive)
    codec = codec_of(type_)
    blocks = encode_with_feedback(codec, x, metric, HOW, FIRST)
    levels, ours = layout.LEVELS[type_], codec.decode(blocks)
    scale, offset = (
        np.repeat(a, levels.sub, 1)[:, :, None] for a in layout.scales_of(type_, blocks)
    )
    aim = textbook_aims(x, ours, metric.gram)
    least = abs(scale * levels.values.astype(np.float64) + offset - aim[:, :, None]).min(2)
    step = abs(scale[:, :, 0]) * np.ptp(levels.values)
    assert ((abs(ours - aim) - least) <= 1e-5 * step + 1e-9).all()


@every_type
@pytest.mark.parametrize("gram", GRAMS)
def test_feedback_beats_nearest_rounding_on_correlated_inputs(type_, gram):
    x, metric = laws.student(4, 512), metric_of(GRAMS[gram])
    with_feedback = cost(x, rounded(type_, x, metric, FIRST), metric).sum()
    assert with_feedback <= cost(x, nearest(type_, x, metric), metric).sum()


@every_type
@pytest.mark.parametrize("gram", [white, scattered])
def test_without_correlation_nothing_is_lost(type_, gram):
    x, metric = laws.gauss(4, 512), metric_of(gram)
    before = cost(x, nearest(type_, x, metric), metric)
    for feedback in (FIRST, SECOND):
        assert (cost(x, rounded(type_, x, metric, feedback), metric) <= before * 1.002).all()


@every_type
@pytest.mark.parametrize("gram", GRAMS)
def test_going_over_the_codes_once_more_never_raises_the_error(type_, gram):
    x, metric = laws.student(4, 512), metric_of(GRAMS[gram])
    first = cost(x, rounded(type_, x, metric, FIRST), metric)
    second = cost(x, rounded(type_, x, metric, CODES_ONLY), metric)
    assert (second <= first * (1 + 1e-5)).all()
    assert second.sum() < first.sum()


@every_type
@pytest.mark.parametrize("gram", GRAMS)
def test_every_pass_with_new_scales_lowers_the_error_or_leaves_it(type_, gram):
    x, metric = laws.student(4, 512), metric_of(GRAMS[gram])
    costs = [cost(x, rounded(type_, x, metric, Feedback(k)), metric) for k in range(3)]
    for before, after in pairwise(costs):
        assert (after <= before * (1 + 1e-4)).all()
    assert costs[1].sum() < costs[0].sum()


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("gram", GRAMS)
def test_the_factors_give_the_gram_matrix_back(group, gram):
    metric = metric_of(GRAMS[gram], 96)
    upper, d = metric.factor(group)
    assert torch.equal(upper, upper.triu())
    for k in range(0, 96, group):
        block = upper[k : k + group, k : k + group]
        torch.testing.assert_close(block, torch.eye(group), atol=1e-6, rtol=0)
    h, r = metric.gram.double().numpy(), upper.double().numpy()
    inverse = np.linalg.inv(r)
    blocks = (inverse @ h @ inverse.T).reshape(96 // group, group, 96 // group, group)
    for i in range(96 // group):
        for j in range(96 // group):
            if i != j:
                assert abs(blocks[i, :, j]).max() < 1e-4 * h.max()
        own = blocks[i, :, i]
        np.testing.assert_allclose(d[i], own / own.diagonal().mean(), atol=1e-4)


def test_a_gram_matrix_is_factored_once_for_groups_of_every_size(monkeypatch):
    metric = Metric(autoregressive(64), 0.01)
    metric.factor(8)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    metric.factor(1)
    metric.factor(8)


@every_type
def test_neither_chunks_nor_threads_show_in_the_bytes(type_, monkeypatch):
    codec, x, metric = codec_of(type_), laws.student(17, 512), metric_of(autoregressive)
    whole = encode_with_feedback(codec, x, metric, HOW, SECOND)
    parts = [encode_with_feedback(codec, x[k : k + 5], metric, HOW, SECOND) for k in (0, 5)]
    np.testing.assert_array_equal(whole[:10], np.concatenate(parts))
    monkeypatch.setattr(module, "ROWS", 7)
    np.testing.assert_array_equal(
        whole, encode_with_feedback(codec, np.asfortranarray(x), metric, HOW, SECOND, n_threads=2)
    )


@every_type
def test_torch_rounds_as_the_kernels_do_up_to_ties(type_, monkeypatch):
    codec, x, metric = codec_of(type_), laws.student(20, 512), metric_of(autoregressive)
    theirs = encode_with_feedback(codec, x, metric, HOW, SECOND)
    monkeypatch.setattr(module, "_kernels_of", lambda device: on_device)
    ours = encode_with_feedback(codec, x, metric, HOW, SECOND)
    same = (ours == theirs).all(1)  # a tie changes what the rest of its row aims at
    assert same.mean() >= 0.9
    costs = [cost(x, codec.decode(blocks), metric).sum() for blocks in (ours, theirs)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-6 if same.all() else 0.02)


def dead(n: int) -> torch.Tensor:
    """Channels that are always zero, a super-block of them among others."""
    alive = torch.from_numpy(np.random.default_rng(4).random(n) < 0.5).float()
    alive[: n // 2] = 0
    return autoregressive(n) * torch.outer(alive, alive)


HARD_GRAMS = {
    "dead channels": dead,
    "one direction": lambda n: torch.ones(n, n),
    "nothing": lambda n: torch.zeros(n, n),
    "faint": lambda n: autoregressive(n) * 1e-30,
    "huge": lambda n: autoregressive(n) * 1e30,
    "an outlier": lambda n: autoregressive(n) + 1e6 * torch.diag((torch.arange(n) == 5).float()),
}


def check_hostile_rows(type_: GgmlType, metric: Metric) -> None:
    codec, rows = codec_of(type_), laws.hostile_rows(512)
    blocks = encode_with_feedback(codec, np.stack(list(rows.values())), metric, HOW, SECOND)
    assert ggml_valid(blocks, type_)
    decoded = codec.decode(blocks)
    bad = [name for name, row in zip(rows, decoded, strict=True) if not np.isfinite(row).all()]
    assert not bad
    assert not decoded[:2].any()


@every_type
@pytest.mark.parametrize("gram", HARD_GRAMS)
def test_hostile_weights_and_inputs_give_valid_finite_blocks(type_, gram):
    check_hostile_rows(type_, metric_of(HARD_GRAMS[gram]))


@every_type
def test_hostile_weights_give_valid_finite_blocks_on_a_device(type_, monkeypatch):
    monkeypatch.setattr(module, "_kernels_of", lambda device: on_device)
    check_hostile_rows(type_, metric_of(HARD_GRAMS["an outlier"]))


@every_type
def test_dead_channels_cost_the_others_nothing(type_):
    """Whatever is done to columns without input, the rest is rounded as well as before."""
    x, metric = laws.gauss(4, 512), metric_of(dead, damping=1e-6)
    assert (
        cost(x, rounded(type_, x, metric), metric).sum()
        <= cost(x, nearest(type_, x, metric), metric).sum()
    )


@pytest.mark.parametrize("n", [32, 64, 96, 128, 320])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"])
def test_rows_need_not_fill_a_super_block(name, n):
    x, metric = laws.gauss(4, n), metric_of(autoregressive, n)
    costs = [cost(x, rounded(GgmlType[name], x, metric, f), metric).sum() for f in (FIRST, SECOND)]
    before = cost(x, nearest(GgmlType[name], x, metric), metric).sum()
    assert costs[1] <= costs[0] * (1 + 1e-5)
    assert costs[1] < before


def test_no_rows_give_no_blocks():
    codec = codec_of(GgmlType.Q4_K)
    x = np.empty((0, 256), np.float32)
    assert encode_with_feedback(codec, x, Metric(white(256), 0.01), HOW, SECOND).shape == (0, 144)


@pytest.mark.parametrize(
    "gram",
    [torch.ones(64, 64), torch.diag(torch.linspace(-1, 1, 64)), -torch.eye(64)],
    ids=["one direction", "indefinite", "negative"],
)
def test_a_gram_matrix_that_stays_singular_is_refused(gram):
    with pytest.raises(UsageError, match="not positive definite"):
        Metric(gram, 0.0).factor(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(value):
    gram = torch.eye(64)
    gram[3, 4] = value
    with pytest.raises(NonFiniteError, match="Gram"):
        Metric(gram, 0.01)


@pytest.mark.parametrize("shape", [(64, 32), (64,), (0, 0)])
def test_a_gram_matrix_that_is_not_square_is_refused(shape):
    with pytest.raises(UsageError, match="square"):
        Metric(torch.ones(shape), 0.01)


def test_a_metric_of_other_columns_is_refused():
    with pytest.raises(UsageError, match="512 columns"):
        rounded(GgmlType.Q4_K, laws.gauss(2, 512), Metric(white(256), 0.01))


def test_a_type_without_codes_is_refused():
    with pytest.raises(UsageError, match="BF16"):
        rounded(GgmlType.BF16, laws.gauss(2, 256), Metric(white(256), 0.01))


def signs_of(type_: GgmlType) -> F64:
    """All signs that eight weights may have, f64[patterns, 8]."""
    minus = (np.arange(256)[:, None] >> np.arange(8)) & 1
    if layout.BOOKS[type_].signs == "even":
        minus = minus[minus.sum(1) % 2 == 0]
    return 1.0 - 2.0 * minus


def least_cost(type_: GgmlType, u: F64, weight: F64, shifts: list[float]) -> float:
    """Least sum of weight (u - value)^2 over everything that eight weights can be coded as."""
    book = layout.BOOKS[type_]
    levels = book.levels.astype(np.float64)
    if book.signs == "none":
        each = [((u - levels - s) ** 2 * weight).sum(1).min() for s in shifts]
        return float(min(each))
    v, total = u * signs_of(type_), 0.0
    for k in range(0, 8, book.places):
        part = slice(k, k + book.places)
        cost_PE = (v[:, None, part] - levels) ** 2 @ weight[part]
        total = total + cost_PE.min(1)
    return float(np.min(total))


class Groups:
    """A row of groups of eight under a metric that `round_entries` is asked to code."""

    def __init__(self, type_: GgmlType, n: int, metric: F32, seed: int = 5) -> None:
        rng = np.random.default_rng(seed)
        self.type, self.n, self.metric = type_, n, metric
        self.book = layout.BOOKS[type_]
        spread = float(np.sqrt(np.square(self.book.levels).mean()))
        self.z = (rng.standard_normal((1, n)) * spread).astype(np.float32)
        self.scale = np.ones((1, n // self.book.sub), np.float32)
        self.marks = np.zeros((1, n // 8), np.uint8)
        if self.book.shifts == "per-block":
            self.marks[:] = np.repeat(rng.integers(0, 2, (1, n // 32), np.uint8), 4, 1)
        self.entries = np.zeros((1, n // self.book.places), np.int32)

    def code(self, n_scans: int, chooser: ModuleType) -> F64:
        """Values chosen, f64[groups, 8]."""
        shape = self.book.places, module._SIGNS[self.book.signs], self.book.shifts == "per-group"
        z, scale, marks, entries, levels = (
            torch.tensor(a)
            for a in (self.z, self.scale, self.marks, self.entries, self.book.levels)
        )
        couple = torch.zeros(self.n, self.n)
        chosen = chooser.round_entries(
            z.clone(), z, scale, shape, levels, torch.from_numpy(self.metric), couple, n_scans,
            False, entries, marks,
        )  # fmt: skip
        return np.asarray(chosen.double().view(-1, 8))

    def shifts(self, group: int) -> list[float]:
        """Shifts that a group may have."""
        if self.book.shifts == "per-group":
            return [0.125, -0.125]
        return [-0.125 if self.marks[0, group] else 0.125]


@every_book
@numba_and_torch
def test_under_a_diagonal_metric_the_best_of_all_codes_is_found(type_, chooser):
    n_groups = 16
    weight = np.exp(np.random.default_rng(6).standard_normal((n_groups, 8))).astype(np.float32)
    metric = np.stack([np.diag(w) for w in weight])
    groups = Groups(type_, 8 * n_groups, metric)
    u, chosen = groups.z.astype(np.float64).reshape(-1, 8), groups.code(1, chooser)
    for group in range(n_groups):
        w = weight[group].astype(np.float64)
        ours = float(((u[group] - chosen[group]) ** 2 * w).sum())
        assert ours <= least_cost(type_, u[group], w, groups.shifts(group)) * (1 + 1e-5) + 1e-6


@every_book
@numba_and_torch
def test_further_scans_lower_the_cost_within_groups(type_, chooser):
    """Groups whose places correlate: a second look pays, and comes near the best."""
    n_groups = 32
    x = np.random.default_rng(7).standard_normal((n_groups, 16, 8))
    x += x.mean(2, keepdims=True)
    metric = np.asarray(x.transpose(0, 2, 1) @ x / 16, np.float32)
    groups = Groups(type_, 8 * n_groups, metric)
    costs = []
    for n_scans in (1, 2, 4):
        lost = groups.z.astype(np.float64).reshape(-1, 8) - groups.code(n_scans, chooser)
        costs.append(np.einsum("gi,gij,gj->g", lost, metric.astype(np.float64), lost).sum())
    assert costs[2] <= costs[1] <= costs[0]


@numba_and_torch
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_aims_that_are_not_finite_get_codes_all_the_same(chooser, value):
    """Kernels do not check indices, so no float may lead to one that is out of range."""
    z, couple = torch.full((2, 8), value), torch.zeros(8, 8)
    ones, zeros = torch.ones(2, 1), torch.zeros(2, 1)
    for values in ([0.0, 1.0, 2.0, 3.0], [-1.0, 0.0, 3.0]):
        codes, chosen = chooser.round_levels(
            z.clone(), z, ones, zeros, torch.tensor(values), couple
        )
        assert (codes < len(values)).all()
        assert torch.isfinite(chosen).all()
