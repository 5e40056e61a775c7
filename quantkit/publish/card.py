"""The model card's text: a pure function of what is known of the files.

A reader wants, in this order: which file to take, how to get it, how to run it, how far it is from
the original, and how it was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, log10

from quantkit.publish.markup import block, code, folded, link, table, text
from quantkit.run.events import size, weights

_PER_TABLE = 5  # quants side by side
_TOOL = "quantkit"
_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Figures:
    """How far a quant is from its base: KLD in nats per token, `same_top` in percent."""

    kld: float | None = None
    kld_error: float | None = None
    kld_p99: float | None = None
    same_top: float | None = None
    same_top_error: float | None = None
    ppl: float | None = None
    ppl_error: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Quants measured against their base over one text; `figures` are by label."""

    text: str
    n_tokens: int
    n_chunks: int
    n_ctx: int
    engine: str
    base_ppl: float | None
    base_ppl_error: float | None
    figures: Mapping[str, Figures]


@dataclass(frozen=True, slots=True)
class Quant:
    """One model of the repository. `files` are paths in it, in order; `types` are words by role.

    `source` is what the converted checkpoint was called, `created` a date.
    """

    label: str
    files: tuple[str, ...]
    n_bytes: int
    n_weights: int
    bpw: float
    types: Mapping[str, str]
    recipe_name: str
    recipe_digest: str
    recipe_text: str
    version: str
    created: str
    source: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Extra:
    """A file that is no model of its own; `what` says in words what it is for."""

    path: str
    n_bytes: int
    what: str


@dataclass(frozen=True, slots=True)
class Snippet:
    """Something to type, or to save."""

    title: str
    content: str
    language: str = "sh"


@dataclass(frozen=True)
class Card:
    """Everything that the card says.

    `sampling` are (mode, values, what the chat template is told); `more_commands` are folded away,
    `memory` says what a file needs
    besides its own size; `calibration` and `notes` are sentences. `digests` are sha256 by path.
    """

    repo: str
    name: str
    base: str | None
    quants: tuple[Quant, ...]
    extras: tuple[Extra, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    chart: str | None = None
    memory: str = ""
    download: tuple[Snippet, ...] = ()
    run: tuple[Snippet, ...] = ()
    more_commands: tuple[Snippet, ...] = ()
    sampling: tuple[tuple[str, str, str], ...] = ()
    calibration: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


def body(card: Card) -> str:
    """The card below its front matter, as Markdown."""
    lines = [f"# {text(card.name)} GGUF", "", _lead(card), ""]
    for title, content in (
        ("Which file", _files(card)),
        ("Download", _snippets(card.download)),
        ("Run", _run(card)),
        ("Known issues", (f"- {text(note)}" for note in card.notes)),
        ("Types by role", _types(card.quants)),
        ("Calibration", (f"- {text(line)}" for line in card.calibration)),
        ("How they were made", _making(card)),
    ):
        section = list(content)
        if section:
            lines += [f"## {title}", "", *section, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _lead(card: Card) -> str:
    base = link(text(card.base), f"{_HUB}/{card.base}") if card.base else "a model"
    quants = card.quants
    n_weights = f" ({weights(quants[0].n_weights)} weights)" if quants else ""
    if not quants:
        return f"GGUF files of {base} for llama.cpp."
    least, most = quants[0], quants[-1]
    reach = f"{size(least.n_bytes)} at {least.bpw:.2f} bits per weight"
    if most is not least:
        reach = f"{len(quants)} of them, from {reach}, to {size(most.n_bytes)} at {most.bpw:.2f}"
    return f"GGUF quants of {base}{n_weights} for llama.cpp: {reach}."


def _files(card: Card) -> Iterator[str]:
    if card.chart:
        yield f"![Mean KLD over file size]({card.chart})"
        yield ""
        yield (
            "Lower is closer to the original, further left is smaller. The stairs join the quants "
            "that no smaller one beats."
        )
        yield ""
    first = card.measurements[0] if card.measurements else None
    yield from _main_table(card.repo, card.quants, first)
    yield ""
    if first:
        yield _explained(first)
        yield ""
    if card.memory:
        yield card.memory
        yield ""
    for more in card.measurements[1:]:
        known = [quant for quant in card.quants if quant.label in more.figures]
        yield from _main_table(card.repo, known, more)
        yield ""
        yield _explained(more)
        yield ""
    if card.extras:
        rows = [
            (
                link(code(extra.path), f"{_HUB}/{card.repo}/blob/main/{extra.path}"),
                size(extra.n_bytes),
                text(extra.what),
            )
            for extra in card.extras
        ]
        yield from table(("other files", "size", ""), rows)


def _main_table(repo: str, quants: Sequence[Quant], measured: Measurement | None) -> list[str]:
    head = ["quant", "size", "bpw"]
    if measured:
        head += ["mean KLD", "99\u00a0% KLD", "same top, %", "PPL"]
    rows = []
    for quant in quants:
        sizes = [_unbroken(size(quant.n_bytes)), f"{quant.bpw:.2f}"]
        row = [_where(repo, quant), *sizes]
        if measured:
            row += _figures(measured.figures.get(quant.label, Figures()))
        rows.append(row)
    return table(head, rows, words=1)


def _where(repo: str, quant: Quant) -> str:
    """The quant's label, linked to its folder or its one file."""
    folder, _, _ = quant.files[0].rpartition("/")
    target = f"tree/main/{folder}" if folder else f"blob/main/{quant.files[0]}"
    return link(code(quant.label), f"{_HUB}/{repo}/{target}")


def _figures(found: Figures) -> list[str]:
    same, error = found.same_top, found.same_top_error
    percent = "–" if same is None else f"{same:.2f}" + (f" ± {error:.2f}" if error else "")
    cells = (
        _doubted(found.kld, found.kld_error),
        _number(found.kld_p99),
        percent,
        _doubted(found.ppl, found.ppl_error),
    )
    return [_unbroken(cell) for cell in cells]


def _unbroken(words: str) -> str:
    """A cell that stays on one line."""
    return words.replace(" ", "\u00a0")


def _doubted(value: float | None, error: float | None) -> str:
    return _number(value) + (f" ± {_number(error, 2)}" if value is not None and error else "")


def _number(value: float | None, digits: int = 4) -> str:
    """With significant digits: 0.01234, 5.678, 1.234e-09; a dash for nothing."""
    if value is None:
        return "–"
    decade = floor(log10(abs(value))) if value else 0
    if not -7 < decade < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - decade)}f}"


def _explained(measured: Measurement) -> str:
    base = _doubted(measured.base_ppl, measured.base_ppl_error)
    return (
        f"Measured with {text(measured.engine)} on the text {code(measured.text)}: "
        f"{measured.n_tokens:,} tokens in {measured.n_chunks:,} windows of {measured.n_ctx:,}, "
        "of each the second half. KLD is the Kullback-Leibler divergence of the next-token "
        "distribution from the unquantised model's, in nats per token: 0 is the same model. Same "
        "top: how often both rate the same token highest. "
        f"The unquantised model's PPL is {base}. ± is one standard error."
    )


def _snippets(snippets: Sequence[Snippet]) -> Iterator[str]:
    for snippet in snippets:
        yield f"{text(snippet.title)}:"
        yield ""
        yield from block(snippet.content, snippet.language)
        yield ""


def _run(card: Card) -> Iterator[str]:
    yield from _snippets(card.run)
    if card.sampling:
        rows = [(text(mode), code(values), code(told)) for mode, values, told in card.sampling]
        yield from table(("sampling", "values", "chat template"), rows)
        yield ""
    if card.more_commands:
        yield from folded("More commands", _snippets(card.more_commands))


def _types(quants: Sequence[Quant]) -> Iterator[str]:
    roles = list(dict.fromkeys(role for quant in quants for role in quant.types))
    for first in range(0, len(quants), _PER_TABLE):
        group = quants[first : first + _PER_TABLE]
        rows = [
            [
                code(role),
                *(
                    text(quant.types.get(role, "–")).replace(" × ", "\u00a0×\u00a0")
                    for quant in group
                ),
            ]
            for role in roles
        ]
        yield from table(["role", *(code(quant.label) for quant in group)], rows)
        yield ""


def _making(card: Card) -> Iterator[str]:
    if not card.quants:
        return
    yield (
        f"Made with {_TOOL}. Each quant has a `.manifest.json` with the digests of its source, its "
        "recipe and every tensor; the same source and recipe give the same bytes again. "
        f"`{_TOOL} verify FILE` checks a download against it."
    )
    yield ""
    rows = [
        (
            code(quant.label), text(quant.source), code(quant.recipe_digest[:12]),
            text(quant.version), text(quant.created),
        )
        for quant in card.quants
    ]  # fmt: skip
    yield from table(("quant", "made from", "recipe, sha256", _TOOL, "date"), rows)
    yield ""
    fingerprints = {quant.fingerprint for quant in card.quants}
    if fingerprints:
        yield f"Fingerprint of the source: {', '.join(map(code, sorted(fingerprints)))}"
        yield ""
    for quant in card.quants:
        yield from folded(f"Recipe {quant.recipe_name}", block(quant.recipe_text, "yaml"))
        yield ""
    if card.digests:
        rows_ = [(code(path), code(digest)) for path, digest in sorted(card.digests.items())]
        yield from folded("sha256 of the files", table(("file", "sha256"), rows_))
