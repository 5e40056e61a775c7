"""The whole answer: which recipe, how fast, and the same words in every form."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import pytest

from quantkit.guide.guide import Rung, as_json, best_rung, make_guide
from quantkit.guide.memory import Machine, Place
from quantkit.guide.model import Tip
from quantkit.guide.text import markdown, plain
from quantkit.pipeline.guide import ladder
from tests.guide.builders import LLAMA_8B, dense, kimi_file, plan, planned_kimi

GB = 10**9
SMALL = Machine(24 * GB, 256 * GB)


@cache
def rungs(vram: int, ram: int, recipe: str = "ud-tq1_0") -> dict[str, Rung]:
    steps = ladder(planned_kimi(recipe), Machine(vram * GB, ram * GB), 98_304)
    return {rung.recipe: rung for rung in steps}


def test_the_ladder_hardly_depends_on_what_is_planned():
    steps, others = rungs(24, 256), rungs(24, 256, "q4_x")
    assert steps.keys() == others.keys()
    for name, step in steps.items():
        assert others[name].n_bytes == pytest.approx(step.n_bytes, abs=4096), "headers of shards"
        assert replace(others[name], n_bytes=step.n_bytes) == step


def test_sizes_of_the_ladder_are_those_of_the_plans():
    for recipe, rung in rungs(24, 256).items():
        planned = planned_kimi(recipe).plans[-1]
        assert rung.n_bytes == pytest.approx(planned.n_bytes, abs=4096)
        assert rung.bpw == pytest.approx(planned.bpw)


@pytest.mark.parametrize(
    ("vram", "ram"), [(24, 240), (24, 256), (24, 384), (80, 512), (24, 768), (640, 64), (0, 512)]
)
def test_the_best_recipe_is_the_largest_that_needs_no_disk(vram, ram):
    steps = rungs(vram, ram)
    best = steps[best_rung(steps.values())]
    assert best.fits
    assert best.n_bytes <= (vram + ram) * GB, "the published rule: RAM and VRAM hold the file"
    larger = [s for s in steps.values() if s.n_bytes > best.n_bytes]
    assert not any(step.fits and not step.wasteful for step in larger)


def test_24_gb_and_240_gb_are_for_the_smallest():
    assert best_rung(rungs(24, 240).values()) == "ud-tq1_0"


def test_presets_are_a_last_resort():
    assert all(name.startswith("ud-") for name in rungs(24, 256))
    steps = rungs(24, 210)
    assert steps["ud-tq1_0"].place is Place.DISK
    assert best_rung(steps.values()) == "iq1_s"


def test_more_bits_than_int4_has_are_a_waste():
    steps = rungs(24, 200)
    assert {name for name, step in steps.items() if step.wasteful} >= {"q8_0", "q6_k", "q5_k_m"}
    assert not steps["q4_x"].wasteful
    wide = [Rung("a", 9, 4.5, Place.RAM), Rung("b", 17, 8.5, Place.RAM, wasteful=True)]
    assert best_rung(wide) == "a"


def test_of_a_dense_model_no_bits_are_wasted():
    decided = plan(dense(LLAMA_8B), "q8_0", "Llama-8B")
    assert not any(step.wasteful for step in ladder(decided, SMALL, 8192))


@pytest.mark.parametrize(
    ("machine", "verdict"),
    [
        (SMALL, "at most 2[0-9].[0-9] tokens/s for every 100 GB/s"),
        (Machine(24 * GB, 128 * GB), "disk-bound.*below 1 to 2 tokens/s"),
        (Machine(320 * GB, 64 * GB), "everything in VRAM"),
        (Machine(24 * GB, 256 * GB, 100 * GB), "does not run"),
    ],
)
def test_the_class_of_speed_is_the_published_one(machine, verdict):
    guide = make_guide(kimi_file(), machine)
    assert re.search(verdict, guide.speed.verdict)


def test_half_the_ceiling_is_the_published_10_tokens_a_second():
    guide = make_guide(kimi_file("ud-tq1_0"), SMALL)
    assert guide.speed.ceiling == pytest.approx(2 * 10, rel=0.15)


@cache
def everything():
    model = replace(
        kimi_file(),
        sampling={"temp": 1.0, "top_p": 0.95},
        instant={"temp": 0.6},
        switch="thinking",
        tips=(Tip("--yarn-beta-fast 1", "trained with beta_fast 1"),),
    )
    steps = ladder(planned_kimi("ud-tq1_0"), SMALL, None)
    return make_guide(model, SMALL, ladder=steps, repo="me/Kimi-K2.5-GGUF")


def test_json_holds_everything_in_bytes():
    data = json.loads(json.dumps(as_json(everything()), allow_nan=False))
    assert data["fit"]["cache_bytes"] == 98_304 * 61 * 576 * 2
    assert data["fit"]["place"] == "ram"
    for memory in ("vram", "ram"):
        use = data["fit"][memory]
        assert use["total"] == sum(use[k] for k in ("weights", "cache", "compute", "other"))
    assert data["modes"][1] == {
        "name": "instant",
        "sampling": {"temp": 0.6, "top_p": 0.95},
        "chat_template_kwargs": {"thinking": False},
    }
    servers = [c["argv"] for c in data["commands"] if c.get("argv", [""])[0] == "llama-server"]
    assert all(argv[argv.index("--yarn-beta-fast") + 1] == "1" for argv in servers)
    assert {step["recipe"] for step in data["ladder"]} >= {"ud-tq1_0", "ud-q2_k_xl"}
    assert data["best"] in {step["recipe"] for step in data["ladder"]}


def test_text_and_markdown_say_the_same():
    guide = everything()
    words = [re.findall(r"[\w.,/'\"]+", form(guide)) for form in (plain, markdown)]
    languages = {"sh", "python", "text"}
    assert [w for w in words[0] if w not in languages] == [
        w for w in words[1] if w not in languages
    ]


def test_every_command_and_number_is_shown():
    text = plain(everything())
    for needed in (
        "6.91 GB", "--fit on", "--cpu-moe", "--ctx-size 98304", "-ngl 99", "--jinja",
        "--mmproj mmproj-Kimi-K2.5-F16.gguf", "--yarn-beta-fast 1", "_exps.=CPU",
        "hf download me/Kimi-K2.5-GGUF", "from openai import OpenAI", "FROM ./",
        '{"thinking": false}', "--temp 0.6", "best that fits", "trained with beta_fast 1",
        "estimates",
    ):  # fmt: skip
        assert needed in text


def test_markdown_fences_hold_whatever_a_name_has_in_it():
    model = replace(kimi_file(), name="a\n```\nb", files=("a```.gguf",))
    text = markdown(make_guide(model, SMALL))
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0
    assert "\n```\nb" not in text.replace("`````", "")
    assert "\x1b" not in plain(make_guide(replace(model, name="\x1b[2J"), SMALL))
