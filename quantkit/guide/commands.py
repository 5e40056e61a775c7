"""llama.cpp command lines, and those around it, for a model as it was laid into a machine."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath
from shlex import quote

from quantkit.guide.memory import Fit
from quantkit.guide.model import Held, Model
from quantkit.types import GgmlType

PORT = 8080
ALL_EXPERTS = ".ffn_.*_exps.=CPU"  # as everybody writes it
_FLAGS = {
    "temp": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "penalty_repeat": "--repeat-penalty",
}
# As llama-server's API and ollama spell it, where that differs from GGUF.
_SPELT = {"temp": "temperature", "penalty_repeat": "repeat_penalty"}
_OPENAI = {"temp": "temperature", "top_p": "top_p"}  # the rest is not in OpenAI's protocol

Flags = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Mode:
    """Sampling values of thinking on or off; `kwargs` is what the chat template is told."""

    name: str
    sampling: Mapping[str, float]
    kwargs: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Command:
    """Something to type or to save. `flags` are a program and its options, one tuple each.

    `text` holds what is no command line, in `language`.
    """

    title: str
    flags: Flags = ()
    text: str = ""
    language: str = "sh"

    @property
    def argv(self) -> list[str]:
        """The command line as a program receives it."""
        return [word for flag in self.flags for word in flag]

    @property
    def lines(self) -> list[str]:
        """As it is shown: quoted for a shell, one option on a line."""
        if self.text:
            return self.text.splitlines()
        shown = [" ".join(map(quote, flag)) for flag in self.flags]
        if sum(map(len, shown)) < 80:
            return [" ".join(shown)]
        return [f"{'  ' if i else ''}{part} \\" for i, part in enumerate(shown[:-1])] + [
            f"  {shown[-1]}"
        ]


def modes(model: Model) -> tuple[Mode, ...]:
    """Thinking and instant mode where the chat template has a switch, else just the defaults."""
    if model.switch is None:
        return (Mode("default", model.sampling, {}),)
    instant = {**model.sampling, **model.instant}
    return (
        Mode("thinking", model.sampling, {model.switch: True}),
        Mode("instant", instant, {model.switch: False}),
    )


def overrides(in_ram: Iterable[Held], model: Model) -> str:
    """The argument of `-ot` that keeps just these experts in RAM; "" for none.

    Layers that leave the same kinds share a pattern. llama.cpp searches for a pattern anywhere in
    the name of a tensor, and the first that is found decides.
    """
    kinds: defaultdict[int, set[str]] = defaultdict(set)
    for tensor in in_ram:
        kinds[tensor.layer or 0].add(tensor.expert or "")
    all_kinds = {tensor.expert or "" for tensor in model.experts}
    if kinds and sum(map(len, kinds.values())) == len({(t.layer, t.expert) for t in model.experts}):
        return ALL_EXPERTS
    layers: defaultdict[frozenset[str], list[int]] = defaultdict(list)
    for layer, here in sorted(kinds.items()):
        layers[frozenset(here)].append(layer)
    patterns = []
    for some, numbers in layers.items():
        kind = "ffn_.*_exps" if some == all_kinds else _any_of(sorted(some))
        patterns.append(rf"blk\.{_any_of(number_patterns(numbers))}\.{kind}.=CPU")
    return ",".join(patterns)


def number_patterns(numbers: Iterable[int]) -> list[str]:
    """Regular expressions, one to be chosen, that match just these numbers: `[0-9]`, `1[0-4]`."""
    last: defaultdict[int, list[int]] = defaultdict(list)
    for number in sorted(set(numbers)):
        last[number // 10].append(number % 10)
    patterns = []
    for digits, tens in groupby(last, key=lambda ten: (ten > 0, ten // 10, last[ten])):
        group = list(tens)
        hundreds = str(group[0] // 10) if group[0] >= 10 else ""
        lead = hundreds + _digits([ten % 10 for ten in group]) if digits[0] else ""
        patterns.append(lead + _digits(digits[2]))
    return patterns


def placements(model: Model, fit: Fit) -> tuple[tuple[str, Flags], ...]:
    """Ways to say what lies where, each with what it does; the best by our own count comes last."""
    if fit.n_gpu_layers == 0:
        return (("everything in RAM", (("--fit", "off"), ("-ngl", "0"))),)
    whole = fit.n_gpu_layers > model.shape.n_layers
    n_layers = "99" if whole else str(fit.n_gpu_layers)
    by_hand: Flags = (("--fit", "off"), ("-ngl", n_layers))
    ways: list[tuple[str, Flags]] = [("llama.cpp measures and decides", (("--fit", "on"),))]
    if not whole:
        experts: Flags = (("--cpu-moe",),) if model.experts else ()
        what = f"the head and the last {fit.n_gpu_layers - 1} layers in VRAM"
        ways.append((what, (*by_hand, *experts)))
    elif not fit.in_ram:
        ways.append(("everything in VRAM", by_hand))
    else:
        n_cpu = 1 + max(tensor.layer or 0 for tensor in fit.in_ram)
        pattern = overrides(fit.in_ram, model)
        ways.append(("all experts in RAM, the most room for context", (*by_hand, ("--cpu-moe",))))
        if pattern == ALL_EXPERTS:
            ways.append(("the same as a pattern", (*by_hand, ("-ot", pattern))))
        else:
            if n_cpu < model.shape.n_layers:
                count = ("--n-cpu-moe", str(n_cpu))
                ways.append((f"experts of the layers below {n_cpu} in RAM", (*by_hand, count)))
            ways.append(("as many experts in VRAM as fit", (*by_hand, ("-ot", pattern))))
    return tuple(ways)


def server(model: Model, fit: Fit, placement: Flags, mode: Mode) -> Command:
    """`llama-server` with an OpenAI-compatible API."""
    flags = (
        ("llama-server",),
        *_common(model, fit, placement, mode),
        ("--alias", model.name),
        ("--port", str(PORT)),
    )
    return Command("Serve it (OpenAI's API, and a chat page)", flags)


def chat(model: Model, fit: Fit, placement: Flags, mode: Mode) -> Command:
    """`llama-cli` for a talk in the terminal."""
    flags = (("llama-cli",), *_common(model, fit, placement, mode))
    return Command(_titled("Talk to it in the terminal", mode), flags)


def client(model: Model, mode: Mode) -> Command:
    """A request with OpenAI's Python client; the server's sampling is what it was started with."""
    known = {_OPENAI[key]: value for key, value in mode.sampling.items() if key in _OPENAI}
    extra: dict[str, object] = {
        _SPELT.get(key, key): value for key, value in mode.sampling.items() if key not in _OPENAI
    }
    if mode.kwargs:
        extra["chat_template_kwargs"] = dict(mode.kwargs)
    options = "".join(f"    {key}={value!r},\n" for key, value in known.items())
    if extra:
        options += f"    extra_body={extra!r},\n"
    text = (
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="http://127.0.0.1:{PORT}/v1", api_key="none")\n'
        "answer = client.chat.completions.create(\n"
        f"    model={json.dumps(model.name)},\n"
        '    messages=[{"role": "user", "content": "Hello"}],\n'
        f"{options})\n"
        "print(answer.choices[0].message.content)\n"
    )
    return Command(_titled("Ask the server", mode), text=text, language="python")


def ollama(model: Model, fit: Fit, mode: Mode) -> tuple[Command, ...]:
    """A Modelfile. ollama takes a model in one file, so shards are merged before."""
    first, steps = model.files[0], []
    if len(model.files) > 1:
        merged = f"{model.name}.gguf"
        steps.append(
            Command(
                "Merge the shards, as ollama takes one file only",
                (("llama-gguf-split",), ("--merge", first, merged)),
            )
        )
        first = merged
    name = PurePath(first).name
    lines = [f"FROM ./{name}", f"PARAMETER num_ctx {fit.n_ctx}"]
    lines += [f"PARAMETER {_SPELT.get(k, k)} {_number(v)}" for k, v in mode.sampling.items()]
    steps.append(Command("Modelfile for ollama", text="\n".join(lines), language="text"))
    short = re.sub(r"[^a-z0-9._-]+", "-", model.name.lower()).strip("-._") or "model"
    steps.append(Command("Run it in ollama", (("ollama", "create", short, "-f", "Modelfile"),)))
    return tuple(steps)


def download(model: Model, repo: str) -> Command:
    """Fetch the files of the model, and no others, from the Hub."""
    names = [PurePath(file).name for file in model.files]
    pattern = names[0] if len(names) == 1 else f"*{model.name}-*-of-*.gguf"
    flags: Flags = (("hf", "download", repo), ("--include", f"*{pattern.lstrip('*')}"))
    if model.mmproj:
        flags += (("--include", f"*{PurePath(model.mmproj[0]).name}"),)
    return Command("Download it", (*flags, ("--local-dir", ".")))


def _common(model: Model, fit: Fit, placement: Flags, mode: Mode) -> Flags:
    flags: list[tuple[str, ...]] = [("--model", model.files[0])]
    if model.mmproj:
        flags.append(("--mmproj", model.mmproj[0]))
    flags.append(("--ctx-size", str(fit.n_ctx)))
    if fit.cache_type is not GgmlType.F16:
        name = fit.cache_type.name.lower()
        flags += [("--cache-type-k", name), ("--cache-type-v", name)]
    flags += placement
    flags.append(("--jinja",))
    if mode.kwargs and not all(mode.kwargs.values()):
        flags.append(("--chat-template-kwargs", json.dumps(mode.kwargs)))
    flags += [(_FLAGS[key], _number(value)) for key, value in mode.sampling.items()]
    flags += [tuple(tip.flag.split()) for tip in model.tips]
    return tuple(flags)


def _titled(title: str, mode: Mode) -> str:
    return f"{title} ({mode.name})" if mode.kwargs else title


def _number(value: float) -> str:
    return f"{value:.7g}"


def _any_of(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _digits(values: list[int]) -> str:
    """One digit, or a class of them."""
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"[{values[0]}-{values[-1]}]"
    return f"[{''.join(map(str, values))}]"
