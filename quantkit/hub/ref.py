"""How a place on the Hub is written: `owner/name@revision/path`, with or without `hf://`.

The grammar is huggingface_hub's for models. What is there on disk goes before what may be on the
Hub: a path that exists, or whose first folder does, is a local path unless it begins with `hf://`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from quantkit.errors import UsageError

SCHEME = "hf://"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
# A branch named refs/pr/1 keeps its slashes; any other writes them as %2F.
_REVISION = r"refs/(?:pr|convert)/[^/@]+|[^/@]+"
_REF = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?(?:/(?P<path>.+))?")
_HINT = f"write {SCHEME}OWNER/NAME, {SCHEME}OWNER/NAME@REVISION or {SCHEME}OWNER/NAME/FILE.gguf"


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model repository, or a file in one. `revision` None is the default branch."""

    repo: str
    revision: str | None = None
    path: str | None = None

    def pinned_to(self, revision: str | None) -> HubRef:
        """With the revision of an option, which must not contradict its own."""
        if revision is None or revision == self.revision:
            return self
        if self.revision is not None:
            raise UsageError(f"and --revision {revision} exclude each other", where=str(self))
        return replace(self, revision=revision)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        path = f"/{self.path}" if self.path else ""
        return f"{SCHEME}{self.repo}{revision}{path}"


def parse_ref(text: str) -> HubRef | Path:
    """What `text` means: a place on the Hub, or a local path where it cannot be one.

    Raises `UsageError` for what begins with `hf://` and is no model repository.
    """
    is_uri = text.startswith(SCHEME)
    if not is_uri and _is_local(text):
        return Path(text)
    found = _REF.fullmatch(text.removeprefix(SCHEME).removeprefix("models/" if is_uri else ""))
    path = found["path"] if found else None
    if found and _is_sound(path):
        revision = found["revision"]
        return HubRef(found["repo"], unquote(revision) if revision else None, path)
    if is_uri:
        raise UsageError(
            "is no model repository nor a GGUF file in one", where=text[:200], hint=_HINT
        )
    return Path(text)


def _is_local(text: str) -> bool:
    first = text.partition("/")[0]
    return first in ("", ".", "..", "~") or Path(text).exists() or Path(first).is_dir()


def _is_sound(path: str | None) -> bool:
    """Nothing, or a GGUF file: of a checkpoint the repository is named."""
    if path is None:
        return True
    return path.endswith(".gguf") and all(p not in ("", ".", "..") for p in path.split("/"))
