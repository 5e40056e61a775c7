"""`quantkit guide` on files: a checkpoint and what was made of it get the same answer."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.cli import main
from quantkit.container.kv import f32, string
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.errors import GgufError, QuantkitError, UsageError
from quantkit.guide.memory import Machine
from quantkit.pipeline import Job, Output, convert, planned
from quantkit.pipeline.guide import Question, guide, model_of_plan
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from quantkit.types import GgmlType
from tests.guide.builders import LLAMA_8B, dense

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
MACHINE = Machine(24 * 10**9, 64 * 10**9)
JOB = Job(FIXTURE, "q4_x", Limits(9_000_000))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    convert(JOB, Output(folder, 1), Silent())
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """Run `quantkit guide` as its entry point does, in this process."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantkit", "guide", *arguments])
        monkeypatch.setattr("signal.signal", lambda number, handler: None)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))


def test_a_file_says_what_its_plan_said(converted):
    with planned(JOB, Silent()) as (_, decided):
        wanted = model_of_plan(decided)
    files = shards_in(converted)
    assert len(files) > 1
    for named in (files[0], files[-1]):
        seen = guide(Question(named, MACHINE)).model
        assert [Path(file).name for file in seen.files] == list(wanted.files)
        assert seen.mmproj == (str(converted / wanted.mmproj[0]), wanted.mmproj[1])
        assert replace(seen, files=wanted.files, mmproj=wanted.mmproj) == wanted


def test_sampling_of_both_modes_comes_from_the_recipe(converted):
    for path, recipe in ((FIXTURE, "q4_x"), (shards_in(converted)[0], None)):
        thinking, instant = guide(Question(path, MACHINE, recipe)).modes
        assert thinking.sampling == {"temp": 1.0, "top_p": 0.95, "min_p": 0.01}
        assert instant.sampling == {"temp": 0.6, "top_p": 0.95, "min_p": 0.01}
        assert (thinking.kwargs, instant.kwargs) == ({"thinking": True}, {"thinking": False})


def test_kimi_k2_5_is_sampled_as_its_makers_say_where_a_recipe_is_silent():
    answer = guide(Question(FIXTURE, MACHINE, "ud-iq1_s"))
    assert [mode.sampling["temp"] for mode in answer.modes] == [1.0, 0.6]


def test_without_a_recipe_the_best_that_fits_is_taken():
    answer = guide(Question(FIXTURE, MACHINE))
    assert answer.best is not None
    assert answer.model.name == f"Tiny-Kimi-K2.5-{answer.best.upper()}"
    largest = max((r for r in answer.ladder if not r.wasteful), key=lambda r: r.n_bytes)
    assert answer.best == largest.recipe


def test_where_nothing_fits_the_smallest_is_taken():
    answer = guide(Question(FIXTURE, Machine(0, 1000)))
    assert answer.best is None
    assert answer.fit.place == "nowhere"
    assert answer.model.n_bytes <= min(rung.n_bytes for rung in answer.ladder) + 4096


def test_advice_of_the_checkpoint_and_of_its_file_are_in_the_command_lines(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(FIXTURE, source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["rope_scaling"]["beta_fast"] = 1.0
    (source / "config.json").chmod(0o644)
    (source / "config.json").write_text(json.dumps(config))
    convert(Job(source, "q4_x", mmproj=None), Output(tmp_path / "out", 1), Silent())
    file = guide(Question(shards_in(tmp_path / "out")[0], MACHINE))
    checkpoint = guide(Question(source, MACHINE, "q4_x"))
    for answer in (file, checkpoint):
        assert [tip.flag for tip in answer.model.tips] == ["--yarn-beta-fast 1"]
        runs = [c.argv for c in answer.commands if c.argv[:1] in (["llama-server"], ["llama-cli"])]
        assert len(runs) >= 3
        assert all(argv[argv.index("--yarn-beta-fast") + 1] == "1" for argv in runs)
        assert any(note.startswith("--yarn-beta-fast 1:") for note in answer.notes)


def test_a_damaged_record_beside_a_file_is_told_and_not_used(converted, tmp_path):
    for path in converted.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    (record,) = [p for p in tmp_path.glob("*.json") if not p.name.startswith("mmproj")]
    record.write_text("{")
    answer = guide(Question(shards_in(tmp_path)[0], MACHINE))
    assert any("record" in note for note in answer.notes)


def test_the_vision_file_is_the_one_of_the_models_name(converted, tmp_path):
    for path in shards_in(converted):
        shutil.copy(path, tmp_path / path.name)
    first = shards_in(tmp_path)[0]
    assert guide(Question(first, MACHINE)).model.mmproj is None
    (tmp_path / "mmproj-Other-F16.gguf").write_bytes(b"12345")
    assert guide(Question(first, MACHINE)).model.mmproj == (
        str(tmp_path / "mmproj-Other-F16.gguf"),
        5,
    )
    (tmp_path / "mmproj-Third-F16.gguf").write_bytes(b"1")
    assert guide(Question(first, MACHINE)).model.mmproj is None
    (tmp_path / "mmproj-Tiny-Kimi-K2.5-F16.gguf").write_bytes(b"123")
    assert guide(Question(first, MACHINE)).model.mmproj[1] == 3


def dense_gguf(folder: Path, **kvs) -> Path:
    described = dense(LLAMA_8B | {"num_hidden_layers": 2})
    tensors = [
        TensorEntry(t.name, t.shape, GgmlType.Q8_0 if t.keep is None else t.keep)
        for t in described.tensors
    ]
    everything = {"general.architecture": string("llama"), **described.kvs, **kvs}
    (shard,) = lay_out("m", everything, tensors, max_shard_bytes=None, max_shard_tensors=None)
    path = folder / "m.gguf"
    with path.open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.n_bytes)
    return path


def test_a_foreign_dense_file_is_understood(tmp_path):
    path = dense_gguf(tmp_path, **{"general.sampling.temp": f32(0.7)})
    answer = guide(Question(path, MACHINE))
    assert answer.fit.place == "vram"
    assert answer.fit.vram.cache == 98_304 * 2 * 2 * 8 * 128 * 2
    assert [mode.sampling for mode in answer.modes] == [{"temp": 0.7}]
    assert not answer.ladder


@pytest.mark.parametrize("kind", ["mmproj", "imatrix", "adapter"])
def test_files_that_are_no_model_are_refused(kind, tmp_path):
    with pytest.raises(UsageError, match=f"of type '{kind}', not a model"):
        guide(Question(dense_gguf(tmp_path, **{"general.type": string(kind)}), MACHINE))


def test_a_recipe_for_a_file_is_refused(converted):
    with pytest.raises(UsageError, match="has its types already"):
        guide(Question(shards_in(converted)[0], MACHINE, "q4_x"))


def test_a_set_with_a_missing_shard_is_refused(converted, tmp_path):
    first = shards_in(converted)[0]
    shutil.copy(first, tmp_path / first.name)
    with pytest.raises(GgufError, match="missing"):
        guide(Question(tmp_path / first.name, MACHINE))


@pytest.mark.parametrize("what", ["empty", "text.gguf", "none", "none.gguf"])
def test_what_is_no_model_at_all_is_one_error(what, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(QuantkitError) as error:
        guide(Question(tmp_path / what, MACHINE))
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ram", "64GB"), "Missing option '--vram'"),
        (("--vram", "24GB"), "Missing option '--ram'"),
        (("--vram", "lots", "--ram", "64GB"), "'lots' is not a size"),
        (("--vram", "-1", "--ram", "64GB"), "'-1' is not a size"),
        (("--vram", "24GB", "--ram", "0"), "more than 0 bytes"),
        (("--vram", "24GB", "--ram", "64 elephants"), "is not a size"),
        (("--vram", "24GB", "--ram", "64GB", "--ctx", "0"), "'--ctx'"),
        (("--vram", "24GB", "--ram", "64GB", "--ctx", "2049"), "more than the model's 2,048"),
        (("--vram", "24GB", "--ram", "64GB", "-r", "q9_z"), "no recipe is called 'q9_z'"),
    ],
)
def test_nonsense_ends_with_2(arguments, message, run):
    code, _, err = run(str(FIXTURE), *arguments)
    assert code == 2
    assert message in err


def test_the_command_prints_text_markdown_and_json(run):
    machine = (str(FIXTURE), "-r", "q4_x", "--vram", "24GiB", "--ram", "64GiB", "--disk", "1TB")
    code, out, _ = run(*machine)
    assert code == 0
    assert out.startswith("Tiny-Kimi-K2.5-Q4_X, ")
    code, out, _ = run(*machine, "--markdown")
    assert "\n## Commands\n" in out
    code, out, _ = run(*machine, "--json")
    data = json.loads(out)
    assert data["machine"] == {"vram": 24 << 30, "ram": 64 << 30, "disk": 10**12}
    assert data["model"]["name"] == "Tiny-Kimi-K2.5-Q4_X"
