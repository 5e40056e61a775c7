"""llama.cpp takes every command line, and each pattern finds the tensors that it should."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import types
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.guide.commands import Command, number_patterns, overrides
from quantkit.guide.guide import make_guide
from quantkit.guide.memory import Machine, Place, fit
from quantkit.guide.model import Held, Tip
from quantkit.guide.text import plain
from quantkit.types import GgmlType
from tests.guide.builders import kimi_file, llama_file

GB = 10**9
K25 = kimi_file("ud-tq1_0")
SAMPLED = replace(
    K25,
    sampling={"temp": 1.0, "top_k": 40.0, "top_p": 0.95, "min_p": 0.01, "penalty_repeat": 1.05},
    instant={"temp": 0.6},
    switch="thinking",
    tips=(Tip("--yarn-beta-fast 1", "trained so"),),
)
MACHINES = [Machine(vram * GB, 256 * GB) for vram in (0, 6, 12, 16, 22, 24, 32, 96, 200, 400)]


@given(st.sets(st.integers(0, 1234)))
def test_number_patterns_match_just_these_numbers(numbers):
    pattern = re.compile("|".join(number_patterns(numbers)) or "none")
    assert {n for n in range(1300) if pattern.fullmatch(str(n))} == numbers


@pytest.mark.parametrize(
    ("numbers", "patterns"),
    [
        (range(57), ["[0-9]", "[1-4][0-9]", "5[0-6]"]),
        ([7], ["7"]),
        ([1, 3, 60], ["[13]", "60"]),
        (range(95, 112), ["9[5-9]", "10[0-9]", "11[0-1]"]),
    ],
)
def test_number_patterns_are_as_short_as_people_write_them(numbers, patterns):
    assert number_patterns(numbers) == patterns


def kept_in_ram(argument: str, names: list[str]) -> set[str]:
    """What llama.cpp makes of an `-ot` argument: patterns are split at commas and searched for."""
    patterns = []
    for part in argument.split(","):
        pattern, _, buffer = part.partition("=")
        assert buffer == "CPU"
        patterns.append(re.compile(pattern))
    return {name for name in names if any(pattern.search(name) for pattern in patterns)}


@pytest.mark.parametrize("recipe", ["ud-tq1_0", "ud-q2_k_xl", "q4_x", "iq1_s"])
@pytest.mark.parametrize("vram", [20, 24, 27, 33, 48, 80, 121, 160, 200])
def test_override_patterns_find_exactly_the_experts_in_ram(recipe, vram):
    model = kimi_file(recipe)
    laid = fit(model, Machine(vram * GB, 1000 * GB), 16_384)
    assert laid.in_ram
    names = [tensor.name for tensor in model.tensors]
    assert kept_in_ram(overrides(laid.in_ram, model), names) == {t.name for t in laid.in_ram}


@given(st.sets(st.sampled_from(K25.experts), min_size=1))
def test_any_set_of_experts_has_a_pattern(experts):
    names = [tensor.name for tensor in K25.tensors]
    assert kept_in_ram(overrides(experts, K25), names) == {tensor.name for tensor in experts}


def test_all_experts_have_the_pattern_that_everybody_knows():
    assert overrides(K25.experts, K25) == ".ffn_.*_exps.=CPU"
    shared = [Held(f"blk.1.ffn_{part}_shexp.weight", GgmlType.Q8_0, 1) for part in ("up", "down")]
    others = [tensor.name for tensor in (*K25.tensors, *shared) if tensor.expert is None]
    assert not kept_in_ram(".ffn_.*_exps.=CPU", others)


def test_n_cpu_moe_leaves_no_expert_on_the_device_that_does_not_fit():
    laid = fit(K25, Machine(96 * GB, 256 * GB), 98_304)
    ways = dict(make_guide(K25, Machine(96 * GB, 256 * GB)).placements)
    (count,) = (f[1] for flags in ways.values() for f in flags if f[0] == "--n-cpu-moe")
    # llama.cpp: experts of blk.0 to blk.N-1
    by_count = {t.name for t in K25.experts if t.layer < int(count)}
    exact = {t.name for t in laid.in_ram}
    assert exact <= by_count
    assert {t.layer for t in K25.experts if t.name in by_count} == {t.layer for t in laid.in_ram}


def all_commands(model, machine) -> list[Command]:
    guide = make_guide(model, machine, repo="me/Kimi-K2.5-GGUF")
    first = guide.commands
    server = next(c for c in first if c.argv[:1] == ["llama-server"])
    at = server.flags.index(("--fit", "on" if machine.vram else "off"))
    after = at + 1 if machine.vram else at + 2
    others = [
        Command(what, (*server.flags[:at], *flags, *server.flags[after:]))
        for what, flags in guide.placements
    ]
    return [*first, *others]


# llama.cpp's own parser, in a process of its own as it may exit. 12 is llama-server, 5 llama-cli.
_PARSE = """
import ctypes, json, sys
import xllamacpp
from xllamacpp import xllamacpp as module
name = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
parse = getattr(ctypes.CDLL(module.__file__), name, None)
if parse is None:
    sys.exit(77)
parse.restype = ctypes.c_bool
results = []
for example, argv in json.load(sys.stdin):
    params = xllamacpp.CommonParams()
    words = (ctypes.c_char_p * (len(argv) + 1))(*[word.encode() for word in argv], None)
    where = ctypes.c_void_p(id(params) + 16)  # the struct follows the object's header
    taken = parse(len(argv), words, where, example, None)
    results.append({
        "taken": taken, "n_ctx": params.n_ctx, "ngl": params.n_gpu_layers,
        "fit": params.fit_params, "overrides": params.tensor_buft_overrides,
        "temp": params.sampling.temp, "beta_fast": params.yarn_beta_fast,
        "template": dict(params.default_template_kwargs), "mmproj": params.mmproj.path,
        "cache": str(params.cache_type_k),
    })
print(json.dumps(results))
"""
_EXAMPLES = {"llama-server": 12, "llama-cli": 5}


def parsed(commands: list[Command]) -> list[dict]:
    pytest.importorskip("xllamacpp")
    wanted = [(_EXAMPLES[c.argv[0]], c.argv) for c in commands]
    done = subprocess.run(
        [sys.executable, "-c", _PARSE],
        input=json.dumps(wanted), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("this build of llama.cpp does not export its parser")
    assert done.returncode == 0, done.stderr[-800:]
    return json.loads(done.stdout.splitlines()[-1])


def test_llama_cpp_takes_every_command_line_and_understands_it():
    runs = [
        (machine, command)
        for machine in MACHINES
        for command in all_commands(SAMPLED, machine)
        if command.argv and command.argv[0] in _EXAMPLES
    ]
    for (machine, command), seen in zip(runs, parsed([c for _, c in runs]), strict=True):
        argv = command.argv
        assert seen["taken"], argv
        assert seen["n_ctx"] == 98_304
        assert seen["fit"] == ("on" in argv)
        assert seen["beta_fast"] == 1
        assert seen["mmproj"] == "mmproj-Kimi-K2.5-F16.gguf"
        if "-ngl" in argv:
            assert seen["ngl"] == int(argv[argv.index("-ngl") + 1])
            assert (seen["ngl"] == 0) == (machine.vram == 0)
        if "-ot" in argv:
            assert seen["overrides"] == argv[argv.index("-ot") + 1]
        instant = "--chat-template-kwargs" in argv
        assert seen["template"].get("thinking") == ("false" if instant else None)
        assert seen["temp"] == pytest.approx(0.6 if instant else 1.0)


def test_llama_cpp_takes_what_notes_advise():
    notes = "\n".join(make_guide(SAMPLED, Machine(24 * GB, 256 * GB)).notes)
    advised = re.findall(r"--[a-z][a-z0-9-]*(?: (?:\d+|q8_0|none|on))?", notes)
    assert {flag.split()[0] for flag in advised} >= {"--cache-type-k", "--load-mode", "--no-repack"}
    commands = [Command("", (("llama-server",), tuple(flag.split()))) for flag in advised]
    refused = [f for f, seen in zip(advised, parsed(commands), strict=True) if not seen["taken"]]
    assert not refused


def test_the_parser_refuses_what_does_not_exist():
    (seen,) = parsed([Command("", (("llama-server",), ("--n-cpu-mow", "3")))])
    assert not seen["taken"]


@pytest.mark.parametrize("name", ["Kimi K2.5 'new'", "a$(b)`c`", "-rf", 'q"uote'])
def test_command_lines_survive_a_shell(name):
    model = replace(K25, name=name, files=(f"{name}.gguf",))
    for command in make_guide(model, Machine(24 * GB, 256 * GB)).commands:
        if command.flags:
            assert shlex.split("\n".join(command.lines).replace("\\\n", "")) == command.argv


def test_the_client_asks_for_what_the_mode_says():
    asked = []

    class OpenAI:
        def __init__(self, **_):
            said = types.SimpleNamespace(message=types.SimpleNamespace(content=""))
            answer = types.SimpleNamespace(choices=[said])
            create = lambda **request: asked.append(request) or answer  # noqa: E731
            self.chat = types.SimpleNamespace(completions=types.SimpleNamespace(create=create))

    module = types.ModuleType("openai")
    module.OpenAI = OpenAI
    guide = make_guide(SAMPLED, Machine(24 * GB, 256 * GB))
    snippets = [c.text for c in guide.commands if c.language == "python"]
    sys.modules["openai"] = module
    try:
        for snippet in snippets:
            exec(snippet, {"print": lambda *_: None})  # noqa: S102 - as a reader would
    finally:
        del sys.modules["openai"]
    thinking, instant = asked
    assert thinking["model"] == instant["model"] == "Kimi-K2.5-UD-TQ1_0"
    assert (thinking["temperature"], instant["temperature"]) == (1.0, 0.6)
    assert thinking["extra_body"] == {
        "top_k": 40.0, "min_p": 0.01, "repeat_penalty": 1.05,
        "chat_template_kwargs": {"thinking": True},
    }  # fmt: skip
    assert instant["extra_body"]["chat_template_kwargs"] == {"thinking": False}


def test_ollama_gets_one_file_and_its_own_words():
    guide = make_guide(SAMPLED, Machine(24 * GB, 256 * GB))
    merge = next(c for c in guide.commands if c.argv[:1] == ["llama-gguf-split"])
    assert merge.argv[2:] == [SAMPLED.files[0], "Kimi-K2.5-UD-TQ1_0.gguf"]
    modelfile = next(c.text for c in guide.commands if c.title.startswith("Modelfile"))
    assert modelfile.splitlines() == [
        "FROM ./Kimi-K2.5-UD-TQ1_0.gguf",
        "PARAMETER num_ctx 98304",
        "PARAMETER temperature 1",
        "PARAMETER top_k 40",
        "PARAMETER top_p 0.95",
        "PARAMETER min_p 0.01",
        "PARAMETER repeat_penalty 1.05",
    ]


def test_the_download_takes_all_shards_and_the_vision_file_and_no_more():
    from fnmatch import fnmatch

    command = make_guide(K25, Machine(24 * GB, 256 * GB), repo="me/K").commands[0]
    patterns = [f[1] for f in command.flags if f[0] == "--include"]
    assert command.argv[:3] == ["hf", "download", "me/K"]
    wanted = [f"UD-TQ1_0/{file}" for file in K25.files] + ["mmproj-Kimi-K2.5-F16.gguf"]
    others = ["Kimi-K2.5-UD-Q2_K_XL-00001-of-00008.gguf", "mmproj-Kimi-K2.5-BF16.gguf"]
    taken = [f for f in wanted + others if any(fnmatch(f, pattern) for pattern in patterns)]
    assert taken == wanted


def test_a_dense_model_gets_no_expert_flags():
    guide = make_guide(llama_file(), Machine(6 * GB, 32 * GB), 8192)
    assert guide.fit.place is Place.RAM
    assert not re.search("moe|exps|-ot", plain(guide))
    commands = [c for c in guide.commands if c.argv and c.argv[0] in _EXAMPLES]
    assert all(seen["taken"] for seen in parsed(commands))
