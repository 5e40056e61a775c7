"""`quantkit evaluate` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.cli import cli
from quantkit.errors import QuantkitError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
TEXT = ["--text", "core", "--budget", "640", "-c", "128"]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def run(*arguments, cwd=None, command="evaluate"):
    return subprocess.run(
        [sys.executable, "-m", "quantkit", command, *map(str, arguments), "-t", "1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=120,
        env=ENVIRONMENT,
    )


@pytest.fixture(scope="module")
def quant(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("q8_0")
    options = ["--recipe", "q8_0", "--mmproj", "none", "--name", "m", "-o", folder]
    assert run(FIXTURE, *options, command="convert").returncode == 0
    return folder / "m-Q8_0.gguf"


def test_json_goes_to_stdout_and_nothing_else(quant, tmp_path):
    done = run(FIXTURE, quant, *TEXT, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert {"ppl", "ppl_error"} <= report["base"].keys()
    (entry,) = report["quants"]
    assert {
        *("path", "bytes", "bpw", "ppl", "ppl_base", "kld_mean", "kld_median", "kld_p99"),
        *("kld_max", "same_top_p", "rms_dp", "n_tokens"),
    } <= entry.keys()
    assert entry["path"] == str(quant)
    assert list(tmp_path.iterdir()) == []


def test_figures_bear_the_names_of_llama_perplexity_and_reports_are_written(quant, tmp_path):
    text = tmp_path / "my text.txt"
    text.write_text("The cache keeps open files. If one is replaced, the next read fails.\n" * 40)
    done = run(FIXTURE, quant, "--corpus", text, "-c", "64", "-o", tmp_path / "out")
    assert done.returncode == 0
    for label in ("Mean PPL(Q)", "Mean KLD", "99.9% KLD", "RMS Δp", "Same top p"):
        assert f"\n{label} " in done.stdout
    assert "my text.txt" in done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "report.html"}


def test_quiet_prints_the_result_only(quant, tmp_path):
    done = run(FIXTURE, quant, *TEXT, "-q", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Mean KLD" in done.stdout


def test_a_saved_base_takes_the_models_place(quant, tmp_path):
    base = tmp_path / "base.logits"
    assert run(FIXTURE, *TEXT, "--save-base", base).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["base.logits"]
    done = run(base, quant, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["text"]["n_chunks"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([FIXTURE, "x.gguf"], 2, "which text?"),
        ([FIXTURE, *TEXT], 2, "name the files to compare"),
        ([FIXTURE, "x.gguf", *TEXT], 6, "x.gguf: cannot be read"),
        ([FIXTURE, "QUANT", "--text", "no such text"], 2, "no corpus is called 'no such text'"),
        ([FIXTURE, "QUANT", "--text", "core", "--budget", "100"], 2, "one chunk takes 512"),
        (["QUANT", "QUANT", "--text", "core"], 2, "without its tokenizer"),
        (["/no/such/folder", "QUANT", *TEXT], 3, "no such folder"),
        ([FIXTURE, "QUANT", *TEXT, "--device", "nonsense"], 2, "cannot be used"),
        ([FIXTURE, "QUANT", *TEXT, "--calibrated-on", "x"], 3, "x: cannot be read"),
        ([FIXTURE, "QUANT", *TEXT, "--imatrix", "x"], 6, "x: cannot be read"),
        ([FIXTURE, "QUANT", "--text", "core", "-c", "3"], 2, "3 is not in the range"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refusals_are_one_message_and_a_code(
    arguments, code, message, quant, tmp_path, monkeypatch
):
    named = [str(quant if argument == "QUANT" else argument) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["evaluate", *named, "-t", "1"])
    assert list(tmp_path.iterdir()) == []
    if isinstance(done.exception, QuantkitError):
        assert (done.exception.exit_code, done.stdout) == (code, "")
        assert message in str(done.exception)
    else:
        assert (done.exit_code, done.stdout) == (code, "")
        assert message in done.stderr


def test_an_interrupted_run_is_continued_by_the_same_command(quant, tmp_path):
    text = ["--text", "core", "--budget", "3072"]
    command = [sys.executable, "-m", "quantkit", "evaluate", FIXTURE, quant, *text, "-t", "1"]
    output = tmp_path / "out"
    with subprocess.Popen(
        [*command, "-o", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        state = output / ".evaluate.work" / "sweep.state"
        until = time.monotonic() + 60
        while not state.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in said
    assert state.exists()
    assert not (output / "report.json").exists()
    assert run(FIXTURE, quant, *text, "-o", output).returncode == 0
    assert {path.name for path in output.iterdir()} == {"report.json", "report.html"}
    whole = run(FIXTURE, quant, *text, "--json", cwd=tmp_path)
    continued = json.loads((output / "report.json").read_text())
    assert continued == json.loads(whole.stdout)
