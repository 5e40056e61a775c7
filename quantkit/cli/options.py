"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from quantkit.types import GgmlType

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """A size in bytes: 49GB, 1.5GiB, or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    unit = found and ({**_UNITS, **_BINARY}.get(found[2]))
    if not found or not unit:
        raise click.BadParameter(f"{text!r} is not a size such as 49GB, 1.5GiB or 1000000")
    return int(float(found[1]) * unit)


def job_options(command: F) -> F:
    """MODEL and everything that decides what the files will be."""
    for option in reversed(
        (
            click.argument("model", type=click.Path(path_type=Path)),
            click.option(
                "-r", "--recipe", required=True, help="A shipped recipe's name, or a .yaml file."
            ),
            click.option("--name", help="Stem of the file names; default: the model's own name."),
            click.option(
                "--mmproj",
                type=click.Choice(["f16", "bf16", "f32", "none"]),
                default="f16",
                show_default=True,
                help="Type of the vision file, where the model has a vision tower.",
            ),
            click.option(
                "--max-shard-size",
                type=parse_size,
                metavar="SIZE",
                default="49GB",
                show_default=True,
                help="Upper bound of a file's size; the Hub takes files below 50 GB.",
            ),
            click.option("--max-shard-tensors", type=click.IntRange(min=1), hidden=True),
        )
    ):
        command = option(command)
    return command


def mmproj_type(name: str) -> GgmlType | None:
    """The type behind `--mmproj`."""
    return None if name == "none" else GgmlType[name.upper()]


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
