"""Publishing the converted fixture to a Hub on this machine, through the real client."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from huggingface_hub import ModelCard, snapshot_download

from quantkit.errors import GgufError, HubError, OutputError, UsageError
from quantkit.pipeline.publication import Publication, Pusher, publish
from quantkit.publish.layout import State
from quantkit.publish.remote import Remote
from quantkit.run.events import Silent
from tests.oracles import llamacpp
from tests.publish.conftest import BASE, REPO, TOKEN, report_of

# The client's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def send(api, out):
    """send(**options) publishes the folder."""

    def send(*, dry_run=False, folder=out, repo=REPO, **options):
        job = Publication(folder, repo, **{"base": BASE, **options})
        return publish(job, Silent(), dry_run=dry_run, connect=lambda name: Remote(name, api))

    return send


def test_what_is_downloaded_is_what_was_converted_and_runs_in_llamacpp(send, hub, out, tmp_path):
    send()
    got = tmp_path / "got"
    snapshot_download(
        REPO, endpoint=hub.endpoint, token=TOKEN, local_dir=got, cache_dir=tmp_path / "c"
    )
    shards = sorted((got / "Q4_X").glob("*.gguf"))
    assert len(shards) == 4
    for path in (*shards, got / "Tiny-Q8_0.gguf", got / "Tiny.imatrix.gguf"):
        assert sha256(path) == sha256(out / path.name)
    assert sha256(got / "mmproj-Tiny-F16.gguf") == sha256(out / "mmproj-Tiny-F16.gguf")
    assert (got / "Q4_X" / "Tiny-Q4_X.manifest.json").is_file()
    assert llamacpp.logits(shards[0], [1, 2, 3]).shape[0] == 3


def test_a_commit_per_quant_in_a_private_repository_with_the_card_last(send, hub):
    send()
    repo = hub.repos[REPO]
    assert repo.private
    titles = [commit.title for commit in repo.commits[1:]]
    assert titles == [
        "Add vision and statistics", "Add Q4_X", "Add Q8_0", "Add measurements and card",
    ]  # fmt: skip
    assert all("README.md" not in commit.files for commit in repo.commits[:-1])


def test_a_second_time_sends_nothing_and_commits_nothing(send, hub):
    send()
    n_bytes, n_commits = hub.n_received(), len(hub.repos[REPO].commits)
    done = send()
    assert {step.state for step in done.steps} == {State.SAME}
    assert (hub.n_received(), len(hub.repos[REPO].commits)) == (n_bytes, n_commits)


def test_content_goes_once_also_in_parts(send, hub, out):
    hub.part_bytes = 1 << 20
    send()
    sent = sum(path.stat().st_size for path in out.glob("*.gguf"))
    assert hub.n_received() == sent


def test_a_dry_run_tells_all_and_changes_nothing(send, hub, out):
    done = send(dry_run=True)
    assert {step.state for step in done.steps} == {State.NEW}
    assert done.n_to_send > sum(path.stat().st_size for path in out.glob("*.gguf"))
    assert REPO not in hub.repos
    assert hub.n_received() == 0


def test_a_remote_file_that_differs_is_replaced_with_force_only(send, hub, out):
    send()
    hub.repos[REPO].commit({"Tiny-Q8_0.gguf": b"somebody else's"})
    n_commits = len(hub.repos[REPO].commits)
    assert State.DIFFERS in {step.state for step in send(dry_run=True).steps}
    with pytest.raises(OutputError, match=r"other content under the same name: Tiny-Q8_0\.gguf"):
        send()
    assert len(hub.repos[REPO].commits) == n_commits
    send(force=True)
    assert hub.repos[REPO].head.files["Tiny-Q8_0.gguf"].sha256 == sha256(out / "Tiny-Q8_0.gguf")


def test_a_damaged_file_is_not_sent(send, hub, out):
    path = out / "Tiny-Q8_0.gguf"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(GgufError, match="not what was written"):
        send()
    assert REPO not in hub.repos


def test_an_unfinished_conversion_is_not_published(send, out):
    (out / ".Tiny-Q8_0.journal").touch()
    with pytest.raises(OutputError, match="not finished"):
        send()


def test_a_folder_without_models_says_so(send, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no converted model"):
        send(folder=tmp_path / "empty")


def test_quants_of_one_repository_may_come_from_folders_at_different_times(send, hub, out, api):
    """The card tells of all of them, with the measurements that it knows."""
    first, second = out / "first", out / "second"
    for folder, stem in ((first, "Tiny-Q8_0"), (second, "Tiny-Q4_X")):
        folder.mkdir()
        for path in out.glob(f"{stem}[-.]*"):
            shutil.move(path, folder / path.name)
        shard = next(iter(sorted(folder.glob("*.gguf"))))
        (folder / "report.json").write_text(json.dumps(report_of(shard)))
    send(folder=first)
    send(folder=second)
    card = hub.repos[REPO].head.files["README.md"].read().decode()
    for label in ("Q8_0", "Q4_X"):
        row = next(line for line in card.splitlines() if line.startswith(f"| [`{label}`]"))
        assert "0.01000" in row
    assert "evaluation/kld.svg" in hub.repos[REPO].head.files


def test_the_card_alone_follows_a_new_measurement(send, hub, out):
    send()
    n_bytes = hub.n_received()
    report = report_of(out / "Tiny-Q8_0.gguf", out / "Tiny-Q4_X-00001-of-00004.gguf", kld=0.5)
    (out / "report.json").write_text(json.dumps(report))
    send(card="only")
    card = hub.repos[REPO].head.files["README.md"].read().decode()
    assert "0.5000" in card
    assert hub.n_received() == n_bytes


def test_without_a_card_there_is_none(send, hub):
    send(card="without")
    assert not {"README.md", "evaluation/kld.svg"} & set(hub.repos[REPO].head.files)


def test_nothing_of_this_machine_is_in_the_published_report(send, hub, out):
    send()
    files = hub.repos[REPO].head.files
    raw = next(blob.read() for path, blob in files.items() if path.startswith("evaluation/wiki"))
    assert b"somebody" not in raw
    assert str(out).encode() not in raw


def test_the_card_has_the_license_of_the_base_and_validates(send, hub):
    send()
    card = ModelCard(hub.repos[REPO].head.files["README.md"].read().decode())
    assert card.data.to_dict() | {"tags": None} == {
        "base_model": BASE,
        "base_model_relation": "quantized",
        "quantized_by": "me",
        "license": "other",
        "license_name": "modified-mit",
        "license_link": f"https://huggingface.co/{BASE}/blob/main/LICENSE",
        "language": ["en", "zh"],
        "library_name": "gguf",
        "pipeline_tag": "image-text-to-text",
        "tags": None,
    }
    assert {"gguf", "imatrix", "conversational"} <= set(card.data.tags)
    for heading in ("Which file", "Download", "Run", "Types by role", "How they were made"):
        assert f"\n## {heading}\n" in card.text


def test_the_repository_that_was_converted_is_the_base_model(send, hub, out):
    for path in out.glob("Tiny-Q*.manifest.json"):
        record = json.loads(path.read_text())
        record["source"]["name"] = f"{BASE}@{'c0ffee' * 6}c0ff"
        path.write_text(json.dumps(record))
    send(base=None)
    card = ModelCard(hub.repos[REPO].head.files["README.md"].read().decode())
    assert card.data.base_model == BASE
    assert card.data.license_name == "modified-mit"
    assert "c0ffee" in card.text


def test_what_a_human_has_written_into_the_card_stays(send, hub):
    send()
    repo = hub.repos[REPO]
    text = repo.head.files["README.md"].read().decode()
    text = text.replace("library_name: gguf", "library_name: mine\nthumbnail: me.png")
    text = text.replace("<!-- quantkit: generated from", "# Mine\n\n<!-- quantkit: generated from")
    repo.commit({"README.md": text.encode()})
    send(base="moonshotai/Another")
    after = repo.head.files["README.md"].read().decode()
    assert "# Mine" in after
    assert "moonshotai/Another" in after  # in the generated part
    assert ModelCard(after).data.library_name == "mine"


REFUSALS = {
    "no token": (None, REPO, UsageError, "needs a token"),
    "a token of nobody": ("hf_nobody", REPO, HubError, "does not accept the token"),
    "another's name": (TOKEN, "you/Tiny", HubError, "may not write"),
    "no name": (TOKEN, "Tiny", UsageError, "owner/name is meant"),
    "a path": (TOKEN, "me/../x", UsageError, "owner/name is meant"),
}


@pytest.mark.parametrize(("token", "repo", "kind", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_say_what_to_do(hub, out, api, monkeypatch, token, repo, kind, words):
    from huggingface_hub import HfApi

    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    client = HfApi(endpoint=hub.endpoint, token=token or False)
    with pytest.raises(kind, match=words) as told:
        publish(Publication(out, repo, BASE), Silent(), connect=lambda name: Remote(name, client))
    assert told.value.hint or kind is UsageError
    assert not token or token not in str(told.value)


def test_a_token_that_may_only_read_is_told(send, hub):
    hub.read_only.add("me")
    with pytest.raises(HubError, match="may not write here"):
        send()


def test_shards_pushed_while_they_are_made_are_not_sent_again(
    send, hub, api, out, tmp_path, monkeypatch
):
    from quantkit.pipeline import Job, Output, convert
    from quantkit.plan.build import Limits
    from tests.publish.conftest import FIXTURE

    folder = tmp_path / "pushed"
    warned = []
    reporter = Silent()
    monkeypatch.setattr(reporter, "warn", warned.append, raising=False)
    with Pusher(REPO, reporter, lambda name: Remote(name, api)) as pusher:
        job = Job(FIXTURE, "q4_x", Limits(6_000_000), name="Tiny")
        convert(job, Output(folder, 1, open_writer=pusher.writer), Silent())
    assert not warned
    pushed = hub.n_received()
    assert pushed == sum(path.stat().st_size for path in folder.glob("*.gguf"))
    assert len(hub.repos[REPO].commits) == 1  # nothing is named yet
    send(folder=folder)
    assert hub.n_received() == pushed
    files = hub.repos[REPO].head.files
    for path in folder.glob("Tiny-Q4_X*.gguf"):
        assert files[f"Q4_X/{path.name}"].sha256 == sha256(out / path.name)
