"""What becomes of a token depends on its span alone, and of a share on nobody's but its own run."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import OutputError, UsageError
from quantkit.forward.spans import (
    SPAN_TOKENS,
    Spans,
    clear_shares,
    hand_over,
    share_folder,
    shares,
)
from quantkit.forward.stream import Sequences, Stream
from tests.forward.support import all_logits, moe_model, passed, stream_of

N_SEQ, N_CTX = 11, 12
IDS = np.random.default_rng(3).integers(0, 40, (N_SEQ, N_CTX))
SPANS = Spans.of(IDS.shape, 3 * N_CTX)


def test_spans_are_whole_sequences_of_about_8192_tokens():
    assert Spans.of((100, 512)).n_each == 16
    assert Spans.of((100, 500)).n_each == 16
    assert Spans.of((100, SPAN_TOKENS + 1)).n_each == 1
    assert len(Spans.of((33, 512))) == 3
    assert Spans.of((33, 512)).ends(range(1, 3)) == (8192, 8192 + 512)


@given(st.integers(1, 300), st.integers(1, 300))
def test_shares_are_all_spans_once_and_as_equal_as_can_be(n_spans, n_workers):
    cut = shares(n_spans, n_workers)
    assert [span for share in cut for span in share] == list(range(n_spans))
    assert len(cut) == min(n_spans, n_workers)
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 100), st.integers(1, 50))
def test_shares_cut_the_text_into_the_same_spans_for_any_number_of_workers(
    n_seq, n_ctx, n_tokens, n_workers
):
    spans = Spans.of((n_seq, n_ctx), n_tokens)
    lengths = np.diff(spans.ends(spans.all()), prepend=0).tolist()
    found: list[int] = []
    for share in shares(len(spans), n_workers):
        mine = spans.chunks(share)
        ends = spans.ends(share)
        assert ends[-1] == (mine.stop - mine.start) * n_ctx
        found += np.diff(ends, prepend=0).tolist()
    assert found == lengths
    assert sum(lengths) == n_seq * n_ctx


@pytest.mark.parametrize("share", [range(0, 0), range(2, 5), range(-1, 2), range(0, 4, 2)])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(UsageError, match="no share of 4 spans"):
        SPANS.check(share)


@pytest.mark.parametrize("n_block", [4, 20, 1000])
def test_blocks_end_where_spans_end(n_block, monkeypatch):
    monkeypatch.setattr(Stream, "n_block", n_block)
    stream = stream_of(moe_model(), Sequences.share(IDS, SPANS, range(1, 4)))
    ends = set(SPANS.ends(range(1, 4)))
    for cut in (
        list(stream.token_blocks()),
        [(begin, end) for begin, end, _ in stream.sequence_blocks()],
    ):
        assert [begin for begin, _ in cut] == [0, *(end for _, end in cut[:-1])]
        assert ends <= {end for _, end in cut}
        assert cut[-1][1] == 8 * N_CTX
    assert all(sum(n) == end - begin for begin, end, n in stream.sequence_blocks())


@pytest.mark.parametrize("n_block", [20, 1000])
@pytest.mark.parametrize("n_workers", [1, 2, 3, 9])
def test_a_share_has_the_bits_of_the_whole(n_workers, n_block, monkeypatch):
    monkeypatch.setattr(Stream, "n_block", n_block)
    model = moe_model()

    def states(share: range) -> np.ndarray:
        stream = passed(stream_of(model, Sequences.share(IDS, SPANS, share)))
        return stream.hidden.read(0, len(stream.sequences)).numpy()

    whole = states(SPANS.all())
    parts = [states(share) for share in shares(len(SPANS), n_workers)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_spans_change_no_more_than_last_bits():
    model = moe_model()
    one = all_logits(passed(stream_of(model, IDS)))
    many = all_logits(passed(stream_of(model, Sequences.share(IDS, SPANS, SPANS.all()))))
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)


class Seen:
    """An observer: (kind, weight, row, span) -> tokens."""

    def __init__(self, few: int) -> None:
        self.few, self.span, self.counts = few, 0, {}

    def enter(self, span: int) -> None:
        self.span = span

    def _add(self, key, x) -> None:
        self.counts[key] = self.counts.get(key, 0) + len(x)

    def see(self, names, x, row=0, n_rows=1) -> None:
        self._add(("own", names[-1], row, self.span), x)

    def wants_prior(self, name, n_tok) -> bool:
        return n_tok < self.few

    def see_prior(self, name, x, row, n_rows) -> None:
        self._add(("prior", name, row, self.span), x)


def seen(share: range, few: int) -> dict:
    seen = Seen(few)
    sequences = Sequences.share(IDS, SPANS, share)
    stream = stream_of(moe_model(2), sequences, observer=seen)
    stream._on_span = seen.enter
    passed(stream)
    stream.observe_output()
    return seen.counts


def test_the_observer_is_told_whose_tokens_it_sees():
    counts = seen(SPANS.all(), 0)
    for name in ("blk.0.attn_output.weight", "blk.1.ffn_gate_inp.weight", "output.weight"):
        found = [counts["own", name, 0, span] for span in SPANS.all()]
        assert found == [36, 36, 36, 24], name
    down = "blk.1.ffn_down_exps.weight"
    for span, n_tok in enumerate((36, 36, 36, 24)):
        routed = sum(counts.get(("own", down, expert, span), 0) for expert in range(4))
        assert routed == 2 * n_tok, "two experts for each token"
    assert not any(kind == "prior" for kind, *_ in counts)


@pytest.mark.parametrize("few", [50, 70, 75, 1000])
def test_experts_that_see_few_tokens_in_all_get_a_sample_whoever_has_the_spans(few):
    down, whole = "blk.1.ffn_down_exps.weight", seen(SPANS.all(), few)
    for expert in range(4):
        own = sum(whole.get(("own", down, expert, span), 0) for span in SPANS.all())
        prior = [whole.get(("prior", down, expert, span), 0) for span in SPANS.all()]
        if own < few:
            assert any(prior)
    if few == 1000:  # the text is shorter than the sample, which is all of it
        assert prior == [36, 36, 36, 24]
    alone = {}
    for span in SPANS.all():
        for (*key, _), n in seen(range(span, span + 1), few).items():
            alone[*key, span] = n
    assert alone == whole


def test_without_spans_the_sample_is_256_tokens_of_all():
    ids = np.random.default_rng(3).integers(0, 40, (30, 20))
    observer = Seen(10**6)
    passed(stream_of(moe_model(2), ids, observer=observer))
    priors = {key: n for key, n in observer.counts.items() if key[0] == "prior"}
    assert len(priors) == 4
    assert set(priors.values()) == {256}


def test_weights_are_read_once_for_all_spans():
    model, reads = moe_model(), []
    read = model.read
    model.read = lambda name, begin, end: reads.append((name, begin)) or read(name, begin, end)
    passed(stream_of(model, Sequences.share(IDS, SPANS, SPANS.all())))
    large = [place for place in reads if "norm" not in place[0] and "token_embd" not in place[0]]
    assert len(large) == len(set(large)) > 40


@pytest.mark.parametrize("n_bytes", [0, 5000])
def test_weights_that_are_too_large_to_be_kept_change_nothing(n_bytes, monkeypatch):
    sequences = Sequences.share(IDS, SPANS, SPANS.all())
    kept = all_logits(passed(stream_of(moe_model(), sequences)))
    monkeypatch.setattr("quantkit.forward.keeping._KEPT_BYTES", n_bytes)
    np.testing.assert_array_equal(all_logits(passed(stream_of(moe_model(), sequences))), kept)


SHARE = range(3, 5)


def test_a_share_finds_its_folder_again_after_a_kill(tmp_path):
    with pytest.raises(KeyboardInterrupt), share_folder(tmp_path, SHARE) as folder:
        (folder / "sweep.state").write_bytes(b"x")
        raise KeyboardInterrupt
    with share_folder(tmp_path, SHARE) as again:
        assert again == folder
        assert (again / "sweep.state").read_bytes() == b"x"
    assert [path.name for path in tmp_path.rglob("*")] == ["share-00003-00005"]
    clear_shares(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_double_has_a_folder_of_its_own_that_does_not_stay(tmp_path):
    with share_folder(tmp_path, SHARE) as first:
        with share_folder(tmp_path, SHARE) as second:
            assert second != first
            (second / "m").write_bytes(b"whole")
            hand_over(second / "m", tmp_path)
        with pytest.raises(ValueError, match="x"), share_folder(tmp_path, SHARE) as third:
            (third / "half").write_bytes(b"")
            raise ValueError("x")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m", first.name]


def _hold(folder: Path, begun, done) -> None:
    with share_folder(folder, SHARE) as mine:
        (mine / "sweep.state").write_bytes(b"of the other process")
        begun.set()
        done.wait(30)


def test_a_double_in_another_process_has_too(tmp_path):
    context = multiprocessing.get_context("spawn")
    begun, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, begun, done))
    other.start()
    try:
        assert begun.wait(60)
        with share_folder(tmp_path, SHARE) as mine:
            assert list(mine.iterdir()) == []
        other.kill()
        other.join(30)
        with share_folder(tmp_path, SHARE) as mine:  # free again, with what the other left
            assert (mine / "sweep.state").read_bytes() == b"of the other process"
    finally:
        other.kill()
        other.join(30)


def test_a_work_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="file"), share_folder(tmp_path / "file", SHARE):
        pass


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
