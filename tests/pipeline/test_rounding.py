"""`convert --rounding feedback`: the same file but better codes, in the same bytes every time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from make_hf_checkpoint import make

from quantkit.calibrate.imatrix import read_imatrix
from quantkit.cli import cli
from quantkit.container.reader import GgufFile, read_gguf
from quantkit.container.shardset import open_shards
from quantkit.errors import OutputError, UsageError
from quantkit.evaluate.summary import with_bos
from quantkit.forward.hyper import read_hyper
from quantkit.forward.matrices import Compute, Matrices
from quantkit.forward.rows import RamRows
from quantkit.forward.stream import Sequences, Stream
from quantkit.forward.sweep import Sweep
from quantkit.forward.weights import GgufWeights
from quantkit.pipeline import Job, Output, convert
from quantkit.pipeline.opening import Running, opened
from quantkit.pipeline.rounding import Text
from quantkit.run.events import Silent
from quantkit.types import GgmlType
from tests.oracles import llamacpp

BUDGET = 1024


UNSEEN = """Moss grew between the stones of the yard where nobody had walked since the harvest.
In the ledger of the mill, sacks were counted twice: once by the miller, and once by the river.
for row in table: total += row["price"] * row["count"]
"""


class PowerCut(BaseException):
    """What nothing in the program catches."""


class Heard(Silent):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, name: str, detail: str) -> None:
        self.stages.append(f"{name}: {detail}")

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> its folder, made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        if not (folder / family).exists():
            make(family, folder / family)
        return folder / family

    return get


@dataclass
class Made:
    """A converted model."""

    folder: Path
    model: Path
    heard: Heard

    @property
    def path(self) -> Path:
        (path,) = self.folder.glob("m-*.gguf")
        return path

    @property
    def file(self) -> GgufFile:
        return read_gguf(self.path)

    @property
    def bytes(self) -> bytes:
        return self.path.read_bytes()

    def tensors(self) -> dict[str, bytes]:
        data = self.bytes
        return {t.name: data[t.begin : t.begin + t.n_bytes] for t in self.file.tensors}


def run(model: Path, recipe: str, folder: Path, rounding: str | None = "feedback", **options):
    heard = Heard()
    n_threads = options.pop("n_threads", 1)
    output = Output(folder, n_threads, options.pop("restart", False))
    settings = {"budget": BUDGET} | options
    job = Job(model, recipe, name="m", mmproj=None, rounding=rounding, **settings)
    convert(job, output, heard)
    return Made(folder, model, heard)


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """made(family, recipe, rounding) -> the conversion, done once."""
    cache: dict[tuple[str, str, str], Made] = {}

    def get(family: str, recipe: str, rounding: str = "feedback") -> Made:
        key = family, recipe, rounding
        if key not in cache:
            options = {} if rounding == "feedback" else {"corpus": None}
            folder = tmp_path_factory.mktemp("made")
            cache[key] = run(checkpoint(family), recipe, folder, rounding, **options)
        return cache[key]

    return get


CASES = [("llama", "q2_k"), ("kimi-k2-thinking", "iq2_xxs"), ("llama-tied", "iq3_xxs")]


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_types_places_and_sizes_are_those_of_nearest(made, family, recipe):
    ours, theirs = made(family, recipe), made(family, recipe, "nearest")
    told = [[(t.name, t.type, t.shape, t.n_bytes) for t in m.file.tensors] for m in (ours, theirs)]
    assert told[0] == told[1]
    added = {k for k in ours.file.kvs if k not in theirs.file.kvs}
    assert added == {
        "quantkit.rounding",
        "quantkit.rounding.dataset",
        "quantkit.rounding.tokens",
        "quantkit.rounding.n_tokens",
    }
    kept = {k: ours.file.kvs[k] for k in theirs.file.kvs}
    assert kept == dict(theirs.file.kvs)
    data = ours.tensors(), theirs.tensors()
    assert sum(data[0][name] != data[1][name] for name in data[0]) > 5


def test_the_file_says_what_text_it_was_rounded_on(made):
    kvs = made("llama", "q2_k").file.kvs
    text = Text.read(made("llama", "q2_k").model, "core", BUDGET, Running())
    assert kvs["quantkit.rounding"].value == "feedback"
    assert kvs["quantkit.rounding.dataset"].value == "core"
    assert kvs["quantkit.rounding.tokens"].value == text.tokens.digest
    assert kvs["quantkit.rounding.n_tokens"].value == BUDGET


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_llamacpp_loads_it(made, family, recipe):
    loaded, log = llamacpp.loads(made(family, recipe).path, check_tensors=True)
    assert loaded, log


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_nothing_else_is_left_in_the_folder(made, family, recipe):
    stem = made(family, recipe).path.name.removesuffix(".gguf")
    left = sorted(os.listdir(made(family, recipe).folder))
    assert left == [f"{stem}.gguf", f"{stem}.manifest.json"], "nor an imatrix, which nobody needs"


class Grams:
    """An observer that keeps every matrix's second moments, those of experts apart."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], torch.Tensor] = {}

    def see(self, names, x, row=0, n_rows=1) -> None:
        for name in names:
            gram = x.double().T @ x.double()
            self.sums[name, row] = self.sums.get((name, row), 0) + gram

    def wants_prior(self, name, n_tok) -> bool:
        return False

    def see_prior(self, name, x, row, n_rows) -> None:
        raise NotImplementedError


def grams_of(model: Path) -> dict[tuple[str, int], torch.Tensor]:
    """Of the source model on the text that weights were rounded on."""
    observer = Grams()
    with opened(model, "llama.cpp") as it:
        ids = with_bos(Text.read(model, "core", BUDGET, Running())._chunks(), it.bos)
        matrices = Matrices(it.weights, Compute(activations="exact"), observer)
        stream = Stream(matrices, it.hyper, Sequences.of(ids), RamRows)
        stream.embed()
        for layer in range(it.hyper.n_layers):
            stream.advance(layer)
        stream.observe_output()
    return observer.sums


def output_errors(made: Made, grams) -> dict[tuple[str, int], float]:
    """tr(E G E') of every matrix, E its difference to the source, in units of the output's."""
    errors = {}
    with opened(made.model, "llama.cpp") as source:
        theirs = GgufWeights(open_shards(made.path))
        for (name, matrix), gram in grams.items():
            if name not in theirs or theirs.type(name) in (GgmlType.F32, GgmlType.F16):
                continue
            shape = source.weights.shape(name)
            if gram.shape[0] != shape[-1]:
                continue  # heads
            begin = matrix * shape[-2] if len(shape) == 3 else 0
            w, q = (m.read(name, begin, begin + shape[-2]) for m in (source.weights, theirs))
            w, e = torch.from_numpy(w).double(), torch.from_numpy(w - q).double()
            total = float((w @ gram * w).sum())
            if total > 0:
                errors[name, matrix] = float((e @ gram * e).sum()) / total
        theirs.close()
    return errors


@pytest.mark.parametrize(("family", "recipe"), CASES[:2])
def test_outputs_are_nearer_to_the_source_than_with_nearest(made, family, recipe, tmp_path):
    """Here without retargeting, which trades a weight's own error for that of the run."""
    feedback = made(family, recipe)
    grams = grams_of(feedback.model)
    ours = output_errors(feedback, grams)
    theirs = output_errors(made(family, recipe, "nearest"), grams)
    rounded = [key for key in ours if ours[key] != theirs[key]]
    assert len(rounded) >= 10
    better = [key for key in rounded if ours[key] < theirs[key]]
    worse = {key: (ours[key], theirs[key]) for key in rounded if key not in better}
    assert len(better) >= 0.9 * len(rounded), worse
    assert np.median([ours[key] / theirs[key] for key in rounded]) < 0.8


def hidden_error(made: Made) -> float:
    """Of the state behind the last layer, as a share of the source's, on text that was not seen."""
    states = []
    with opened(made.model, "llama.cpp") as source:
        assert source.tokenizer is not None
        ids = (source.tokenizer.encode(UNSEEN, parse_special=False) * 40)[:512]
        theirs = GgufWeights(open_shards(made.path))
        for weights in (source.weights, theirs):
            matrices = Matrices(weights, Compute(activations="exact"))
            hyper = read_hyper(weights.kvs, "llama.cpp")
            stream = Stream(matrices, hyper, Sequences.of(np.asarray(ids)[None]), RamRows)
            stream.embed()
            for layer in range(hyper.n_layers):
                stream.advance(layer)
            states.append(stream.final(torch.arange(512)).double())
        theirs.close()
    return float((states[0] - states[1]).square().sum() / states[0].square().sum())


def test_the_model_as_a_whole_is_nearer_to_the_source(made, checkpoint, tmp_path):
    """With enough text for its 256 columns, and some held back."""
    ours = run(checkpoint("llama"), "q2_k", tmp_path, budget=6 * BUDGET)
    assert hidden_error(ours) < 0.5 * hidden_error(made("llama", "q2_k", "nearest"))


@pytest.mark.parametrize("recipe", ["q4_x", "ud-q4_k_xl"])
def test_int4_experts_are_copied_bit_by_bit_all_the_same(made, recipe):
    ours = made("kimi-k2-thinking", recipe).tensors()
    theirs = made("kimi-k2-thinking", recipe, "nearest").tensors()
    experts = [name for name in ours if "_exps" in name]
    assert len(experts) == 3
    assert all(ours[name] == theirs[name] for name in experts)
    assert any(ours[name] != theirs[name] for name in ours)


def test_types_that_round_every_weight_alike_are_as_they_are(made, tmp_path):
    """Only tensors of searched types are touched: neither floats nor the embedding."""
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "name: mixed\ndefault: q4_k\nrules:\n"
        "  - {role: attention.output, type: f16}\n"
        "  - {role: dense_ffn.up, type: bf16}\n"
    )
    ours = made("llama", str(recipe)).tensors()
    theirs = made("llama", str(recipe), "nearest").tensors()
    changed = {n.split(".")[-2] for n in ours if ours[n] != theirs[n]}
    assert changed == {"attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_down", "output"}


def test_without_a_searched_type_the_model_is_not_run(checkpoint, tmp_path):
    done = run(checkpoint("llama"), "bf16", tmp_path)
    assert not any(line.startswith(("text", "round")) for line in done.heard.stages)
    assert "quantkit.rounding" not in done.file.kvs


def test_no_imatrix_is_measured_where_all_low_types_are_rounded_by_inputs(made):
    heard = made("llama", "q2_k").heard
    assert not any("calibrating" in text for text in heard.warnings)
    assert any(line.startswith("round: ") for line in heard.stages)
    assert any("fewer than 20 tokens per column" in text for text in heard.warnings)


def test_it_cannot_do_without_text(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="needs text to run the model on") as caught:
        run(checkpoint("llama"), "q2_k", tmp_path, corpus=None)
    assert "--no-imatrix" in caught.value.hint
    assert "--rounding nearest" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_the_command_line_says_so_too(checkpoint, tmp_path):
    command = ["convert", str(checkpoint("llama")), "-r", "q2_k", "--rounding", "feedback"]
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *command, "--no-imatrix", "-o", str(tmp_path / "o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "needs text to run the model on" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_of_it_is_the_plan_of_nearest(checkpoint):
    def plan(rounding: str) -> dict:
        command = ["plan", str(checkpoint("llama")), "-r", "q2_k", "--rounding", rounding, "--json"]
        done = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert done.exit_code == 0
        return json.loads(done.stdout)

    feedback, nearest = plan("feedback"), plan("nearest")
    assert feedback["files"][-1]["tensors"] == nearest["files"][-1]["tensors"]


def test_a_plan_does_not_ask_for_an_imatrix_that_feedback_does_not_need(checkpoint):
    command = ["plan", str(checkpoint("llama")), "-r", "q2_k", "--rounding"]
    said = [CliRunner().invoke(cli, [*command, how]).stdout for how in ("nearest", "feedback")]
    assert "wants an --imatrix" in said[0]
    assert "wants an --imatrix" not in said[1]


def test_an_imatrix_can_be_given_for_what_is_not_rounded_by_inputs(made, checkpoint, tmp_path):
    """A recipe whose embedding is low is calibrated for nothing; given one, it is used."""
    model = checkpoint("llama")
    plain = run(model, "iq2_xxs", tmp_path / "first", None)
    (imatrix,) = (tmp_path / "first").glob("*.imatrix.gguf")
    assert read_imatrix(imatrix).n_tokens == BUDGET
    ours = run(model, "iq2_xxs", tmp_path / "second", imatrix=imatrix)
    assert ours.file.kvs["quantize.imatrix.file"].value == imatrix.name
    assert ours.tensors()["token_embd.weight"] == plain.tensors()["token_embd.weight"]
    assert list((tmp_path / "second").glob("*.imatrix.gguf")) == []


def test_the_recipe_can_ask_for_it(made, checkpoint, tmp_path):
    recipe = tmp_path / "q2_k.yaml"
    recipe.write_text("name: low\ndefault: q2_k\nrounding: feedback\n")
    done = run(checkpoint("llama"), str(recipe), tmp_path / "out", None)
    assert done.file.kvs["quantkit.rounding"].value == "feedback"


# The same bytes, however it goes.


@pytest.mark.parametrize(("family", "recipe"), CASES[1:2])
def test_two_threads_give_the_bytes_of_one(made, checkpoint, tmp_path, family, recipe):
    torch.set_num_threads(2)
    again = run(checkpoint(family), recipe, tmp_path, n_threads=2)
    assert again.bytes == made(family, recipe).bytes


def test_a_finished_file_is_not_made_again(made, checkpoint, tmp_path):
    first = run(checkpoint("llama"), "q4_k_s", tmp_path)
    stamp = first.path.stat().st_mtime_ns
    again = run(checkpoint("llama"), "q4_k_s", tmp_path)
    assert any("nothing to do" in line for line in again.heard.stages)
    assert first.path.stat().st_mtime_ns == stamp


def dying(monkeypatch, owner, name: str, n: int, *, after: bool = False) -> None:
    """The n-th call of `owner.name` is where the power goes, before or after it."""
    real, count = getattr(owner, name), [0]

    def wrapped(*arguments, **keywords):
        count[0] += 1
        if count[0] == n and not after:
            raise PowerCut
        result = real(*arguments, **keywords)
        if count[0] == n:
            raise PowerCut
        return result

    monkeypatch.setattr(owner, name, wrapped)


FAMILY, RECIPE = "kimi-k2-thinking", "q2_k"  # a dense layer, and a routed one


def assert_continued(made, checkpoint, folder: Path) -> list[str]:
    """Run to the end; gives what was said of resuming."""
    done = run(checkpoint(FAMILY), RECIPE, folder)
    assert done.bytes == made(FAMILY, RECIPE).bytes
    left = sorted(os.listdir(folder))
    assert left == ["m-Q2_K.gguf", "m-Q2_K.manifest.json"]
    return [line for line in done.heard.stages if line.startswith("resume")]


@pytest.fixture
def always_saved(monkeypatch):
    """However long a save takes."""
    monkeypatch.setattr("quantkit.forward.sweep._SHARE", 1e9)


@pytest.mark.parametrize(
    ("layer", "after", "resumed"), [(1, False, 0), (2, False, 1), (2, True, 2)]
)
def test_a_run_that_dies_around_a_save_goes_on_behind_it(
    made, checkpoint, tmp_path, monkeypatch, always_saved, layer, after, resumed
):
    with monkeypatch.context() as patched:
        dying(patched, Sweep, "_save", layer, after=after)
        with pytest.raises(PowerCut):
            run(checkpoint(FAMILY), RECIPE, tmp_path)
    said = assert_continued(made, checkpoint, tmp_path)
    assert said == ([f"resume: {resumed} of 2 layers are done"] if resumed else [])


@pytest.mark.parametrize("n", [1, 7, 25])
def test_a_run_that_dies_in_the_middle_of_a_layer_goes_on(
    made, checkpoint, tmp_path, monkeypatch, always_saved, n
):
    from quantkit.write.writer import ShardWriter

    with monkeypatch.context() as patched:
        dying(patched, ShardWriter, "write", n)
        with pytest.raises(PowerCut):
            run(checkpoint(FAMILY), RECIPE, tmp_path)
    assert_continued(made, checkpoint, tmp_path)


def test_a_state_is_saved_only_when_its_layers_are_durable(
    made, checkpoint, tmp_path, monkeypatch, always_saved
):
    """Or a power cut could leave a state and take the tiles before it."""
    last_lines, real = [], Sweep._save

    def save(sweep: Sweep, next_layer: int) -> None:
        (journal,) = tmp_path.glob(".*.journal")
        last_lines.append(journal.read_text().splitlines()[-1])
        real(sweep, next_layer)

    monkeypatch.setattr(Sweep, "_save", save)
    run(checkpoint(FAMILY), RECIPE, tmp_path)
    assert last_lines == ["sync", "sync"]


def test_a_run_can_die_twice(made, checkpoint, tmp_path, monkeypatch, always_saved):
    for _ in range(2):
        with monkeypatch.context() as patched:
            dying(patched, Sweep, "_save", 1, after=True)
            with pytest.raises(PowerCut):
                run(checkpoint(FAMILY), RECIPE, tmp_path)
    assert assert_continued(made, checkpoint, tmp_path) == ["resume: 2 of 2 layers are done"]


def test_a_state_beyond_what_is_written_is_not_taken_up(
    made, checkpoint, tmp_path, monkeypatch, always_saved
):
    """The partial file is gone, and with it the layers that the state has behind it."""
    with monkeypatch.context() as patched:
        dying(patched, Sweep, "_save", 1, after=True)
        with pytest.raises(PowerCut):
            run(checkpoint(FAMILY), RECIPE, tmp_path)
    (state,) = tmp_path.glob(".*.work/sweep.state")
    assert state.stat().st_size > 1000
    (partial,) = tmp_path.glob("*.gguf.partial")
    partial.unlink()
    assert assert_continued(made, checkpoint, tmp_path) == []


def test_a_damaged_state_is_not_taken_up(made, checkpoint, tmp_path, monkeypatch, always_saved):
    with monkeypatch.context() as patched:
        dying(patched, Sweep, "_save", 1, after=True)
        with pytest.raises(PowerCut):
            run(checkpoint(FAMILY), RECIPE, tmp_path)
    (state,) = tmp_path.glob(".*.work/sweep.state")
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert assert_continued(made, checkpoint, tmp_path) == []


def test_another_text_does_not_go_on_with_what_is_there(
    checkpoint, tmp_path, monkeypatch, always_saved
):
    with monkeypatch.context() as patched:
        dying(patched, Sweep, "_save", 1, after=True)
        with pytest.raises(PowerCut):
            run(checkpoint(FAMILY), RECIPE, tmp_path)
    with pytest.raises(OutputError, match="--restart"):
        run(checkpoint(FAMILY), RECIPE, tmp_path, budget=BUDGET // 2)
    other = run(checkpoint(FAMILY), RECIPE, tmp_path, budget=BUDGET // 2, restart=True)
    assert not any(line.startswith("resume") for line in other.heard.stages)
    assert other.file.kvs["quantkit.rounding.n_tokens"].value == BUDGET // 2
    assert sorted(os.listdir(tmp_path)) == ["m-Q2_K.gguf", "m-Q2_K.manifest.json"]


def test_a_process_that_is_killed_in_the_middle_is_continued(made, checkpoint, tmp_path):
    command = [
        *(sys.executable, "-m", "quantkit", "convert", str(checkpoint(FAMILY)), "-r", RECIPE),
        *("--rounding", "feedback", "--name", "m", "--mmproj", "none", "-t", "1"),
        *("--calibration-tokens", str(BUDGET), "-o", str(tmp_path)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    state = tmp_path / ".m-Q2_K.work" / "sweep.state"
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.gguf"))
    assert len(assert_continued(made, checkpoint, tmp_path)) == 1


@pytest.mark.slow
def test_the_trained_model_is_nearer_to_its_source_even_with_little_text(fixture_model, tmp_path):
    """Four tokens per column, and experts that see next to nothing."""
    ours = run(fixture_model, "q2_k", tmp_path / "a", budget=2048)
    theirs = run(fixture_model, "q2_k", tmp_path / "b", "nearest", corpus=None)
    loaded, log = llamacpp.loads(ours.path, check_tensors=True)
    assert loaded, log
    assert hidden_error(ours) < hidden_error(theirs)
