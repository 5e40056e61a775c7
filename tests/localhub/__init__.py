"""A small Hugging Face Hub on 127.0.0.1, for the real `huggingface_hub` client to talk to.

    with LocalHub() as hub:
        hub.add_repo("me/model", folder)          # a folder or {path: bytes}
        HfApi(endpoint=hub.endpoint).model_info("me/model")
        subprocess.run([...], env=hub.env(home))  # HF_ENDPOINT, HF_HOME, no Xet, no telemetry

`huggingface_hub` reads HF_ENDPOINT when it is imported: pass `endpoint=` in this process, or run
the client in a subprocess with `hub.env(...)`.

More endpoints: subclass `HubHandler` (and `CdnHandler`, what signed URLs lead to), mark methods
with `@route("POST", r"/api/...(?P<name>...)")`, whose groups arrive as keyword arguments, and start
the hub with `LocalHub(HubHandler=..., CdnHandler=...)`. In a method: `self.hub`, `self.query`,
`self.json_body()`, `self.body()`, `self.user()`, `self.repo(name)` (checks who may see it),
`self.send_json(...)`, `self.fail(status, code, message)`, `self.sign(path)` for a URL at the CDN.
A repo takes new content by `repo.commit({path: Blob | None}, title)`; `hub.blobs` holds every blob
by sha256.
"""

from tests.localhub.faults import Fault, Faults
from tests.localhub.handler import CdnHandler, HubHandler, route
from tests.localhub.hub import LocalHub, Logged
from tests.localhub.repos import Blob, Commit, Repo

__all__ = [
    "Blob",
    "CdnHandler",
    "Commit",
    "Fault",
    "Faults",
    "HubHandler",
    "LocalHub",
    "Logged",
    "Repo",
    "route",
]
