"""What a MODEL means: a local path, or a place on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.hub.ref import HubRef, parse_ref


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/kimi").mkdir(parents=True)
    (tmp_path / "moonshotai@v1").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("moonshotai/Kimi-K2.5", HubRef("moonshotai/Kimi-K2.5")),
        ("moonshotai/Kimi-K2.5@v1.0", HubRef("moonshotai/Kimi-K2.5", "v1.0")),
        ("hf://me/It", HubRef("me/It")),
        ("hf://models/me/It", HubRef("me/It")),
        ("hf://me/It@main", HubRef("me/It", "main")),
        ("hf://me/It@refs/pr/7", HubRef("me/It", "refs/pr/7")),
        ("hf://me/It@refs/pr/7/a.gguf", HubRef("me/It", "refs/pr/7", "a.gguf")),
        ("hf://me/It@a%2Fb", HubRef("me/It", "a/b")),
        ("me/It/Q4/it-00001-of-00002.gguf", HubRef("me/It", None, "Q4/it-00001-of-00002.gguf")),
        ("hf://models/models/kimi", HubRef("models/kimi")),
        ("models/kimi", Path("models/kimi")),
        ("models/kimmi", Path("models/kimmi")),  # a slip of the pen is no question to the Hub
        ("./me/It", Path("me/It")),
        ("/me/It", Path("/me/It")),
        ("out.gguf", Path("out.gguf")),
        ("me/It/config.json", Path("me/It/config.json")),
        ("me/It/../x.gguf", Path("me/It/../x.gguf")),
        ("me//x.gguf", Path("me/x.gguf")),
    ],
)
def test_local_paths_go_before_places_on_the_hub(text: str, means: HubRef | Path) -> None:
    assert parse_ref(text) == means


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://me", "hf://datasets/me/It", "hf://me/It/", "hf://me/It/../x.gguf", "hf://me/It@",
     "hf://me/It/x.safetensors", "hf://../It", "hf://me/It\n", "hf://me/%2e%2e"],
)  # fmt: skip
def test_what_begins_with_hf_must_be_a_model(text: str) -> None:
    with pytest.raises(UsageError, match="is no model repository"):
        parse_ref(text)


def test_a_revision_is_given_once() -> None:
    assert HubRef("me/It").pinned_to("v1") == HubRef("me/It", "v1")
    assert HubRef("me/It", "v1").pinned_to("v1") == HubRef("me/It", "v1")
    with pytest.raises(UsageError, match="exclude each other"):
        HubRef("me/It", "v1").pinned_to("v2")
