"""One line of what the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`value` is what was found, `hint` what to do about it.

    A failure would make the job fail; it carries the exit code that the job would have.
    """

    topic: str
    value: str
    level: Level = "ok"
    hint: str = ""
    exit_code: int = 0
