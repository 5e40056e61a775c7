"""sha256 of whole files, computed once: what the Hub knows a file by.

They are kept in a hidden file of the folder, with size, time and inode of what was read, and
forgotten when one of these has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError
from quantkit.run import fs

CACHE = ".quantkit-sha256.json"
_READ_BYTES = 4 << 20
_MAX_CACHE_BYTES = 16 << 20

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp:
    """Size, modification time in ns and inode: changed when the file is."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def known_sha256(path: Path) -> str | None:
    """The digest that is kept of this file as it is now."""
    entry = _load(path.parent).get(path.name)
    if not isinstance(entry, dict) or entry.get("stamp") != list(stamp(path)):
        return None
    digest = entry.get("sha256")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def sha256_of(
    path: Path, on_bytes: Callable[[int], None] = lambda n: None, *, keep: bool = True
) -> str:
    """The file's digest in hex, from what is kept, or by reading it; then it is kept.

    `on_bytes` hears of bytes as they are read. `OutputError` for a file that changes meanwhile.
    """
    if (known := known_sha256(path)) is not None:
        return known
    before = stamp(path)
    digest, buffer = hashlib.sha256(), bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
            on_bytes(n)
    if stamp(path) != before:
        raise OutputError("changed while it was read", where=str(path), hint="publish it later")
    if keep:
        entry = {"stamp": list(before), "sha256": digest.hexdigest()}
        text = json.dumps(_load(path.parent) | {path.name: entry}, indent=1, sort_keys=True)
        if os.access(path.parent, os.W_OK):
            fs.write_whole(path.parent / CACHE, text.encode() + b"\n")
    return digest.hexdigest()


def git_oid(data: bytes) -> str:
    """Git's id of a small file: what the Hub knows one by that is not in large file storage."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _load(folder: Path) -> dict[str, Any]:
    path = folder / CACHE
    try:
        if path.stat().st_size > _MAX_CACHE_BYTES:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
