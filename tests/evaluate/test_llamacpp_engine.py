"""llama.cpp as the engine: logits, refusals, and scores without and with a base file.

That the binding computes what transformers does is `tests/oracles/test_llamacpp.py`'s to show.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantkit.errors import GgufError, UsageError
from quantkit.evaluate import llamacpp as module
from quantkit.evaluate.llamacpp import LlamaCpp, save_base, score_with_llamacpp
from quantkit.evaluate.logits_file import BaseFile, LogitsWriter
from quantkit.evaluate.summary import perplexity, summarise
from tests.oracles import compare, llamacpp

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "tiny-kimi-k2.5"
N_CTX, N_VOCAB = 64, 4288
WINDOW = 31
TEXT = "The cache keeps open files. If one is replaced, the next read fails with an error.\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The fixture as F32 and as Q8_0."""
    folder = tmp_path_factory.mktemp("gguf")
    command = [sys.executable, "-m", "quantkit", "convert", FIXTURE, "--name", "m", "-q", "-t1"]
    for recipe in ("f32", "q8_0"):
        arguments = ["-r", recipe, "-o", folder, "--mmproj", "none"]
        subprocess.run([*command, *arguments], check=True, cwd=ROOT)
    return {name: folder / f"m-{name}.gguf" for name in ("F32", "Q8_0")}


@pytest.fixture(scope="module")
def chunks() -> np.ndarray:
    return np.random.default_rng(7).integers(300, 4000, (3, N_CTX)).astype(np.int32)


@pytest.fixture(scope="module")
def logits(files, chunks) -> dict[str, np.ndarray]:
    return {name: llamacpp.logits(path, chunks, n_ctx=N_CTX) for name, path in files.items()}


def open_engine(path, n_ctx=N_CTX, **options) -> LlamaCpp:
    return LlamaCpp(path, threads=1, n_ctx=n_ctx, **options)


def test_chunks_are_evaluated_each_on_its_own(files, chunks, logits):
    with open_engine(files["F32"]) as engine:
        assert (engine.n_vocab, engine.bos) == (N_VOCAB, None)
        seen = [engine.logits(chunk) for chunk in chunks[[1, 0, 1]]]
        last = engine.logits(chunks[2], 40)
    assert seen[0].dtype == np.float32
    np.testing.assert_array_equal(seen[0], seen[2])
    np.testing.assert_allclose(seen[0], logits["F32"][1], atol=1e-4)
    np.testing.assert_allclose(seen[1], logits["F32"][0], atol=1e-4)
    np.testing.assert_allclose(last, logits["F32"][2, 40:], atol=1e-4)


def test_an_f32_cache_is_exact_and_the_default_one_is_f16(files, chunks, logits):
    exact = llamacpp.logits(files["F32"], chunks[0], kv_f32=True, n_ctx=N_CTX)
    with open_engine(files["F32"], kv_f32=True) as engine:
        seen = engine.logits(chunks[0])
    assert compare.mean_kl(exact, seen) < 1e-10
    assert compare.mean_kl(exact, logits["F32"][0]) > 1e-8


@pytest.mark.slow
def test_chunks_longer_than_a_batch_are_evaluated_whole(files):
    """2,080 tokens in two batches; the other binding cuts them into five."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    ids = np.random.default_rng(8).integers(300, 4000, 2080).astype(np.int32)
    other = llama_cpp.Llama(str(files["Q8_0"]), n_ctx=2080, n_threads=1, logits_all=True)
    other.eval(ids.tolist())
    theirs = np.array(other.scores[2030:2080])
    other.close()
    with open_engine(files["Q8_0"], n_ctx=2080) as engine:
        ours = engine.logits(ids, 2030)
    assert ours.shape == (50, N_VOCAB)
    assert compare.mean_kl(theirs, ours) < 1e-3


def test_a_text_is_tokenised_and_cut_as_llama_perplexity_does(files):
    with open_engine(files["F32"]) as engine:
        ids = engine.tokenize(TEXT * 9)
        assert ids.tolist() == llamacpp.tokenize(files["F32"], [TEXT * 9], special=False)[0]
        cut = engine.chunks(TEXT * 9)
        assert cut.shape == (len(ids) // N_CTX, N_CTX)
        assert cut.ravel().tolist() == ids[: cut.size].tolist()
        with pytest.raises(UsageError, match="fewer than a chunk of 64"):
            engine.chunks(TEXT[:40])


def with_add_bos(gguf: bytes) -> bytes:
    """The file with `add_bos_token` set, and a second key that keeps the data aligned."""
    version_and_counts = struct.Struct("<IQQ")
    version, n_tensors, n_kvs = version_and_counts.unpack_from(gguf, 4)
    more = b""
    for key in (b"tokenizer.ggml.add_bos_token", b"test.x.pad"):
        more += struct.pack("<Q", len(key)) + key + struct.pack("<I?", 7, True)
    assert len(more) == 64
    return gguf[:4] + version_and_counts.pack(version, n_tensors, n_kvs + 2) + more + gguf[24:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"GGUX" + data[4:], "magic"),
        (lambda data: data[: len(data) // 2], "not within the file bounds"),
        (lambda data: data.replace(b"attn_k_b", b"attn_k_c", 1), "attn_k_b"),
    ],
    ids=["wrong magic", "cut short", "misnamed tensor"],
)
def test_a_file_that_llama_cpp_refuses_is_an_error_with_its_last_words(
    files, tmp_path, damage, words
):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(files["Q8_0"].read_bytes()))
    with pytest.raises(GgufError, match=words) as caught:
        open_engine(path)
    assert caught.value.where == str(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(GgufError, match="no such file"):
        open_engine(tmp_path / "missing.gguf")


def test_tokens_that_the_vocabulary_lacks_end_the_process_with_a_reason(files):
    with open_engine(files["Q8_0"]) as engine:
        with pytest.raises(GgufError, match="llama_decode: -1"):
            engine.logits(np.array([5, N_VOCAB], np.int32))
        with pytest.raises(GgufError):  # and it stays so
            engine.logits(np.array([5, 6], np.int32))


def test_chunks_longer_than_was_said_are_refused(files, chunks):
    with open_engine(files["Q8_0"], n_ctx=32) as engine, pytest.raises(ValueError, match="of 32"):
        engine.logits(chunks[0])


def test_without_the_wheel_the_error_says_what_to_install(files, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        open_engine(files["F32"])
    assert caught.value.hint == "pip install 'quantkit[llama]'"


def test_another_build_of_the_wheel_is_refused_and_the_known_one_named(
    files, tmp_path, monkeypatch
):
    package = tmp_path / "xllamacpp"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copy(np.linalg._umath_linalg.__file__, package / "xllamacpp.abi3.so")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match="has no llama_") as caught:
        open_engine(files["F32"])
    assert "xllamacpp 2026" in caught.value.hint


def test_scores_are_those_of_whole_logits(files, chunks, logits):
    done = []
    scores = score_with_llamacpp(
        files["F32"],
        [files["Q8_0"], files["F32"]],
        chunks,
        threads=1,
        on_chunk=done.append,
    )
    assert done == [1, 2, 3]
    assert scores.kld.shape == (2, 3 * WINDOW)
    scored = {name: rows[:, 32:63].reshape(-1, N_VOCAB) for name, rows in logits.items()}
    kld = scores.kld.mean(axis=1)
    assert kld[0] == pytest.approx(compare.mean_kl(scored["F32"], scored["Q8_0"]), rel=1e-3)
    assert kld[1] == 0
    same = compare.same_top1(scored["F32"], scored["Q8_0"])
    assert scores.same_top.mean(axis=1) == pytest.approx([same, 1])
    ppl = compare.perplexity(logits["Q8_0"], chunks, 32)
    assert perplexity(scores.nll[0])[0] == pytest.approx(ppl, rel=1e-5)
    assert np.log(summarise(scores, 0, window=WINDOW)["ppl_base"]) == scores.nll_base.mean()


def test_a_base_file_gives_nearly_the_scores_of_the_base(files, chunks, tmp_path):
    """Sixteen bits a token; a target more than 16 nats below the top counts as on the floor."""
    path = tmp_path / "base.kld"
    with open_engine(files["F32"]) as engine:
        save_base(engine, chunks, path)
    direct, filed = (
        score_with_llamacpp(base, [files["Q8_0"]], chunks, threads=1)
        for base in (files["F32"], BaseFile(path))
    )
    assert 0 < np.abs(filed.kld - direct.kld).max() < 2e-3
    assert filed.kld.mean() == pytest.approx(direct.kld.mean(), abs=3e-5)
    error = filed.nll_base - direct.nll_base
    floored = error < -16 / 65535
    assert np.abs(error[~floored]).max() < 16 / 65535
    assert (direct.nll_base[floored] > 16).all()
    assert floored.mean() < 0.1
    np.testing.assert_array_equal(filed.nll, direct.nll)


def test_a_base_file_of_another_text_or_vocabulary_is_refused(files, chunks, tmp_path):
    for name, n_vocab in (("a", 5000), ("b", N_VOCAB)):
        with LogitsWriter(tmp_path / name, chunks, n_vocab) as writer:
            writer.write_rows(0, np.zeros((3 * WINDOW, n_vocab), np.float32))
            writer.commit()
    with pytest.raises(UsageError, match="not those of the text"):
        score_with_llamacpp(BaseFile(tmp_path / "b"), [], chunks + 1, threads=1)
    with pytest.raises(UsageError, match=r"has 4288 tokens, the base model's 5000") as caught:
        score_with_llamacpp(BaseFile(tmp_path / "a"), [files["Q8_0"]], chunks, threads=1)
    assert caught.value.where == str(files["Q8_0"])


def test_the_base_alone_can_be_scored(files, chunks, logits):
    scores = score_with_llamacpp(files["Q8_0"], [], chunks, threads=1)
    expected = compare.perplexity(logits["Q8_0"], chunks, 32)
    assert perplexity(scores.nll_base)[0] == pytest.approx(expected, rel=1e-5)


def test_a_vocabulary_that_adds_bos_has_it_at_the_start_of_each_chunk(files, chunks, tmp_path):
    adds = tmp_path / "adds-bos.gguf"
    adds.write_bytes(with_add_bos(files["Q8_0"].read_bytes()))
    with open_engine(adds) as engine:
        bos = engine.bos
    assert bos == 4032
    started = chunks[:1].copy()
    started[:, 0] = bos
    seen = score_with_llamacpp(adds, [], chunks[:1], threads=1)
    expected = score_with_llamacpp(files["Q8_0"], [], started, threads=1)
    np.testing.assert_array_equal(seen.nll_base, expected.nll_base)
