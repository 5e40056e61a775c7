"""Questions to a checkpoint and its files: the answers are transformers', flips are counted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from quantkit.cli.evaluate import evaluate_command
from quantkit.container.reader import read_gguf
from quantkit.errors import QuantkitError, UsageError
from quantkit.evaluate.choice import encode
from quantkit.evaluate.html import report_html
from quantkit.evaluate.questions import SHOTS, load_task
from quantkit.evaluate.report import parse_report
from quantkit.pipeline.evaluation import Evaluation, evaluate, models_among
from quantkit.pipeline.opening import Reading, Running, opened
from quantkit.pipeline.tasks import Asking
from quantkit.run.events import Silent
from tests.pipeline.conftest import FIXTURE

EXACT = Running(constants="config", activations="exact")
N_QUESTIONS, SHOWN = 12, 2
WORDS = ("file", "cache", "line", "number", "list", "string", "return", "value", "error", "path")
IMATRIX = Path(__file__).parents[1] / "calibrate" / "tiny-kimi-k2.5.imatrix.gguf"


class Told(Silent):
    """Keeps lines and notes."""

    def __init__(self):
        self.lines, self.notes, self.bars = {}, [], []

    def stage(self, name, detail):
        self.lines[name] = detail

    def warn(self, text):
        self.notes.append(text)

    def begin(self, title, total, n_done, unit="bytes"):
        self.bars.append((total, unit))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_question(k: int, answer: int = 0) -> dict[str, object]:
    words = np.random.default_rng(k).permutation(WORDS)
    n_choices = 2 + k % 3
    return {
        "question": f"Which word comes after the {words[0]} and the {words[1]}?",
        "choices": [str(word) for word in words[2 : 2 + n_choices]],
        "answer": answer,
        "subject": "ab"[k % 2],
    }


def write(path: Path, lines) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "dev.jsonl"
    return write(path, [a_question(100 + k, k % 2) for k in range(2 * SHOWN)])


@pytest.fixture(scope="module")
def wanted(examples, tmp_path_factory) -> list[np.ndarray]:
    """The letters' logits, each prompt whole through transformers."""
    hf = pytest.importorskip("tests.oracles.hf")
    draft = write(tmp_path_factory.mktemp("t") / "t.jsonl", map(a_question, range(N_QUESTIONS)))
    with opened(FIXTURE, "config") as model:
        asked = encode(model.tokenizer, load_task(draft, examples=examples), SHOWN)
    network = hf.load(FIXTURE)
    found = []
    with torch.no_grad():
        for ids, n in zip(asked.prompts, asked.n_choices, strict=True):
            logits = network(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits
            found.append(logits[0, -1, list(asked.letters[:n])].double().numpy())
    for row in found:  # else the test would be one of rounding
        assert np.diff(np.sort(row)).min() > 1e-3
    return found


@pytest.fixture(scope="module")
def task(wanted, tmp_path_factory) -> Path:
    """Of which transformers answers two in three right."""
    lines = []
    for k, row in enumerate(wanted):
        best = int(row.argmax())
        lines.append(a_question(k, best if k % 3 else (best + 1) % len(row)))
    return write(tmp_path_factory.mktemp("task") / "words.jsonl", lines)


@pytest.fixture(scope="module")
def same(converted) -> Path:
    return converted("f32") / "m-F32.gguf"


@pytest.fixture(scope="module")
def contrary(same, tmp_path_factory) -> Path:
    """The same model with its head negated: it likes best what it liked least."""
    path = tmp_path_factory.mktemp("contrary") / "m-contrary.gguf"
    shutil.copy(same, path)
    head = next(tensor for tensor in read_gguf(path).tensors if tensor.name == "output.weight")
    weights = np.memmap(path, np.float32, "r+", head.begin, (head.n_bytes // 4,))
    weights *= -1
    weights.flush()
    return path


def run(quants, work, asking, told=None, **options):
    job = Evaluation(FIXTURE, tuple(quants), None, EXACT, asking=asking, **options)
    return evaluate(job, work, told or Silent())


def test_answers_are_transformers_and_flips_are_counted(
    same, contrary, task, examples, wanted, tmp_path
):
    told = Told()
    asking = Asking(str(task), SHOWN, examples=examples)
    report = run([same, contrary], tmp_path / "work", asking, told)
    right = [question.answer for question in load_task(task, examples=examples).questions]
    was = np.array([row.argmax() == answer for row, answer in zip(wanted, right, strict=True)])
    now = np.array([row.argmin() == answer for row, answer in zip(wanted, right, strict=True)])
    identical, broken = (quant["tasks"][0] for quant in report["quants"])
    for result in (identical, broken):
        assert (result["task"], result["shots"], result["n"]) == ("words", SHOWN, N_QUESTIONS)
        assert result["accuracy_reference"] == pytest.approx(was.mean()) == pytest.approx(2 / 3)
        assert {name: grade["n"] for name, grade in result["by_subject"].items()} == {
            "a": N_QUESTIONS // 2,
            "b": N_QUESTIONS // 2,
        }
    kinds = ("correct_to_wrong", "wrong_to_correct", "wrong_to_other_wrong")
    assert [identical[kind] for kind in kinds] == [0, 0, 0]
    assert identical["difference"] == identical["difference_error"] == 0
    n_other = sum(
        not a and not b and row.argmin() != row.argmax()
        for a, b, row in zip(was, now, wanted, strict=True)
    )
    assert [broken[kind] for kind in kinds] == [(was & ~now).sum(), (~was & now).sum(), n_other]
    assert broken["correct_to_wrong"] == was.sum()
    assert broken["accuracy"] == pytest.approx(now.mean())
    ((n_tokens, unit),) = told.bars
    assert unit == "tokens"
    assert told.lines["task"] == f"words: {N_QUESTIONS} questions, {n_tokens:,} tokens"
    assert not (tmp_path / "work").exists()
    parse_report(report)
    assert report["text"] is None
    assert "words" in report_html(report)


def test_a_text_and_questions_are_one_report(same, task, examples, tmp_path):
    asking = Asking(str(task), SHOWN, limit=3, examples=examples)
    reading = Reading("core", budget=256, n_ctx=64)
    job = Evaluation(FIXTURE, (same,), reading, EXACT, asking=asking)
    report = evaluate(job, tmp_path / "work", Silent())
    (quant,) = report["quants"]
    assert report["text"]["n_chunks"] == 4
    assert quant["kld_mean"] < 1e-6
    assert quant["tasks"][0]["n"] == 3
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("options", [{"engine": "llama.cpp"}, {"model": "base.logits"}])
def test_questions_are_asked_of_models_that_quantkit_runs(options, same, tmp_path):
    path = tmp_path / "base.logits"
    path.write_bytes(b"_logits_")
    job = {"model": FIXTURE, "quants": (same,), "reading": None, "asking": Asking("t.jsonl")}
    if "model" in options:
        options = {"model": path}
    with pytest.raises(UsageError, match="questions are asked of models that quantkit runs"):
        evaluate(Evaluation(**job | options), tmp_path / "work", Silent())


def test_a_base_without_a_tokenizer_cannot_be_asked(same, task, tmp_path):
    job = Evaluation(same, (same,), None, EXACT, asking=Asking(str(task)))
    with pytest.raises(UsageError, match="without its tokenizer") as caught:
        evaluate(job, tmp_path / "work", Silent())
    assert "checkpoint's folder" in caught.value.hint


# --- the command


def command(*arguments):
    shown = [str(argument) for argument in arguments]
    return CliRunner().invoke(evaluate_command, [*shown, "-t", "1"], catch_exceptions=True)


def test_the_command_tells_figures_or_json_and_writes_the_page(same, task, examples, tmp_path):
    options = ["--task", task, "--shots", SHOWN, "--examples", examples, "--limit", 4]
    done = command(FIXTURE, same, *options, "-o", tmp_path / "out", "-q")
    assert done.exit_code == 0, done.exception
    assert "words, 4 questions\n" in done.stdout
    assert ": 0 right to wrong, 0 wrong to right, 0 wrong to another wrong" in done.stdout
    assert "Mean KLD" not in done.stdout
    assert "words" in (tmp_path / "out" / "report.html").read_text()
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    told = json.loads(command(FIXTURE, same, *options, "--json").stdout)
    assert told["quants"][0]["tasks"] == stored["quants"][0]["tasks"]


def test_defaults_are_those_of_the_library():
    options = {option.name: option.default for option in evaluate_command.params}
    assert options["shots"] == SHOTS


REFUSED = {
    "no JSON": ("{", "line 1: not a line of JSON"),
    "27 choices": (json.dumps({"question": "q", "choices": ["x"] * 27, "answer": 0}), "27 choices"),
    "half a character": (json.dumps(a_question(0) | {"question": "\ud800"}), "is not a text"),
    "nothing": ("", "holds no question"),
    "examples only": (json.dumps(a_question(0)), "no question is left to grade"),
    "a question beyond the context": (
        "\n".join(json.dumps(a_question(0) | {"question": "a b " * 3000}) for _ in range(6)),
        "question 1: ",
    ),
    "too few examples": (
        "\n".join(json.dumps(a_question(0)) for _ in range(6)),
        "has 5 examples, 6 are to be shown",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_task_is_refused_with(what, same, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = REFUSED[what]
    (tmp_path / "t.jsonl").write_text(text)
    shots = 6 if what == "too few examples" else 0
    done = command(FIXTURE, same, "--task", "t.jsonl", "--shots", shots)
    assert isinstance(done.exception, QuantkitError)
    assert done.exception.exit_code == 2
    assert message in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "belong to a --task"),
        (["--examples", "x"], "belong to a --task"),
        (["--task", "x", "--save-base", "y"], "not of a --task"),
        (["--task", "x", "--limit", "0"], "0 is not in the range"),
        (["--task", "x", "--shots", "-1"], "-1 is not in the range"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, tmp_path):
    text = [] if "--task" in arguments else ["--text", "core"]
    done = command(FIXTURE, tmp_path / "q.gguf", *arguments, *text)
    assert done.exit_code == 2
    assert message in done.output


def test_a_process_ends_with_the_code_of_a_refusal(tmp_path):
    (tmp_path / "t.jsonl").write_text("[]")
    arguments = ["evaluate", FIXTURE, IMATRIX, "--task", tmp_path / "t.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {IMATRIX}: is an imatrix, not a model\n"


# --- what a conversion leaves beside its model


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory) -> Path:
    """Two models, one of them in shards; the vision tower and an imatrix."""
    folder = tmp_path_factory.mktemp("out")
    for path in converted("q8_0", 8_000_000).glob("*.gguf"):
        shutil.copy(path, folder)
    for path in converted("bf16").glob("m-*.gguf"):
        shutil.copy(path, folder)
    shutil.copy(IMATRIX, folder / "m.imatrix.gguf")
    return folder


def test_of_a_conversions_files_only_models_are_taken_each_set_once(folder):
    told = Told()
    paths = sorted(folder.glob("*.gguf"))
    shards = [path for path in paths if "-of-" in path.name]
    assert len(shards) > 2
    found = models_among(paths, told)
    assert [path.name for path in found] == ["m-BF16.gguf", shards[0].name]
    assert told.notes == [
        "left out, as it is no model: m.imatrix.gguf (imatrix), mmproj-m-F16.gguf (mmproj)",
        f"shards of sets that are named already: {len(shards) - 1} files",
    ]


def test_any_shard_stands_for_its_set(folder):
    told = Told()
    first, *others = sorted(folder.glob("*-of-*.gguf"))
    assert models_among(others[::-1], told) == (first,)
    assert models_among([others[0]], told) == (first,)
    assert models_among([first, first], told) == (first,)


def test_one_model_is_taken_in_silence(folder):
    told = Told()
    path = folder / "m-BF16.gguf"
    assert models_among([path], told) == (path,)
    assert told.notes == []


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.imatrix.gguf", "is an imatrix, not a model"),
        ("mmproj-*", r"is a vision tower \(mmproj\)"),
    ],
)
@pytest.mark.parametrize("as_base", [False, True])
def test_a_file_of_another_kind_alone_is_refused(pattern, message, as_base, folder, tmp_path):
    (other,) = folder.glob(pattern)
    model, quant = (other, folder / "m-BF16.gguf") if as_base else (FIXTURE, other)
    job = Evaluation(model, (quant,), Reading("core", budget=64, n_ctx=64))
    with pytest.raises(UsageError, match=message) as caught:
        evaluate(job, tmp_path / "work", Silent())
    assert caught.value.where == str(other)
