"""Where files go in a repository, and what has to be done about each.

A sharded quant has a folder of its label, a single file lies at the root, as do the vision file
and the importance statistics. Measurements and the picture are in `evaluation/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from quantkit.container.names import shown
from quantkit.errors import OutputError
from quantkit.run.events import size

MAX_FILE_BYTES = 50_000_000_000  # the Hub's clients download no larger file over plain HTTP
README = "README.md"
CHART = "evaluation/kld.svg"
EVALUATION = "evaluation"


class State(StrEnum):
    """How a local file stands to the remote one of its path."""

    NEW = "new"
    SAME = "same"
    UPDATE = "update"  # made by quantkit from the rest, so it may be replaced
    DIFFERS = "differs"


@dataclass(frozen=True, slots=True)
class Item:
    """One file to be: `source` is a local file, or the content itself.

    `batch` names the commit that it belongs to. `derived` ones are made from the others.
    """

    path: str
    source: Path | bytes
    n_bytes: int
    sha256: str
    batch: str
    derived: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """An item and what is known of its path in the repository."""

    item: Item
    state: State


def path_in_repo(file: str, label: str, n_shards: int) -> str:
    """Where a file of a model with so many shards goes."""
    return f"{label}/{file}" if n_shards > 1 else file


def label_of(stem: str, recipe: str) -> str:
    """What tells a quant from the others of its model: the name of its recipe, if the stem ends so.

    `Kimi-K2.5-UD-TQ1_0` of recipe `UD-TQ1_0` is `UD-TQ1_0`.
    """
    return recipe if stem.endswith(f"-{recipe}") else stem


def check_items(items: Sequence[Item]) -> None:
    """Refuse files that the Hub would not take or not give back, and two for one path."""
    seen: dict[str, Item] = {}
    for item in items:
        folded = item.path.casefold()
        if folded in seen:
            raise OutputError(
                f"two files would be {shown(item.path)}",
                hint="publish models of the same name from different folders one by one",
            )
        seen[folded] = item
        if item.n_bytes >= MAX_FILE_BYTES:
            raise OutputError(
                f"{size(item.n_bytes)}, and the Hub serves files below {size(MAX_FILE_BYTES)}",
                where=shown(item.path),
                hint="convert again with --max-shard-size 49GB",
            )
        if not item.n_bytes:
            raise OutputError("is empty", where=shown(item.path))


def refuse_differing(steps: Sequence[Step], repo: str) -> None:
    """`OutputError` naming the remote files that would be overwritten."""
    bad = [shown(step.item.path) for step in steps if step.state is State.DIFFERS]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise OutputError(
            f"has other content under the same name: {', '.join(bad[:5])}{more}",
            where=repo,
            hint="look with --dry-run; replace them with --force, or choose another repository",
        )
