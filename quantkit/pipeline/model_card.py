"""What the card says of a repository: of the models here, and of those that are there already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from quantkit.calibrate.coverage import coverage
from quantkit.calibrate.imatrix import read_imatrix
from quantkit.container.names import escaped, shown
from quantkit.container.shardset import open_shards
from quantkit.errors import QuantkitError, UsageError
from quantkit.evaluate.report import role_of
from quantkit.guide.commands import Mode
from quantkit.guide.guide import Guide, make_guide
from quantkit.guide.memory import Machine
from quantkit.pipeline.guide import model_of_file
from quantkit.pipeline.measured import (
    LAST,
    chart,
    measurements,
    measures,
    portable,
    remote_reports,
    report_item,
)
from quantkit.pipeline.publishable import MAX_READ, Found, Known, LocalModel, content
from quantkit.publish.card import Card, Extra, Quant, Snippet, body
from quantkit.publish.front import MAX_CARD_BYTES, Inherited, checked, front_matter, inherited
from quantkit.publish.layout import CHART, README, Item
from quantkit.publish.readme import readme
from quantkit.publish.remote import Remote
from quantkit.run.events import Reporter, size
from quantkit.types import GgmlType, Kvs, KvType
from quantkit.write.manifest import MAX_MANIFEST_BYTES, SUFFIX, load_manifest

_LOW_BPW = 2.3
_FEW_TOKENS = 32
_REPO = re.compile(
    r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@[^/]+)?(?:/.+)?", re.ASCII
)


def card_items(
    remote: Remote,
    found: Found,
    items: Sequence[Item],
    base: str | None,
    *,
    force: bool,
    reporter: Reporter,
) -> list[Item]:
    """Reports, picture and README.md, in this order. `items` are what is sent before them."""
    known = _known(remote, found, {item.path for item in items}, reporter)
    models = [one for one in known if not one.is_mmproj]
    if not models:
        raise UsageError(
            "there is no model to make a card for",
            where=remote.repo,
            hint="publish models first; --card-only is for the card of those that are there",
        )
    there = {path for path in remote.files if path.endswith(".gguf")}
    reports = [portable(report) for report in found.reports]
    kept = [report_item(report) for report in reports if measures(report, models)]
    measured = measurements([*reports, *remote_reports(remote, reporter)], models)
    local = [one.local for one in models if one.local]
    guide = _guide(local, remote.repo)
    kvs = open_shards(local[0].files[0]).kvs if local else {}
    base = _base(base, models)
    if base is None:
        reporter.warn("the base model is not known: name it with --base-model OWNER/NAME")
    digests = {path: file.sha256 for path, file in remote.files.items() if path in there}
    digests |= {item.path: item.sha256 for item in items if item.path.endswith(".gguf")}
    picture = chart(models, measured)
    card = Card(
        repo=remote.repo,
        name=_name(models),
        base=base,
        quants=tuple(_quant(one) for one in models),
        extras=tuple(_extras(known, {item.path: item.n_bytes for item in items}, remote)),
        measurements=tuple(measured),
        chart=CHART if picture else None,
        calibration=tuple(_calibration(models, found.imatrices, reporter)),
        notes=tuple(_notes(models, guide)),
        digests={path: digest for path, digest in digests.items() if digest},
    )
    card = _with_guide(card, guide) if guide else card
    has_vision = any(one.is_mmproj for one in known)
    data = front_matter(
        card,
        _inherited(remote, base, kvs, reporter),
        has_vision=has_vision,
        chats="tokenizer.chat_template" in kvs,
    )
    old = remote.fetch(README, MAX_CARD_BYTES)
    text = readme(data, body(card), old.read_text("utf-8", "replace") if old else None, force=force)
    drawn = [content(CHART, picture.encode(), LAST, derived=True)] if picture else []
    return [*kept, *drawn, content(README, text.encode(), LAST, derived=True)]


def _known(remote: Remote, found: Found, sent: set[str], reporter: Reporter) -> list[Known]:
    """Models whose files are there or will be, by size."""
    present = sent | set(remote.files)
    known = [
        Known(model.stem, model.manifest, model.paths, model)
        for model in found.models
        if present.issuperset(model.paths)
    ]
    stems = {one.stem for one in known}
    records = [path for path in sorted(remote.files) if path.endswith(SUFFIX)]
    for path in records[:MAX_READ]:
        stem = PurePosixPath(path).name.removesuffix(SUFFIX)
        file = None if stem in stems else remote.fetch(path, MAX_MANIFEST_BYTES)
        if file is None:
            continue
        try:
            manifest = load_manifest(file)
        except QuantkitError as error:
            reporter.warn(f"not in the card: {shown(path)}: {error.message}")
            continue
        paths = tuple(str(PurePosixPath(path).with_name(s.file)) for s in manifest.shards)
        if present.issuperset(paths):
            known.append(Known(stem, manifest, paths))
    return sorted(known, key=lambda one: (one.n_bytes, one.stem))


def _quant(one: Known) -> Quant:
    manifest = one.manifest
    sums: dict[str, dict[str, list[int]]] = {}
    n_data = n_weights = 0
    for shard in manifest.shards:
        for tensor in shard.tensors:
            type_ = GgmlType[tensor.type]
            count = tensor.n_bytes // type_.block_bytes * type_.block_size
            n_data, n_weights = n_data + tensor.n_bytes, n_weights + count
            line = sums.setdefault(role_of(tensor.name), {}).setdefault(tensor.type, [0, 0])
            line[0], line[1] = line[0] + 1, line[1] + tensor.n_bytes
    total = {role: sum(line[1] for line in types.values()) for role, types in sums.items()}
    return Quant(
        label=one.label,
        files=one.paths,
        n_bytes=one.n_bytes,
        n_weights=n_weights,
        bpw=8 * n_data / max(1, n_weights),
        types={
            role: ", ".join(
                f"{type_} × {line[0]:,}"
                for type_, line in sorted(sums[role].items(), key=lambda item: -item[1][1])
            )
            for role in sorted(sums, key=lambda role: (-total[role], role))
        },
        recipe_name=manifest.recipe.name,
        recipe_digest=manifest.recipe.digest,
        recipe_text=manifest.recipe.text,
        version=manifest.quantkit_version,
        created=manifest.created.date().isoformat(),
        source=manifest.source.name,
        fingerprint=manifest.source.fingerprint,
    )


def _name(models: Sequence[Known]) -> str:
    one = models[0]
    return one.stem.removesuffix(f"-{one.label}") or one.stem


def _base(named: str | None, models: Sequence[Known]) -> str | None:
    """The base model on the Hub: as told, or the repository that was converted."""
    told = [named, *(one.manifest.source.name for one in models)]
    for name in filter(None, told):
        if found := _REPO.fullmatch(name):
            return found[1]
        if name == named:
            raise UsageError(f"{shown(name)!r} is not OWNER/NAME", where="--base-model")
    return None


def _inherited(remote: Remote, base: str | None, kvs: Kvs, reporter: Reporter) -> Inherited:
    """License and languages: of the base model's card, else of what conversion has read of it."""

    def value(key: str) -> object:
        kv = kvs.get(key)
        return kv.value if kv and kv.type in (KvType.STRING, KvType.ARRAY) else None

    here = checked(
        value("general.license"),
        value("general.license.name"),
        value("general.license.link"),
        value("general.languages"),
        base=base,
    )
    file = remote.fetch_other(base, README, MAX_CARD_BYTES) if base else None
    if file is not None and base is not None:
        try:
            here = inherited(file.read_text("utf-8", "replace"), base).filled(here)
        except UsageError as error:
            reporter.warn(f"{base}: its card is passed over: {error.message}")
    if here.license is None:
        reporter.warn("no license of the base model is known: add one to the card")
    return here


def _extras(known: Sequence[Known], sizes: Mapping[str, int], remote: Remote) -> Iterator[Extra]:
    for one in known:
        if one.is_mmproj:
            yield Extra(one.paths[0], one.n_bytes, "the vision tower: image input, with --mmproj")
    there = {path: file.n_bytes for path, file in remote.files.items()} | dict(sizes)
    for path in sorted(path for path in there if path.endswith(".imatrix.gguf")):
        yield Extra(path, there[path], "importance statistics, for making quants of one's own")


def _calibration(
    models: Sequence[Known], imatrices: Sequence[Path], reporter: Reporter
) -> Iterator[str]:
    said: dict[str, list[str]] = {}
    for one in models:
        said.setdefault(_calibrated(one.manifest.calibration), []).append(one.label)
    for words, labels in said.items():
        yield f"{', '.join(labels)}: {words}"
    for path in imatrices:
        try:
            found = coverage(read_imatrix(path))
        except QuantkitError as error:
            reporter.warn(f"{escaped(path.name)}: {error.message}")
            continue
        if found.n_experts:
            unseen, few = (found.share_below(n) * found.n_experts for n in (1, _FEW_TOKENS))
            yield (
                f"{path.name}: of {found.n_experts:,} experts in {len(found.layers)} layers "
                f"{unseen:,.0f} were never chosen and {few:,.0f} by fewer than {_FEW_TOKENS} "
                "tokens; what those saw too little of comes mostly from all experts together"
            )


def _calibrated(facts: Mapping[str, str | int]) -> str:
    parts = []
    if "quantize.imatrix.file" in facts:
        chunks = facts.get("quantize.imatrix.chunks_count")
        parts.append(
            f"columns weighed by importance statistics of {facts['quantize.imatrix.file']}"
            + (f", from {d}" if (d := facts.get("quantize.imatrix.dataset")) else "")
            + (f" in {chunks:,} chunks" if chunks else "")
        )
    if "quantkit.rounding" in facts:
        parts.append(
            "rounded with feedback, while the model ran on "
            f"{facts.get('quantkit.rounding.n_tokens', 0):,} tokens of "
            f"{facts.get('quantkit.rounding.dataset', 'a text')}"
        )
    return "; ".join(parts) or "no calibration: every column counts alike"


def _guide(local: Sequence[LocalModel], repo: str) -> Guide | None:
    """How the model in the middle of the sizes runs on one GPU of 24 GB with RAM for the rest."""
    if not local:
        return None
    chosen = local[(len(local) - 1) // 2]
    model = model_of_file(open_shards(chosen.files[0]))
    mmproj = (Path(model.mmproj[0]).name, model.mmproj[1]) if model.mmproj else None
    model = replace(model, files=chosen.paths, mmproj=mmproj)
    machine = Machine(24 << 30, 2 * model.n_bytes + (64 << 30))
    return make_guide(model, machine, repo=repo)


def _with_guide(card: Card, guide: Guide) -> Card:
    """The card with its sections on downloading and running."""
    laid, model = guide.fit, guide.model
    commands = [
        (command.title, Snippet(command.title, "\n".join(command.lines), command.language))
        for command in guide.commands
    ]
    run = [snippet for title, snippet in commands if title.startswith("Serve it")]
    if model.experts:
        title = "In place of --fit on, to keep all experts in RAM"
        run.append(Snippet(title, "--fit off -ngl 99 --cpu-moe"))
    others = ("Ask the server", "Talk to it")
    more = [snippet for title, snippet in commands if title.startswith(others)]
    fetch = next(command for command in guide.commands if command.title == "Download it")
    rest = laid.vram.total + laid.ram.total - laid.vram.weights - laid.ram.weights
    cache = laid.vram.cache + laid.ram.cache
    return replace(
        card,
        download=(Snippet(f"{model.name} alone", "\n".join(fetch.lines)),),
        run=tuple(run),
        more_commands=tuple(more),
        memory=(
            f"VRAM and RAM together should hold the file and about {size(rest)} more: the cache of "
            f"{laid.n_ctx:,} tokens of context ({size(cache)}), buffers and the system. A larger "
            "file runs as well, from disk and slowly."
        ),
        sampling=tuple(map(_sampling, guide.modes)),
    )


def _sampling(mode: Mode) -> tuple[str, str, str]:
    values = ", ".join(f"{key} {value:.7g}" for key, value in mode.sampling.items())
    told = ", ".join(f"{key} = {str(value).lower()}" for key, value in mode.kwargs.items())
    return mode.name, values or "llama.cpp's defaults", told or "-"


def _notes(models: Sequence[Known], guide: Guide | None) -> Iterator[str]:
    if guide:
        yield from (f"{tip.flag}: {tip.reason}" for tip in guide.model.tips)
        if guide.model.shape.is_mla:
            yield "--no-repack helps if llama.cpp crashes while it loads on a CPU with AMX"
    low = [one.label for one in models if _quant(one).bpw < _LOW_BPW]
    if low:
        yield (
            f"{', '.join(low)}: below about {_LOW_BPW} bits per weight, users of such files report "
            "loops and broken tool calls more often; look at the KLD before choosing one"
        )
    labels = [one.label for one in models]
    for short in labels:
        longer = [label for label in labels if label.endswith(f"-{short}")]
        if longer:
            yield (
                f"llama.cpp's -hf REPO:{short} may find {', '.join(longer)} as well: name the file"
            )
