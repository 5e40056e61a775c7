"""GGUF files on the Hub: looked at by their headers, run and converted by range."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from quantkit.cli import cli
from quantkit.container.reader import read_gguf
from quantkit.container.shardset import open_shards
from quantkit.errors import GgufError, HubError, UsageError
from quantkit.forward.weights import GgufWeights
from quantkit.hub.folder import HubFile
from quantkit.hub.ref import parse_ref
from quantkit.hub.session import HubSession
from quantkit.pipeline import Job, Output, convert
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from tests.container.hostile import HOSTILE
from tests.hub.conftest import FIXTURE, MODEL, QUICK
from tests.localhub import LocalHub

REPO = "me/tiny-GGUF"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture as a set of shards, with its vision file."""
    folder = tmp_path_factory.mktemp("shards")
    convert(Job(FIXTURE, "q8_0", Limits(8_000_000)), Output(folder, 1), Silent())
    return folder


@pytest.fixture
def files(hub: LocalHub, shards: Path) -> list[str]:
    """A repository as quantisers lay it out; the paths of its shards."""
    paths = sorted(path.name for path in shards.glob("Tiny*.gguf"))
    contents = {f"Q8_0/{name}": shards / name for name in paths}
    contents["mmproj.gguf"] = next(iter(shards.glob("mmproj*.gguf")))
    hub.add_repo(REPO, contents)
    return [f"Q8_0/{name}" for name in paths]


def quantkit(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_inspect_reads_the_headers_of_all_shards_and_no_tensor(
    hub: LocalHub, files: list[str], shards: Path
) -> None:
    assert len(files) > 2
    there = json.loads(quantkit("inspect", "--json", f"{REPO}/{files[1]}"))
    here = json.loads(quantkit("inspect", "--json", shards / Path(files[1]).name))
    assert there == here
    total = sum((shards / Path(path).name).stat().st_size for path in files)
    assert hub.n_content_bytes() <= min(total, len(files) << 20)


def test_inspect_lists_the_files_where_none_is_named(files: list[str]) -> None:
    with pytest.raises(UsageError, match="which file of the repository") as caught:
        quantkit("inspect", REPO)
    assert f"{REPO}/{files[0]}" in caught.value.hint
    assert files[1] not in caught.value.hint, "a set is named by its first shard"
    assert f"{REPO}/mmproj.gguf" in caught.value.hint
    with pytest.raises(HubError, match=r"has no file 'Q4/x\.gguf'") as missing:
        quantkit("inspect", f"{REPO}/Q4/x.gguf")
    assert files[0] in missing.value.hint


def test_guide_tells_how_to_download_and_run_it(hub: LocalHub, files: list[str]) -> None:
    text = quantkit("guide", f"{REPO}/{files[0]}", "--vram", "24GB", "--ram", "64GB")
    assert f"hf download {REPO}" in text
    assert f"--model {files[0]}" in text, "where that download puts it"
    assert "--mmproj mmproj.gguf" in text
    assert hub.n_content_bytes() <= len(files) << 20


def test_plan_and_guide_of_a_checkpoint_are_those_of_its_folder(hub: LocalHub) -> None:
    hub.add_repo(MODEL, FIXTURE)
    plan = ("-r", "iq2_xs", "--json")
    there = json.loads(quantkit("plan", MODEL, *plan))
    here = json.loads(quantkit("plan", FIXTURE, *plan))
    for file in there["files"] + here["files"]:
        file.pop("digest", None)  # of the source's state, which is another
    assert there == here
    machine = ("--vram", "0", "--ram", "64GB", "--json")
    assert quantkit("guide", MODEL, *machine) == quantkit("guide", FIXTURE, *machine)
    assert hub.n_content_bytes() < 3e6


def test_tensors_are_read_by_range_and_are_the_same(
    hub: LocalHub, files: list[str], shards: Path, tmp_path: Path
) -> None:
    local = GgufWeights(open_shards(shards / Path(files[0]).name))
    with HubSession(Silent(), tmp_path, spool=4_000_000, patience=QUICK) as session:
        remote = GgufWeights(open_shards(session.file(parse_ref(f"{REPO}/{files[0]}"))))
        for name in ("blk.1.ffn_gate_exps.weight", "output_norm.weight", "token_embd.weight"):
            n_rows = min(8, int(np.prod(local.shape(name)[:-1])))
            assert (remote.read(name, 0, n_rows) == local.read(name, 0, n_rows)).all()
        remote.close()
    local.close()


def test_a_gguf_on_the_hub_is_converted_as_a_local_one(
    hub: LocalHub, files: list[str], shards: Path, tmp_path: Path
) -> None:
    convert(Job(shards / Path(files[0]).name, "q4_0"), Output(tmp_path / "a", 1), Silent())
    with HubSession(Silent(), tmp_path / "b", patience=QUICK) as session:
        place = session.at(parse_ref(f"{REPO}/{files[0]}"))
        convert(Job(place, "q4_0"), Output(tmp_path / "b", 1), Silent())
    (one,), (other,) = (tmp_path / "a").glob("*.gguf"), (tmp_path / "b").glob("*.gguf")
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_a_shard_that_the_repository_lacks_is_missed(
    hub: LocalHub, files: list[str], tmp_path: Path
) -> None:
    del hub.repos[REPO].head.files[files[1]]
    with (
        HubSession(Silent(), tmp_path, patience=QUICK) as session,
        pytest.raises(GgufError, match=r"1 of .* shards are missing"),
    ):
        open_shards(session.file(parse_ref(f"{REPO}/{files[0]}")))


def test_a_hostile_header_is_refused_as_a_local_one_is(hub: LocalHub, tmp_path: Path) -> None:
    contents = {f"{number:03}.gguf": data for number, (data, _) in enumerate(HOSTILE.values())}
    hub.add_repo(REPO, contents)
    with HubSession(Silent(), tmp_path, patience=QUICK) as session:
        for name, data in contents.items():
            path = tmp_path / name
            path.write_bytes(data)
            with pytest.raises(GgufError) as local:
                read_gguf(path)
            remote = session.file(parse_ref(f"hf://{REPO}/{name}"))
            assert isinstance(remote, HubFile)
            with pytest.raises(GgufError) as caught:
                read_gguf(remote)
            assert caught.value.message == local.value.message
