"""All that is said about running a model on a machine, as one structure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.guide.commands import (
    Command,
    Flags,
    Mode,
    chat,
    client,
    download,
    modes,
    ollama,
    placements,
    server,
)
from quantkit.guide.memory import (
    N_UBATCH,
    Fit,
    Machine,
    Place,
    cache_bytes,
    compute_bytes,
    context,
    fit,
    longest_ctx,
)
from quantkit.guide.model import Model
from quantkit.run.events import size
from quantkit.types import GgmlType

_RAM_BANDWIDTH = 100e9  # bytes a second, two channels of fast DDR5; a unit to scale by
_BIG_UBATCH = 4096


@dataclass(frozen=True, slots=True)
class Rung:
    """A recipe of the ladder for this model: what it would weigh, and where that would lie.

    `wasteful` is a recipe that gives INT4 weights more bits than they were published with.
    """

    recipe: str
    n_bytes: int
    bpw: float
    place: Place
    wasteful: bool = False

    @property
    def fits(self) -> bool:
        """Whether nothing has to be read from disk."""
        return self.place in (Place.VRAM, Place.RAM)


@dataclass(frozen=True, slots=True)
class Speed:
    """What to expect: `verdict` in words, `ceiling` in tokens a second where RAM sets it.

    The ceiling is for 100 GB/s of memory bandwidth: weights have to be read once a token.
    """

    verdict: str
    ceiling: float | None


@dataclass(frozen=True)
class Guide:
    """How `model` runs on `machine`. `placements` are ways to say what lies where, with flags."""

    model: Model
    machine: Machine
    fit: Fit
    speed: Speed
    ladder: tuple[Rung, ...]
    best: str | None
    modes: tuple[Mode, ...]
    placements: tuple[tuple[str, Flags], ...]
    commands: tuple[Command, ...]
    notes: tuple[str, ...]


def make_guide(
    model: Model,
    machine: Machine,
    n_ctx: int | None = None,
    *,
    ladder: Iterable[Rung] = (),
    repo: str | None = None,
) -> Guide:
    """Decide and write down everything; a pure function.

    `n_ctx` None is 98,304 or what the model allows; `repo` is where the files can be downloaded.
    `UsageError` for a context beyond the model's.
    """
    laid = fit(model, machine, context(model.shape, n_ctx))
    rungs = tuple(ladder)
    how = modes(model)
    ways = placements(model, laid)
    return Guide(
        model,
        machine,
        laid,
        speed(model, machine, laid),
        rungs,
        best_rung(rungs),
        how,
        ways,
        _commands(model, laid, how, ways, repo),
        tuple(_notes(model, machine, laid)),
    )


def best_rung(rungs: Iterable[Rung]) -> str | None:
    """The largest file that needs no disk; of those that only waste bytes, none."""
    fitting = [rung for rung in rungs if rung.fits and not rung.wasteful]
    return max(fitting, key=lambda r: (r.n_bytes, r.recipe)).recipe if fitting else None


def speed(model: Model, machine: Machine, laid: Fit) -> Speed:
    """The class of speed. Published for Kimi K2.5: over 40, about 10, and below 2 tokens/s."""
    ceiling = _RAM_BANDWIDTH / laid.active_ram if laid.active_ram else None
    if laid.place is Place.NOWHERE:
        return Speed("does not run on this machine", None)
    if laid.place is Place.DISK:
        lacking = size(laid.ram.total - machine.ram)
        return Speed(f"disk-bound, {lacking} too much for memory: below 1 to 2 tokens/s", None)
    if laid.place is Place.VRAM or ceiling is None:
        return Speed("everything in VRAM: the fastest there is", None)
    rate = f"{ceiling:,.{0 if ceiling >= 100 else 1}f}"
    return Speed(
        f"in memory: a token reads {size(laid.active_ram)} from RAM, so at most {rate} tokens/s "
        "for every 100 GB/s of its bandwidth, and in practice about half",
        ceiling,
    )


def _commands(
    model: Model,
    laid: Fit,
    how: tuple[Mode, ...],
    ways: tuple[tuple[str, Flags], ...],
    repo: str | None,
) -> tuple[Command, ...]:
    fetch = (download(model, repo),) if repo else ()
    (_, automatic), (what, by_hand) = ways[0], ways[-1]
    serve = [server(model, laid, automatic, how[0])]
    if by_hand != automatic:
        counted = server(model, laid, by_hand, how[0])
        serve.append(Command(f"The same, counted here: {what}", counted.flags))
    return (
        *fetch,
        *serve,
        *(client(model, mode) for mode in how),
        *(chat(model, laid, automatic, mode) for mode in how),
        *ollama(model, laid, how[0]),
    )


def _notes(model: Model, machine: Machine, laid: Fit) -> Iterable[str]:
    shape = model.shape
    yield from model.notes
    for tip in model.tips:
        yield f"{tip.flag}: {tip.reason}"
    if machine.disk is not None and model.n_bytes > machine.disk:
        yield f"the disk is too small: the file is {size(model.n_bytes)}"
    if 0 < laid.n_gpu_layers <= shape.n_layers or (machine.vram and not laid.n_gpu_layers):
        reach = longest_ctx(model, machine)
        yield (
            f"not all layers fit into VRAM with {laid.n_ctx:,} tokens of context, "
            + (f"but with {reach:,} they do" if reach else "nor with fewer")
        )
    if all(width % 32 == 0 for rows in shape.cache_rows for width in rows):
        small = size(cache_bytes(shape, laid.n_ctx, GgmlType.Q8_0))
        yield (
            "--cache-type-k q8_0 --cache-type-v q8_0 makes the cache "
            f"{small}; long contexts may suffer, so compare first"
        )
    if laid.in_ram:
        more = compute_bytes(shape, laid.n_ctx, _BIG_UBATCH) - compute_bytes(shape, laid.n_ctx)
        yield (
            f"--batch-size {_BIG_UBATCH} --ubatch-size {_BIG_UBATCH} instead of {N_UBATCH} reads "
            f"long prompts much faster and takes about {size(more)} more VRAM"
        )
        if laid.place is Place.RAM:
            yield "--load-mode none reads the file into RAM at once: a slow start, no page faults"
    if shape.is_mla:
        yield "--no-repack helps if llama.cpp crashes while it loads on a CPU with AMX"


def as_json(guide: Guide) -> dict[str, Any]:
    """The structure as plain data; sizes in bytes."""
    laid = guide.fit
    return {
        "model": {
            "name": guide.model.name,
            "architecture": guide.model.arch,
            "files": list(guide.model.files),
            "n_bytes": guide.model.n_bytes,
            "mmproj": guide.model.mmproj and guide.model.mmproj[0],
            "context_length": guide.model.shape.n_ctx,
        },
        "machine": asdict(guide.machine),
        "fit": {
            "place": laid.place.value,
            "ctx": laid.n_ctx,
            "cache_type": laid.cache_type.name,
            "cache_bytes": laid.vram.cache + laid.ram.cache,
            "n_gpu_layers": laid.n_gpu_layers,
            "experts_in_ram": [tensor.name for tensor in laid.in_ram],
            "vram": {**asdict(laid.vram), "total": laid.vram.total},
            "ram": {**asdict(laid.ram), "total": laid.ram.total},
        },
        "speed": {"verdict": guide.speed.verdict, "ceiling_per_100_GB_s": guide.speed.ceiling},
        "ladder": [{**asdict(rung), "place": rung.place.value} for rung in guide.ladder],
        "best": guide.best,
        "modes": [
            {
                "name": mode.name,
                "sampling": dict(mode.sampling),
                "chat_template_kwargs": dict(mode.kwargs),
            }
            for mode in guide.modes
        ],
        "placements": [
            {"what": what, "argv": [word for flag in flags for word in flag]}
            for what, flags in guide.placements
        ],
        "commands": [
            {"title": c.title, "argv": c.argv}
            if c.flags
            else {"title": c.title, "language": c.language, "text": c.text}
            for c in guide.commands
        ],
        "notes": list(guide.notes),
    }
