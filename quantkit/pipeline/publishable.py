"""What of an output folder can be published: finished models, statistics, measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.container.names import escaped
from quantkit.errors import OutputError, UsageError
from quantkit.evaluate.report import Report, load_report
from quantkit.publish.digests import known_sha256, sha256_of
from quantkit.publish.layout import Item, label_of, path_in_repo
from quantkit.run.events import Reporter, files, size
from quantkit.write.manifest import SUFFIX, Manifest, load_manifest
from quantkit.write.verify import verify
from quantkit.write.writer import journal_path

MMPROJ = "mmproj-"
SHARED = "vision and statistics"  # the commit of what belongs to all quants

_IMATRIX = ".imatrix.gguf"
_REPORT = "report.json"
_MAX_REPORT_BYTES = 16 << 20
MAX_READ = 64  # records and reports of a repository that are looked at


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A finished conversion: its record, and its files in order."""

    folder: Path
    stem: str
    manifest: Manifest

    @property
    def label(self) -> str:
        """What it is called among its like."""
        return label_of(self.stem, self.manifest.recipe.name)

    @property
    def is_mmproj(self) -> bool:
        """Whether it is a vision file."""
        return self.stem.startswith(MMPROJ)

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards."""
        return tuple(self.folder / shard.file for shard in self.manifest.shards)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the shards go in a repository."""
        names = [path.name for path in self.files]
        return tuple(path_in_repo(name, self.label, len(names)) for name in names)

    @property
    def manifest_path(self) -> str:
        """Where the record goes."""
        return path_in_repo(f"{self.stem}{SUFFIX}", self.label, len(self.files))


@dataclass(frozen=True, slots=True)
class Known:
    """A model of the repository to be: here, or only there."""

    stem: str
    manifest: Manifest
    paths: tuple[str, ...]
    local: LocalModel | None = None

    @property
    def label(self) -> str:
        """What it is called among its like."""
        return label_of(self.stem, self.manifest.recipe.name)

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(shard.n_bytes for shard in self.manifest.shards)

    @property
    def is_mmproj(self) -> bool:
        """Whether it is a vision file."""
        return self.stem.startswith(MMPROJ)


@dataclass(frozen=True)
class Found:
    """What of a folder is to be published."""

    models: tuple[LocalModel, ...]
    imatrices: tuple[Path, ...] = ()
    reports: tuple[Report, ...] = ()


def look(top: Path, more_reports: Sequence[Path], reporter: Reporter) -> Found:
    """Everything in a folder and the folders in it; reports that are named have to be sound.

    `OutputError` for a conversion that is not finished.
    """
    if not top.is_dir():
        raise UsageError("no such folder", where=escaped(str(top)))
    folders = [top, *sorted(path for path in top.iterdir() if _is_folder(path))]
    models = []
    for folder in folders:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            stem = path.name.removesuffix(SUFFIX)
            if journal_path(folder, stem).exists():
                raise OutputError(
                    "its conversion is not finished",
                    where=escaped(str(path)),
                    hint="run `quantkit convert` again, or remove its files",
                )
            models.append(LocalModel(folder, stem, load_manifest(path)))
    _tell_unknown(folders, models, reporter)
    imatrices = [path for folder in folders for path in sorted(folder.glob(f"*{_IMATRIX}"))]
    lying = [path for folder in folders if (path := folder / _REPORT).is_file()]
    reports = [report for path in lying if (report := _report(path, reporter))]
    reports += [_parsed(path) for path in more_reports]
    by_size = sorted(models, key=lambda m: (not m.is_mmproj, _n_bytes(m), m.stem))
    return Found(tuple(by_size), tuple(imatrices), tuple(reports))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def _n_bytes(model: LocalModel) -> int:
    return sum(shard.n_bytes for shard in model.manifest.shards)


def _tell_unknown(
    folders: Sequence[Path], models: Sequence[LocalModel], reporter: Reporter
) -> None:
    known = {path for model in models for path in model.files}
    others = [
        path.name
        for folder in folders
        for path in sorted(folder.glob("*.gguf"))
        if path not in known and not path.name.endswith(_IMATRIX)
    ]
    if others:
        listed = ", ".join(map(escaped, others[:5])) + (" ..." if len(others) > 5 else "")
        reporter.warn(f"left out, as there is no {SUFFIX} beside: {listed}")


def _report(path: Path, reporter: Reporter) -> Report | None:
    """A file that lies there and may be anything."""
    try:
        return _parsed(path)
    except UsageError as error:
        reporter.warn(f"left out: {error.where}: {error.message}")
        return None


def _parsed(path: Path) -> Report:
    where = escaped(str(path))
    try:
        if path.stat().st_size > _MAX_REPORT_BYTES:
            raise UsageError("too large for a report", where=where)
        return load_report(path.read_bytes(), where=where)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"no report: {type(error).__name__}", where=where) from error


def content(path: str, data: bytes, batch: str, *, derived: bool = False) -> Item:
    """A file that is held in memory."""
    return Item(path, data, len(data), hashlib.sha256(data).hexdigest(), batch, derived)


def items_of(found: Found, n_threads: int, reporter: Reporter) -> list[Item]:
    """The models, their records and the statistics, in the order of sending.

    What is read for the first time is verified against its record. Raises the first problem.
    """
    local = [path for model in found.models for path in model.files] + list(found.imatrices)
    for path in local:
        if not path.is_file():
            raise OutputError("is missing", where=escaped(str(path)))
    unknown = {path for path in local if known_sha256(path) is None}
    in_models = {path for model in found.models for path in model.files}
    n_bytes = sum(path.stat().st_size * (1 + (path in in_models)) for path in unknown)
    reporter.begin("verify", n_bytes, 0)
    try:
        items = []
        for model in found.models:
            if unknown.intersection(model.files):
                checked = verify(model.files[0], threads=n_threads, on_bytes=reporter.advance)
                if checked.problems:
                    raise checked.problems[0]
            items += _items_of(model, reporter)
        for path in found.imatrices:
            digest = sha256_of(path, reporter.advance)
            items.append(Item(path.name, path, path.stat().st_size, digest, SHARED))
    finally:
        reporter.end()
    reporter.stage("verify", f"{files(len(local))}, {size(sum(i.n_bytes for i in items))}")
    return sorted(items, key=lambda item: item.batch != SHARED)


def _items_of(model: LocalModel, reporter: Reporter) -> list[Item]:
    batch = SHARED if model.is_mmproj else model.label
    items = [
        Item(where, path, path.stat().st_size, sha256_of(path, reporter.advance), batch)
        for where, path in zip(model.paths, model.files, strict=True)
    ]
    record = (model.folder / f"{model.stem}{SUFFIX}").read_bytes()
    return [*items, content(model.manifest_path, record, batch)]
