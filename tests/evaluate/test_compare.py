"""Models side by side: scores and traces equal what whole logits and whole hidden states give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.errors import UsageError
from quantkit.evaluate import compare as module
from quantkit.evaluate.compare import Comparison, Party, Windows, compare, save_base
from quantkit.evaluate.logits_file import BaseFile, LogitsWriter
from quantkit.evaluate.summary import scored_positions, summarise
from quantkit.forward.hyper import read_hyper
from quantkit.forward.sweep import Settings
from tests.forward.support import EXACT, all_logits, moe_model, passed, stream_of
from tests.oracles.compare import log_softmax, mean_kl, same_top1

N_CHUNKS, N_CTX, N_LAYERS, N_VOCAB = 5, 16, 3, 40
WINDOW = len(scored_positions(N_CTX))
CHUNKS = np.random.default_rng(5).integers(0, N_VOCAB, (N_CHUNKS, N_CTX)).astype(np.int32)
TEXT = Windows.of(CHUNKS, None)


def party(model, name: str = "model") -> Party:
    return Party(name, model, read_hyper(model.kvs))


def perturbed(seed: int, size: float = 0.05, **options) -> Party:
    """The base with noise on every matrix."""
    model = moe_model(**options)
    rng = np.random.default_rng(seed)
    for array in model.arrays.values():
        if array.ndim > 1:
            array[:] += rng.standard_normal(array.shape, np.float32) * np.float32(size)
    return party(model, f"quant {seed}")


def settings(folder, n_bytes: int = 1 << 30) -> Settings:
    return Settings(EXACT, n_bytes, folder)


def run(base, quants, folder, text=TEXT, identity="identity", progress=lambda part: None):
    return compare(Comparison(base, quants, text, settings(folder), identity), progress)


def logits_of(one: Party) -> np.ndarray:
    """f32[n_chunks, n_scored, n_vocab], of the scored positions."""
    logits = all_logits(passed(stream_of(one.weights, CHUNKS)))
    return logits.reshape(N_CHUNKS, N_CTX, -1)[:, scored_positions(N_CTX)]


def trail(one: Party) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Hidden state and routing after each layer."""
    stream = stream_of(one.weights, CHUNKS)
    found = []
    with torch.inference_mode():
        stream.embed()
        for layer in range(N_LAYERS):
            stream.advance(layer)
            found.append((stream.hidden.read(0, CHUNKS.size).double().numpy(), stream.routing))
    return found


@pytest.fixture(scope="module")
def base() -> Party:
    return party(moe_model(), "base")


def test_a_model_compared_with_itself_has_no_divergence(base, tmp_path):
    scores, traces, _ = run(base, [base], tmp_path)
    assert np.abs(scores.kld).max() < 1e-12
    assert scores.same_top.all()
    assert not scores.dp.any()
    assert not traces.hidden.any()
    np.testing.assert_array_equal(traces.router[0], [np.nan, 0, 0])


def test_scores_are_those_of_whole_logits(base, tmp_path):
    quant = perturbed(1)
    scores, _, _ = run(base, [quant], tmp_path)
    p, q = logits_of(base), logits_of(quant)
    log_p, log_q = log_softmax(p), log_softmax(q)
    targets = CHUNKS[:, [i + 1 for i in scored_positions(N_CTX)], None]
    nll_p, nll_q = (-np.take_along_axis(x, targets, 2).ravel() for x in (log_p, log_q))
    kld = (np.exp(log_p) * (log_p - log_q)).sum(-1).ravel()
    np.testing.assert_allclose(scores.nll_base, nll_p, rtol=1e-6)
    np.testing.assert_allclose(scores.nll[0], nll_q, rtol=1e-6)
    np.testing.assert_allclose(scores.kld[0], kld, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(scores.dp[0], np.exp(-nll_q) - np.exp(-nll_p), atol=1e-6)
    summary = summarise(scores, 0, window=WINDOW)
    assert summary["n_tokens"] == N_CHUNKS * WINDOW
    assert summary["kld_mean"] == pytest.approx(mean_kl(p, q), rel=1e-6)
    assert summary["same_top_p"] == pytest.approx(100 * same_top1(p, q))
    assert 1e-4 < summary["kld_mean"] < 1


def test_portions_and_tiles_change_nothing(base, tmp_path, monkeypatch):
    quant = perturbed(1)
    whole, _, _ = run(base, [quant], tmp_path / "whole")
    monkeypatch.setattr(module, "_HEAD_TOKENS", 3)
    monkeypatch.setattr("quantkit.forward.matrices._TILE_BYTES", 4 * 32 * 7)
    parts, _, _ = run(base, [quant], tmp_path / "parts")
    np.testing.assert_allclose(parts.kld, whole.kld, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(parts.same_top, whole.same_top)


def test_bos_is_seen_and_not_predicted(base, tmp_path):
    with_bos = Windows.of(CHUNKS, 7)
    np.testing.assert_array_equal(with_bos.chunks, CHUNKS)
    assert (with_bos.inputs[:, 0] == 7).all()
    scores, _, _ = run(base, [base], tmp_path, with_bos)
    plain, _, _ = run(base, [base], tmp_path)
    assert (scores.nll_base != plain.nll_base).any()


def test_traces_are_the_distances_of_hidden_states_and_choices(base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COMPARED_BYTES", 4 * 32 * 9)  # pieces of 9 tokens
    quant = perturbed(2)
    _, traces, _ = run(base, [quant], tmp_path)
    for layer, ((h, chosen), (other, others)) in enumerate(
        zip(trail(base), trail(quant), strict=True)
    ):
        error = np.linalg.norm(other - h) / np.linalg.norm(h)
        assert traces.hidden[0, layer] == pytest.approx(error, rel=1e-6)
        if chosen is not None:
            lost = sum(len(set(a) - set(b)) for a, b in zip(chosen, others, strict=True))
            assert traces.router[0, layer] == pytest.approx(lost / chosen.size)
    assert traces.router[0, 1] > 0
    assert [line.layer for line in traces.layers(0)] == [0, 1, 2]
    assert traces.layers(0)[0].router_disagreement is None


def test_router_disagreement_counts_choices_that_the_other_does_not_make():
    base = np.array([[0, 1], [0, 1], [2, 3], [0, 3]], np.int16)
    quant = np.array([[0, 1], [1, 2], [0, 1], [0, 2]], np.int16)
    assert module._differing(base, quant) == 0 + 1 + 2 + 1


def test_several_quants_in_a_sweep_get_what_each_gets_alone(base, tmp_path):
    quants = [perturbed(1), perturbed(2, 0.02), base]
    together, traces, _ = run(base, quants, tmp_path / "together")
    for k, quant in enumerate(quants):
        alone, trace, _ = run(base, [quant], tmp_path / str(k))
        for name in ("nll", "kld", "same_top", "dp"):
            np.testing.assert_array_equal(getattr(together, name)[k], getattr(alone, name)[0])
        np.testing.assert_array_equal(traces.hidden[k], trace.hidden[0])
        np.testing.assert_array_equal(traces.router[k], trace.router[0])


def test_hidden_states_on_disk_change_nothing(base, tmp_path):
    quant = perturbed(1)
    in_memory, _, _ = run(base, [quant], tmp_path / "a")
    job = Comparison(base, [quant], TEXT, settings(tmp_path / "b", 0), "identity")
    on_disk, _, _ = compare(job, lambda part: None)
    np.testing.assert_array_equal(in_memory.kld, on_disk.kld)


def test_a_killed_comparison_goes_on_with_its_traces(base, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.forward.sweep._SHARE", 1e9)
    quant = perturbed(1)
    done = 0.0

    def kill(part: float) -> None:
        nonlocal done
        done += part
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, [quant], tmp_path / "killed", progress=kill)
    told: list[float] = []
    resumed, traces, _ = run(base, [quant], tmp_path / "killed", progress=told.append)
    assert told[0] == pytest.approx(1 / N_LAYERS)
    assert sum(told) == pytest.approx(1)
    whole, undisturbed, _ = run(base, [quant], tmp_path / "whole")
    np.testing.assert_array_equal(resumed.kld, whole.kld)
    np.testing.assert_array_equal(traces.hidden, undisturbed.hidden)
    np.testing.assert_array_equal(traces.router, undisturbed.router)


@pytest.mark.parametrize("other", ["identity", "text", "settings"])
def test_the_state_of_another_comparison_is_not_taken_up(other, base, tmp_path):
    run(base, [base], tmp_path)
    told: list[float] = []
    text, identity, how = TEXT, "identity", settings(tmp_path)
    if other == "identity":
        identity = "another model"
    elif other == "text":
        text = Windows.of(CHUNKS[::-1].copy(), None)
    else:
        from quantkit.forward.matrices import Compute

        how = Settings(Compute(activations="llama.cpp"), 1 << 30, tmp_path)
    compare(Comparison(base, [base], text, how, identity), told.append)
    assert told[0] == 0


@pytest.fixture
def base_file(base, tmp_path) -> BaseFile:
    path = tmp_path / "base.logits"
    save_base(base, TEXT, settings(tmp_path / "work"), "identity", path, lambda part: None)
    return BaseFile(path)


def test_a_base_file_is_the_one_written_from_whole_logits(base, base_file, tmp_path):
    path = tmp_path / "whole.logits"
    with LogitsWriter(path, CHUNKS, N_VOCAB) as writer:
        writer.write_rows(0, logits_of(base).reshape(-1, N_VOCAB))
        writer.commit()
    ours, whole = BaseFile(base_file.path), BaseFile(path)
    assert ours.path.stat().st_size == path.stat().st_size
    np.testing.assert_array_equal(ours.tokens, CHUNKS)
    for chunk in range(N_CHUNKS):  # products of other shapes differ in their last bits
        np.testing.assert_allclose(ours.chunk(chunk), whole.chunk(chunk), atol=16 / 65535)


def test_a_base_file_scores_as_the_model_does_within_its_16_bits(base, base_file, tmp_path):
    quants = [perturbed(1), perturbed(2)]
    live, _, _ = run(base, quants, tmp_path)
    stored, traces, _ = run(base_file, quants, tmp_path)
    assert traces is None
    np.testing.assert_array_equal(stored.nll, live.nll)
    np.testing.assert_allclose(stored.nll_base, live.nll_base, atol=16 / 65535)
    np.testing.assert_allclose(stored.kld, live.kld, atol=1e-4)
    np.testing.assert_allclose(stored.kld.mean(1), live.kld.mean(1), rtol=1e-3)


def test_a_model_of_another_depth_is_refused(base, tmp_path):
    with pytest.raises(UsageError, match=r"layers 2, the base model base has 3"):
        run(base, [perturbed(1, n_layers=2)], tmp_path)


def other_vocabulary() -> Party:
    model = moe_model()
    for name in ("token_embd.weight", "output.weight"):
        model.arrays[name] = model.arrays[name][:39]
    return party(model, "smaller")


def test_a_model_of_another_vocabulary_is_refused(base, tmp_path):
    with pytest.raises(UsageError, match=r"smaller: vocabulary 39, the base model base has 40"):
        run(base, [other_vocabulary()], tmp_path)


def test_a_base_file_of_another_vocabulary_is_refused(base_file, tmp_path):
    with pytest.raises(UsageError, match=r"vocabulary of 40, smaller's has 39"):
        run(base_file, [other_vocabulary()], tmp_path)


def test_a_base_file_of_another_text_is_refused(base, base_file, tmp_path):
    with pytest.raises(UsageError, match="tokens are not those of the text"):
        run(base_file, [base], tmp_path, Windows.of(CHUNKS[::-1].copy(), None))
