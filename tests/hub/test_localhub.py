"""The local Hub itself, as the plain client sees it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tests.localhub import LocalHub

FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 400,
    "Q4/model-00001-of-00002.gguf": b"GGUF" * 9,
    "Q4/model-00002-of-00002.gguf": b"gguf" * 7,
}


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


def test_the_client_lists_a_repo_over_several_pages(hub: LocalHub) -> None:
    repo = hub.add_repo("me/model", FILES)
    hub.page = 2
    api = HfApi(endpoint=hub.endpoint, token=False)
    assert api.model_info("me/model").sha == repo.head.sha
    listed = {
        item.path: item
        for item in api.list_repo_tree("me/model", recursive=True, revision=repo.head.sha)
    }
    assert listed.keys() == {*FILES, "Q4"}
    assert listed["model.safetensors"].lfs.sha256 == repo.head.files["model.safetensors"].sha256
    assert listed["config.json"].lfs is None
    (info,) = api.get_paths_info("me/model", ["config.json", "nowhere"])
    assert info.size == 2


def test_snapshot_download_gets_the_same_bytes(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("me/model", FILES, gated=True, members={"me"})
    hub.add_user("me", "hf_canary")
    code = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "me/model"],
        env=hub.env(tmp_path / "home", "hf_canary"),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    for path, content in FILES.items():
        assert (folder / path).read_bytes() == content
    assert all(entry.authorization is None for entry in hub.log if entry.server == "cdn")
    assert hub.n_content_bytes() == sum(map(len, FILES.values()))


def test_who_may_not_see_a_file_is_told_so(hub: LocalHub) -> None:
    hub.add_repo("me/gated", FILES, gated=True)
    hub.add_repo("me/private", FILES, private=True)
    hub.add_user("you", "hf_you")
    for token in (False, "hf_you"):
        api = HfApi(endpoint=hub.endpoint, token=token)
        assert api.model_info("me/gated").gated == "manual"
        with pytest.raises(GatedRepoError):
            api.get_hf_file_metadata(url=f"{hub.endpoint}/me/gated/resolve/main/config.json")
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("me/private")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/gated", revision="v2")
