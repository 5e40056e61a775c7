"""`quantkit allocate` on the fixture: exact sizes, recipes that plan as promised, one measuring."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.allocate.choices import parse_floor
from quantkit.allocate.measured import MeasuredGroup, Sensitivity
from quantkit.cli import cli
from quantkit.errors import UsageError
from quantkit.pipeline import allocation
from quantkit.pipeline.allocation import Goal, Question, allocate, parse_types
from quantkit.pipeline.curve import draw
from quantkit.pipeline.opening import Reading, Running
from quantkit.pipeline.planning import Job, planned
from quantkit.plan.build import can_repack
from quantkit.recipe import load_recipe
from quantkit.run.events import Silent
from quantkit.types import GgmlType

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
TARGET = 7_400_000


def made_up(question, plan, model, tokens, said, path, reporter):
    """Errors that quarter with each bit, of tensors that matter more or less."""
    free = [tensor.spec for tensor in plan.tensors if tensor.spec.keep is None]
    return Sensitivity(
        digest=said[0],
        text=said[1],
        errors={s.name: {t.name: 4.0**-t.bpw for t in question.measured} for s in free},
        groups=tuple(
            MeasuredGroup(
                name=s.name,
                tensors=(s.name,),
                error=0.1,
                kld=random.Random(s.name).uniform(0.001, 0.02),
            )
            for s in free
        ),
        joint=((0.1, 0.12),),
    )


@pytest.fixture
def quick(monkeypatch):
    """Nothing is measured; the list counts how often it would have been."""
    calls = []

    def measure(*arguments):
        calls.append(1)
        return made_up(*arguments)

    monkeypatch.setattr(allocation, "_measure", measure)
    return calls


def question(**settings) -> Question:
    values = {"rounding": "nearest"} | settings
    return Question(FIXTURE, Reading("core", 512), Running(device="cpu"), **values)


def test_sizes_are_met_from_below_for_twenty_targets(tmp_path, quick):
    rng = random.Random(0)
    for k in range(20):
        target = rng.randrange(6_000_000, 20_000_000)
        answer = allocate(question(), Goal(str(target)), tmp_path / f"{k}.yaml", Silent())
        assert 0 <= target - answer.n_bytes <= target / 1000
    assert len(quick) == 1  # the other nineteen use what the first has kept


def test_the_recipe_plans_as_promised_and_says_what_to_expect(tmp_path, quick):
    path = tmp_path / "mine.yaml"
    answer = allocate(question(), Goal(size="7.4MB"), path, Silent())
    recipe = load_recipe(str(path))
    assert recipe.name == "mine"
    assert recipe.predicted_kld == pytest.approx(answer.kld, rel=1e-3)
    with planned(Job(FIXTURE, str(path), mmproj=None), Silent()) as (_, decided):
        plan = decided.plans[-1]
    assert plan.n_bytes <= answer.n_bytes <= TARGET
    assert plan.bpw == pytest.approx(answer.bpw, rel=1e-3)


def test_bits_per_weight_are_those_of_the_plan(tmp_path, quick):
    path = tmp_path / "mine.yaml"
    allocate(question(), Goal(bpw="3.1"), path, Silent())
    with planned(Job(FIXTURE, str(path), mmproj=None), Silent()) as (_, decided):
        assert 3.09 <= decided.plans[-1].bpw <= 3.1


def test_floors_and_types_are_kept(tmp_path, quick):
    path = tmp_path / "mine.yaml"
    types = parse_types("iq1_s, Q4_K,Q4_0,Q6_K")
    asked = question(floors=(parse_floor("attention.*>=Q4_K"),), types=types)
    allocate(asked, Goal(str(TARGET)), path, Silent())
    with planned(Job(FIXTURE, str(path), mmproj=None), Silent()) as (_, decided):
        free = [t for t in decided.plans[-1].tensors if t.spec.keep is None]
    assert {t.type for t in free} <= set(types)
    assert all(t.type.bpw >= 4.5 for t in free if t.spec.role.startswith("attention."))
    assert any(t.type is GgmlType.IQ1_S for t in free)


def test_int4_weights_that_are_copied_cost_nothing():
    with planned(Job(FIXTURE, "q8_0", mmproj=None), Silent()) as (_, decided):
        specs = [tensor.spec for tensor in decided.plans[-1].tensors]
    exact = {s.role for s in specs if can_repack(s, GgmlType.Q4_0)}
    assert exact == {"routed_expert.gate", "routed_expert.up", "routed_expert.down"}
    assert not any(can_repack(s, GgmlType.Q4_K) for s in specs)


def test_other_settings_are_measured_anew_and_all_are_kept(tmp_path, quick):
    for rounding in ("nearest", "feedback", "nearest"):
        allocate(question(rounding=rounding), Goal(str(TARGET)), tmp_path / "a.yaml", Silent())
    assert len(quick) == 2
    assert len(list(tmp_path.glob("*.sensitivity.json"))) == 2


def test_no_recipe_of_the_ladder_lies_below_the_curve(tmp_path, quick):
    answer = allocate(question(), Goal(str(TARGET)), tmp_path / "a.yaml", Silent(), with_curve=True)
    sizes = [n for n, _ in answer.front]
    klds = [kld for _, kld in answer.front]
    assert sizes == sorted(sizes)
    assert klds == sorted(klds, reverse=True)
    assert {"ud-q2_k_xl", "q4_k_m"} <= {mark.name for mark in answer.marks}
    for mark in answer.marks:
        larger = [kld for n, kld in answer.front if n >= mark.n_bytes]
        assert not larger or mark.kld >= larger[0] * 0.999


@pytest.mark.parametrize("ending", ["html", "svg"])
def test_the_curve_is_drawn_with_every_recipe(tmp_path, quick, ending):
    answer = allocate(question(), Goal(str(TARGET)), tmp_path / "a.yaml", Silent(), with_curve=True)
    draw(answer, "<model>", tmp_path / f"c.{ending}")
    text = (tmp_path / f"c.{ending}").read_text()
    assert "ud-iq2_m" in text
    assert "<model>" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --target-size"),
        (["--target-size", "7MB", "--target-bpw", "2"], "one of --target-size"),
        (["--target-size", "7MB", "--ctx", "512"], "belongs to --fit"),
        (["--target-size", "1MB"], "too few"),
        (["--target-size", "7MB", "--types", "Q9_K"], "unknown types"),
        (["--target-size", "7MB", "--floor", "x"], "no floor"),
        (["--target-size", "lots"], "not a size"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(tmp_path, quick, arguments, message):
    command = ["allocate", str(FIXTURE), "-o", str(tmp_path / "a.yaml"), *arguments]
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not quick


@pytest.mark.slow
def test_the_whole_command_measures_and_writes(tmp_path):
    """With a text so small that only the way is tested, not the figures."""
    asked = question(types=None)
    answer = allocate(asked, Goal(str(TARGET)), tmp_path / "a.yaml", Silent())
    assert 0 < answer.kld < 10
    shares = sum(row.share for row in answer.rows)
    assert shares == pytest.approx(1)
