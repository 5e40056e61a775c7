"""What files, figures and numbers are called in a report."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

from quantkit.container.names import parse_shard_file_name
from quantkit.evaluate.svg import tick_label

_NAMES = {
    "n_tokens": "scored tokens",
    "ppl": "PPL",
    "ppl_base": "PPL of the base",
    "ln_ppl_cor": "correlation of ln PPL, %",
    "ln_ppl_ratio": "mean ln of PPL / PPL of the base",
    "ppl_ratio": "PPL / PPL of the base",
    "ppl_diff": "PPL - PPL of the base",
    "kld": "KLD",
    "dp": "Δp, %",
    "rms_dp": "RMS Δp, %",
    "same_top_p": "same top token, %",
}
_PARTS = {"mean": "mean", "median": "median", "min": "smallest", "max": "largest"}
_PARTS |= {f"p{k}".replace(".", "_"): f"{k} %" for k in (0.1, 1, 5, 10, 25, 75, 90, 95, 99, 99.9)}
_ENDINGS = {"_error": ", standard error", "_ci": ", 95 % interval"}
_BINARY = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def short_names(paths: Sequence[str]) -> list[str]:
    """Short names for files: no folder, no shard number, no beginning that all of them share."""
    files = [path.replace("\\", "/").rsplit("/", 1)[-1] for path in paths]
    stems = []
    for path, file in zip(paths, files, strict=True):
        shard = parse_shard_file_name(file)
        stems.append((shard[0] if shard else file.removesuffix(".gguf")) or path or "?")
    parts = [stem.split("-") for stem in stems]
    if len(parts) > 1:
        while all(len(part) > 1 and part[0] == parts[0][0] for part in parts):
            parts = [part[1:] for part in parts]
    stems = ["-".join(part) for part in parts]
    return [
        stem if stems.count(stem) == 1 else f"{stem} ({stems[: k + 1].count(stem)})"
        for k, stem in enumerate(stems)
    ]


def number(value: float | None, digits: int = 4) -> str:
    """A figure for people with significant digits: 18.21, 0.07200, 1,234, 7.2·10⁻⁹, – for none."""
    if value is None:
        return "–"
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    decade = floor(log10(abs(value)))
    if not -7 < decade < 15:
        return tick_label(value)
    return f"{value:,.{max(0, digits - 1 - decade)}f}"


def figure_name(key: str) -> str:
    """What a summary's key is called: `kld_p99_9` is 99.9 % KLD; an unknown one is itself."""
    stem = next((key.removesuffix(end) for end in _ENDINGS if key.endswith(end)), key)
    ending = _ENDINGS.get(key[len(stem) :], "")
    what, _, part = stem.partition("_")
    if what == "mean":
        what, part = part, what
    if what in ("kld", "dp") and part in _PARTS:
        return f"{_PARTS[part]} {_NAMES[what]}{ending}"
    return _NAMES[stem] + ending if stem in _NAMES else key


def binary_size(n_bytes: int) -> str:
    """Bytes in powers of 1024: 357.08 GiB."""
    unit, scale = next((u for u in _BINARY if n_bytes >= u[1]), ("bytes", 1))
    return f"{n_bytes / scale:,.2f} {unit}" if scale > 1 else f"{n_bytes} bytes"
