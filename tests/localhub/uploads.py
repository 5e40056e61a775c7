"""The local Hub's writing side: repositories, LFS uploads in one piece or in parts, and commits.

    with UploadHub() as hub:
        hub.add_user("me", "hf_token")

Owners may write to repositories below their own name, members to theirs.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections import defaultdict
from typing import Any

import yaml

from tests.localhub.handler import REPO, CdnHandler, HubHandler, Refused, route
from tests.localhub.hub import LocalHub
from tests.localhub.repos import LFS_BYTES, LFS_SUFFIXES, Blob, Repo

_MODELS = rf"/api/models/{REPO}"


class UploadHub(LocalHub):
    """A local Hub that can be written to.

    `received` are the bytes of content that came for each sha256, also of uploads that broke off.
    `read_only` are users whose tokens may not write. A file above `part_bytes` goes in parts.
    Upload number `hold_at` (from 1) is received but not kept: `held` is set, and it waits for
    `go_on`. With `loses_answer` the next commit is made, and its answer lost.
    """

    def __init__(self) -> None:
        super().__init__(UploadHandler, StoreHandler)
        self.received: defaultdict[str, int] = defaultdict(int)
        self.read_only: set[str] = set()
        self.part_bytes = 5 << 20
        self.parts: dict[tuple[str, int], bytes] = {}
        self.n_uploads = 0
        self.hold_at: int | None = None
        self.held, self.go_on = threading.Event(), threading.Event()
        self.loses_answer = False

    def n_received(self) -> int:
        """Bytes of content that came in all."""
        return sum(self.received.values())


class UploadHandler(HubHandler):
    """Everything that `create_repo`, `preupload_lfs_files` and `create_commit` ask for."""

    def _dispatch(self) -> None:
        self.body()  # also of what is refused: the next request follows it
        super()._dispatch()

    def writable(self, name: str) -> Repo:
        """A repository that the asker may write to."""
        user, repo = self.user(), self.repo(name)
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        owns = name.partition("/")[0] == user or user in repo.members
        if not owns or user in self.hub.read_only:
            raise Refused(403, "", "you don't have write access to this repository")
        return repo

    @route("POST", r"/api/repos/create")
    def create(self) -> None:
        asked, user = self.json_body(), self.user()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user or user in self.hub.read_only:
            raise Refused(403, "", f'You don\'t have the rights to create a model under "{owner}"')
        if name in self.hub.repos:
            raise Refused(409, "", "You already created this model repo")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repo = Repo(name, private=private, members={user})
        repo.commit({".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n"}, "initial")
        self.hub.repos[name] = repo
        self.send_json({"url": f"{self.hub.endpoint}/{name}", "id": "0", "name": name})

    @route("POST", r"/api/validate-yaml")
    def validate(self) -> None:
        found = re.match(r"\s*---\n(.*?)\n---", self.json_body()["content"], re.DOTALL)
        data = yaml.safe_load(found[1]) if found else None
        errors = []
        if not isinstance(data, dict) or not data:
            errors.append({"message": "no metadata"})
        elif data.get("license") == "other" and not data.get("license_name"):
            errors.append({"message": '"license_name" is required'})
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    @route("POST", _MODELS + r"/preupload/(?P<revision>[^/]+)")
    def preupload(self, name: str, revision: str) -> None:
        commit = self.writable(name).at(revision)
        self.send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": _mode(file["path"], file["size"]),
                        "shouldIgnore": False,
                        "oid": commit.files[file["path"]].etag
                        if file["path"] in commit.files
                        else None,
                    }
                    for file in self.json_body()["files"]
                ]
            }
        )

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def batch(self, name: str) -> None:
        self.writable(name)
        objects = []
        for asked in self.json_body()["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if self.hub.blob(asked["oid"]) is None:
                answer["actions"] = self._actions(name, asked["oid"], asked["size"])
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def _actions(self, name: str, oid: str, size: int) -> dict[str, Any]:
        part = self.hub.part_bytes
        verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/objects/verify"}
        if size <= part:
            return {"upload": {"href": self.hub.sign(f"/store/{oid}")}, "verify": verify}
        parts = range(1, -(-size // part) + 1)
        header = {str(k): self.hub.sign(f"/store/{oid}/{k}") for k in parts}
        href = f"{self.hub.endpoint}/api/complete_multipart?oid={oid}"
        header["chunk_size"] = str(part)
        return {"upload": {"href": href, "header": header}, "verify": verify}

    @route("POST", r"/api/complete_multipart")
    def complete(self) -> None:
        oid, asked = self.query["oid"], self.json_body()
        parts = [self.hub.parts.pop((oid, part["partNumber"])) for part in asked["parts"]]
        _store(self.hub, oid, b"".join(parts))
        self.send_json({})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
    def verify(self, name: str) -> None:
        asked = self.json_body()
        blob = self.hub.blob(asked["oid"])
        if blob is None or blob.size != asked["size"]:
            raise Refused(404, "", "no such object")
        self.send_json({})

    @route("POST", _MODELS + r"/commit/(?P<revision>[^/]+)")
    def commit(self, name: str, revision: str) -> None:
        repo = self.writable(name)
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.head.sha):
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        changes = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                blob = self.hub.blob(value["oid"])
                if blob is None:
                    raise Refused(400, "", f"LFS pointer of {value['path']} to an unknown object")
                changes[value["path"]] = blob
        made = repo.commit(changes, header["summary"])
        if self.hub.loses_answer:
            self.hub.loses_answer = False
            self.reset()
            return
        url = f"{self.hub.endpoint}/{name}/commit/{made.sha}"
        self.send_json({"success": True, "commitOid": made.sha, "commitUrl": url})


class StoreHandler(CdnHandler):
    """Signed URLs that take content."""

    @route("PUT", r"/store/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?")
    def put(self, oid: str, part: str | None = None) -> None:
        if not self.hub.is_signed(self.url_path, self.query):
            raise Refused(403, "", "the URL has expired")
        try:
            data = self.body()
        finally:
            with self.hub.lock:
                self.hub.received[oid] += self.logged.n_received
                self.hub.n_uploads += 1
                held = self.hub.n_uploads == self.hub.hold_at
        if held:
            self.hub.held.set()
            self.hub.go_on.wait(60)
            raise ConnectionError("the client has gone")
        if part is None:
            _store(self.hub, oid, data)
        else:
            self.hub.parts[oid, int(part)] = data
        self.send_json({}, 200, {"ETag": f'"{oid[:16]}-{part}"'})


def _mode(path: str, size: int) -> str:
    return "lfs" if path.endswith(LFS_SUFFIXES) or size > LFS_BYTES else "regular"


def _store(hub: Any, oid: str, data: bytes) -> None:
    """Keep content whose digest is what was announced, as the real store does."""
    blob = Blob(data, is_lfs=True)
    if blob.sha256 != oid:
        raise Refused(400, "", "content does not match its digest")
    hub.blobs[oid] = blob
