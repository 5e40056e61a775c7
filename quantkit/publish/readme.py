"""README.md: the generated card, and what a human has written around it.

Between two comments lies what quantkit writes; the first holds the digest of it, so that an edit
in there is noticed. What is outside is a human's and stays, and so does every key of a front
matter that is there.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.errors import OutputError
from quantkit.publish.front import FRONT

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_BEGIN = "<!-- quantkit: generated from here, sha256 {} -->"
_END = "<!-- quantkit: generated up to here -->"
_PART = re.compile(
    re.escape(_BEGIN).replace(r"\{\}", "([0-9a-f]{64})") + "\n\n(.*)\n\n" + re.escape(_END),
    re.DOTALL,
)


def readme(data: ModelCardData, body: str, existing: str | None, *, force: bool) -> str:
    """The whole file: `body` below the front matter, or in its place in the `existing` file.

    A front matter's keys that exist stay as they are, the missing ones are added. `OutputError`
    where a human has changed the generated part, or where there is a text without one, unless
    `force`: then the part is replaced, or put below the text. No text outside it is ever removed.
    """
    part = _part(body)
    old = (existing or "").replace("\r\n", "\n")
    found = FRONT.match(old)
    rest = old[found.end() :] if found else old
    front = _merged(data, found[1] if found else "")
    return f"---\n{front}\n---\n{_placed(part, rest, force=force)}"


def _part(body: str) -> str:
    inside = body.strip("\n").replace("<!-- quantkit:", "<!- - quantkit:")
    return f"{_BEGIN.format(_digest(inside))}\n\n{inside}\n\n{_END}"


def _placed(part: str, rest: str, *, force: bool) -> str:
    found = _PART.search(rest)
    if found:
        if _digest(found[2]) != found[1] and not force:
            raise OutputError(
                "its generated part has been edited",
                where="README.md",
                hint="move the edit above or below the comments that enclose that part, where it "
                "stays; or replace it with --force, or leave the card alone with --no-card",
            )
        return rest[: found.start()] + part + rest[found.end() :]
    if rest.strip() and not force:
        raise OutputError(
            "is there and was not made by quantkit",
            where="README.md",
            hint="--force puts the generated card below its text; --no-card leaves it alone",
        )
    return f"{rest.rstrip()}\n\n{part}\n" if rest.strip() else f"\n{part}\n"


def _merged(data: ModelCardData, old: str) -> str:
    """The front matter's text; the old text itself where nothing is missing in it."""
    try:
        kept = yaml.safe_load(old) or {}
    except yaml.YAMLError:
        kept = None
    if not isinstance(kept, dict):
        raise OutputError(
            "its front matter is no YAML of keys and values",
            where="README.md",
            hint="mend it on the Hub, or leave the card alone with --no-card",
        )
    new: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    missing = {key: value for key, value in new.items() if key not in kept}
    tags = kept.get("tags")
    if isinstance(tags, list) and (more := [tag for tag in new["tags"] if tag not in tags]):
        missing["tags"] = [*tags, *more]
    if not missing:
        return old
    return yaml.safe_dump(kept | missing, sort_keys=False, allow_unicode=True).strip()


def _digest(inside: str) -> str:
    return hashlib.sha256(inside.encode()).hexdigest()
