"""Files of a commit as the Hub's API lists them."""

from __future__ import annotations

from typing import Any

from tests.localhub.repos import Blob, Commit


def as_sibling(blob: Blob) -> dict[str, Any]:
    lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return {"size": blob.size, "blobId": blob.git_oid} | ({"lfs": lfs} if blob.is_lfs else {})


def as_entry(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    entry = {"type": "file", "oid": blob.git_oid, "size": blob.size, "path": path}
    return entry | ({"lfs": lfs} if blob.is_lfs else {})


def tree_of(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries below a folder, as the Hub lists them: folders among files, sorted by path."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in commit.files.items():
        if not path.startswith(prefix):
            continue
        parents = path[len(prefix) :].split("/")[:-1]
        for depth in (
            range(1, len(parents) + 1) if recursive else range(1, min(2, len(parents) + 1))
        ):
            parent = prefix + "/".join(parents[:depth])
            entries[parent] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": parent}
        if recursive or not parents:
            entries[path] = as_entry(path, blob)
    return [entries[path] for path in sorted(entries)]
