"""Evaluation from files to a report: engines agree, base files are interchangeable, wrong text is
refused."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.errors import OutputError, UsageError
from quantkit.evaluate.logits_file import BaseFile
from quantkit.evaluate.report import parse_report
from quantkit.pipeline import Job, Output, convert
from quantkit.pipeline.evaluation import Evaluation, evaluate, write_base, write_report
from quantkit.pipeline.opening import Reading, opened, read_tokens
from quantkit.plan.build import Limits
from quantkit.run import fs
from quantkit.run.events import Silent
from quantkit.text.tokens import chunks
from tests.pipeline.conftest import FIXTURE

N_CTX, N_CHUNKS = 128, 8
READING = Reading("core", budget=N_CTX * N_CHUNKS, n_ctx=N_CTX)


@pytest.fixture(scope="module")
def low_bit(tmp_path_factory):
    """The fixture at about 3 bits, made without importance."""
    folder = tmp_path_factory.mktemp("q2_k")
    job = Job(FIXTURE, "q2_k", Limits(), name="m", mmproj=None, corpus=None)
    convert(job, Output(folder, 1), Silent())
    return folder / "m-Q2_K.gguf"


@pytest.fixture(scope="module")
def report(low_bit, tmp_path_factory):
    return run(FIXTURE, [low_bit], tmp_path_factory.mktemp("work"))


def run(model, quants, work, **options):
    return evaluate(Evaluation(model, tuple(quants), READING, **options), work, Silent())


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.logits"
    write_base(Evaluation(FIXTURE, (), READING), path, Silent())
    return path


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "core.tokens.safetensors"
    with opened(FIXTURE, "llama.cpp") as model:
        read_tokens(model, READING).save(path)
    return path


def test_the_report_says_what_was_compared_and_how(report, low_bit):
    parse_report(report)
    assert report["model"] == "Tiny-Kimi-K2.5"
    assert report["engine"] == "quantkit"
    assert report["constants"] == {
        "constants": "llama.cpp",
        "activations": "llama.cpp",
        "type": "f32",
    }
    text = report["text"]
    assert (text["corpus"], text["n_chunks"], text["n_ctx"]) == ("core", N_CHUNKS, N_CTX)
    (quant,) = report["quants"]
    assert (quant["path"], quant["bytes"]) == (str(low_bit), low_bit.stat().st_size)
    assert 2.6 < quant["bpw"] < 4
    assert quant["n_tokens"] == N_CHUNKS * (N_CTX - 1 - N_CTX // 2)
    assert quant["ppl_base"] == report["base"]["ppl"]
    assert 0.02 < quant["kld_mean"] < 0.5
    assert [layer["layer"] for layer in quant["layers"]] == [0, 1, 2, 3]
    assert quant["layers"][0]["router_disagreement"] is None
    assert 0 < quant["layers"][1]["router_disagreement"] < 0.5


@pytest.fixture(scope="module")
def by_llamacpp(low_bit, base_file, tmp_path_factory):
    """The figures that llama.cpp gives against the stored base."""
    pytest.importorskip("xllamacpp")
    work = tmp_path_factory.mktemp("llama.cpp") / "work"
    return run(base_file, [low_bit], work, engine="llama.cpp")["quants"][0]


def test_llama_cpp_finds_the_same_divergence(report, low_bit, base_file, by_llamacpp, tmp_path):
    """The base is the same file for both; what differs is who runs the quant."""
    ours = run(base_file, [low_bit], tmp_path / "work")["quants"][0]
    assert by_llamacpp["kld_mean"] == pytest.approx(ours["kld_mean"], rel=0.05)
    assert by_llamacpp["kld_median"] == pytest.approx(ours["kld_median"], rel=0.05)
    assert by_llamacpp["ppl"] == pytest.approx(ours["ppl"], rel=0.01)
    assert by_llamacpp["same_top_p"] == pytest.approx(ours["same_top_p"], abs=2)
    assert ours["kld_mean"] == pytest.approx(report["quants"][0]["kld_mean"], rel=0.01)


def test_a_checkpoint_is_the_base_for_llama_cpp_too(low_bit, by_llamacpp, tmp_path):
    """It is run into a base file that does not stay."""
    direct = run(FIXTURE, [low_bit], tmp_path / "work", engine="llama.cpp")["quants"][0]
    assert direct["kld_mean"] == by_llamacpp["kld_mean"]
    assert list(tmp_path.iterdir()) == []


def test_a_base_file_holds_the_text_and_its_log_probabilities(base_file, token_file):
    from tests.oracles.compare import log_softmax

    hf = pytest.importorskip("tests.oracles.hf")
    stored = BaseFile(base_file)
    with opened(FIXTURE, "llama.cpp") as model:
        cut = chunks(read_tokens(model, READING), N_CTX)
    np.testing.assert_array_equal(stored.tokens, cut)
    (logits,) = hf.reference_logits(FIXTURE, cut[:1], latent_eps=1e-5)
    expected = np.maximum(log_softmax(logits[N_CTX // 2 : -1]), -16.5)
    likely = expected > -8
    # The cache holds f16 here and f32 there.
    assert np.abs(stored.chunk(0)[likely] - expected[likely]).max() < 0.05


def test_a_gguf_file_is_a_base_when_the_text_comes_as_tokens(converted, token_file, tmp_path):
    f32 = converted("f32") / "m-F32.gguf"
    job = Evaluation(f32, (f32,), Reading(str(token_file), n_ctx=N_CTX))
    report = evaluate(job, tmp_path, Silent())
    assert report["quants"][0]["kld_max"] == pytest.approx(0, abs=1e-12)
    assert report["quants"][0]["same_top_p"] == 100
    assert not any(layer["hidden_error"] for layer in report["quants"][0]["layers"])


def test_a_gguf_base_without_tokens_is_refused(low_bit, tmp_path):
    with pytest.raises(UsageError, match="without its tokenizer"):
        run(low_bit, [low_bit], tmp_path)


def test_tokens_of_another_tokenizer_are_refused(token_file, low_bit, tmp_path):
    from dataclasses import replace

    from quantkit.text.tokens import load_tokens

    foreign = tmp_path / "foreign.safetensors"
    replace(load_tokens(token_file), tokenizer="another").save(foreign)
    job = Evaluation(FIXTURE, (low_bit,), Reading(str(foreign), n_ctx=N_CTX))
    with pytest.raises(UsageError, match="another tokenizer") as caught:
        evaluate(job, tmp_path, Silent())
    assert "foreign.safetensors" in str(caught.value)


def test_text_that_the_quants_were_calibrated_on_is_refused(token_file, low_bit, tmp_path):
    with pytest.raises(UsageError, match="would flatter"):
        run(FIXTURE, [low_bit], tmp_path, calibrated_on=token_file)


def test_force_scores_on_calibration_text_all_the_same(token_file, low_bit, tmp_path, monkeypatch):
    class BegunError(Exception):
        pass

    def begin(*args):
        raise BegunError

    monkeypatch.setattr("quantkit.pipeline.evaluation._scores", begin)
    with pytest.raises(BegunError):
        run(FIXTURE, [low_bit], tmp_path, calibrated_on=token_file, force=True)


def test_a_file_whose_imatrix_names_the_text_is_refused(low_bit, tmp_path, monkeypatch):
    from quantkit.container.shardset import ShardSet
    from quantkit.types import Kv, KvType

    kvs = ShardSet.kvs
    named = {"quantize.imatrix.dataset": Kv(KvType.STRING, "core")}
    monkeypatch.setattr(ShardSet, "kvs", property(lambda s: {**kvs.__get__(s), **named}))
    with pytest.raises(UsageError, match=r"m-Q2_K\.gguf: was calibrated with core"):
        run(FIXTURE, [low_bit], tmp_path)


def test_another_model_is_refused(low_bit, tmp_path):
    from make_hf_checkpoint import make

    make("llama", tmp_path / "llama")
    with pytest.raises(UsageError, match="made of only"):
        run(tmp_path / "llama", [low_bit], tmp_path / "work")


def test_a_report_is_written_as_json_and_html(report, tmp_path):
    import json

    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "Tiny-Kimi-K2.5" in (tmp_path / "report.html").read_text()


def test_coverage_of_an_imatrix_is_in_the_report(low_bit, base_file, tmp_path):
    imatrix = FIXTURE.parents[1] / "calibrate" / "tiny-kimi-k2.5.imatrix.gguf"
    coverage = run(base_file, [low_bit], tmp_path, imatrix=imatrix)["coverage"]
    assert coverage["layers"] == [1, 2, 3]
    assert np.array(coverage["counts"]).shape == (3, 8)


def test_a_second_run_in_the_folder_of_one_at_work_is_refused(low_bit, tmp_path):
    with fs.claimed(tmp_path), pytest.raises(OutputError, match="another run"):
        run(FIXTURE, [low_bit], tmp_path)
