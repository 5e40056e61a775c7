"""A sweep that was killed goes on where it stopped, and believes no file that it did not write."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.forward.sweep import Settings, Sweep, clear_state
from tests.forward.support import EXACT, all_logits, moe_model, stream_of

N_LAYERS = 3
IDS = np.random.default_rng(3).integers(0, 40, (4, 12))


class Sums:
    """What is learnt: the sum of each stream's hidden states after each layer."""

    def __init__(self) -> None:
        self.sums = np.zeros((N_LAYERS, 2))

    def arrays(self):
        return {"sums": self.sums}

    def restore(self, arrays) -> None:
        self.sums[:] = arrays["sums"]


class KilledError(Exception):
    pass


def run(folder, *, kill_after: int | None = None, digest: str = "digest", in_memory: bool = True):
    """Two models through all layers, (first layer, sums, logits of both)."""
    settings = Settings(EXACT, 1 << 30 if in_memory else 0, folder or Path())
    memory = Sums()
    models = [moe_model(N_LAYERS, seed) for seed in (0, 1)]
    hyper = stream_of(models[0], IDS).hyper
    rows = settings.rows_for(hyper, IDS.size, 2)
    streams = [stream_of(model, IDS, rows=rows) for model in models]
    sweep = Sweep(streams, memory, folder, digest)

    def after(layer: int) -> None:
        hidden = [stream.hidden.read(0, IDS.size) for stream in streams]
        memory.sums[layer] = [float(h.sum()) for h in hidden]

    def tell(part: float) -> None:
        tell.parts += part
        if kill_after is not None and tell.parts > 2 * (kill_after + 1) + 0.5:
            raise KilledError  # half-way through the first model's next layer

    tell.parts = 0.0
    with torch.inference_mode():
        first = sweep.start()
        tell.parts = 2.0 * first
        sweep._save_seconds = 0.0
        sweep.run(first, after, tell)
    return first, memory.sums, [all_logits(stream) for stream in streams]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    first, sums, logits = run(tmp_path_factory.mktemp("undisturbed"))
    assert first == 0
    return sums, logits


def assert_same(result, undisturbed) -> None:
    np.testing.assert_array_equal(result[1], undisturbed[0])
    for ours, theirs in zip(result[2], undisturbed[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def always_saved(monkeypatch):
    """However long a save takes."""
    monkeypatch.setattr("quantkit.forward.sweep._SHARE", 1e9)


def killed_after(layer: int, folder, **options) -> None:
    with pytest.raises(KilledError):
        run(folder, kill_after=layer, **options)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("layer", range(N_LAYERS - 1))
def test_a_killed_sweep_ends_as_if_nothing_had_happened(
    layer, in_memory, tmp_path, undisturbed, always_saved
):
    killed_after(layer, tmp_path, in_memory=in_memory)
    result = run(tmp_path, in_memory=in_memory)
    assert result[0] == layer + 1
    assert_same(result, undisturbed)


def test_a_sweep_is_saved_behind_its_last_layer_too(tmp_path, undisturbed, always_saved):
    run(tmp_path)
    result = run(tmp_path)
    assert result[0] == N_LAYERS
    assert_same(result, undisturbed)


def test_a_sweep_without_a_folder_starts_over(undisturbed):
    for _ in range(2):
        first, _, logits = run(None)
        assert first == 0
        np.testing.assert_array_equal(logits[0], undisturbed[1][0])


def test_slow_saves_are_rare(tmp_path, monkeypatch):
    """A save may not cost more than a tenth of the time since the last one."""
    now = iter(range(0, 10**6, 10))  # every look at the clock is 10 s later
    monkeypatch.setattr("quantkit.forward.sweep.time.monotonic", lambda: float(next(now)))
    monkeypatch.setattr(Sweep, "_pieces", lambda self, layer: iter([b"x"]))
    stream = stream_of(moe_model(N_LAYERS), IDS)
    sweep = Sweep([stream], Sums(), tmp_path, "digest")
    saved = []
    monkeypatch.setattr("quantkit.forward.sweep.fs.publish", saved.append)
    with torch.inference_mode():
        sweep.run(sweep.start(), lambda layer: None, lambda part: None)
    assert len(saved) == 1


def test_clearing_leaves_nothing(tmp_path, always_saved):
    killed_after(0, tmp_path)
    (tmp_path / "sweep.state.partial").write_bytes(b"half")
    clear_state(tmp_path)
    assert list(tmp_path.iterdir()) == []


def edited(state: bytes, **changes) -> bytes:
    """The state with other values in its first line, and the sum that makes it whole."""
    head, _, rest = state.partition(b"\n")
    said = {**json.loads(head), **changes}
    whole = json.dumps(said).encode() + b"\n" + rest[:-4]
    return whole + zlib.crc32(whole).to_bytes(4, "little")


def arrays(*entries) -> dict[str, object]:
    return {"arrays": entries}


SUMS, HIDDEN = ["sums", "<f8", [N_LAYERS, 2]], ["hidden", "<f4", [IDS.size, 32]]

HOSTILE = {
    "empty": lambda s: b"",
    "one byte": lambda s: s[:1],
    "only the first line": lambda s: s[: s.index(b"\n") + 1],
    "truncated": lambda s: s[:-1000],
    "the sum is missing": lambda s: s[:-4],
    "longer": lambda s: s + b"\0",
    "a bit of an array has flipped": lambda s: s[:-500] + bytes([s[-500] ^ 1]) + s[-499:],
    "zeros for its second half": lambda s: s[: len(s) // 2] + bytes(len(s) - len(s) // 2),
    "no newline at all": lambda s: s.replace(b"\n", b" "),
    "not JSON": lambda s: b"pickle\n" + s,
    "deeply nested": lambda s: b"[" * 100_000 + b"\n" + s,
    "a list": lambda s: b"[]\n" + s,
    "another digest": lambda s: edited(s, digest="other"),
    "layer 0": lambda s: edited(s, layer=0),
    "a negative layer": lambda s: edited(s, layer=-1),
    "a layer beyond the last": lambda s: edited(s, layer=N_LAYERS + 1),
    "a layer that is text": lambda s: edited(s, layer="1"),
    "a layer that is a float": lambda s: edited(s, layer=1.0),
    "objects": lambda s: edited(s, **arrays(["sums", "|O8", [6]], HIDDEN, HIDDEN)),
    "a negative shape": lambda s: edited(s, **arrays(["sums", "<f8", [-3, -2]], HIDDEN, HIDDEN)),
    "a huge shape": lambda s: edited(s, **arrays(SUMS, ["hidden", "<f4", [1 << 62]], HIDDEN)),
    "another shape of as many": lambda s: edited(s, **arrays(["sums", "<f8", [6]], HIDDEN, HIDDEN)),
    "a stream too few": lambda s: edited(s, **arrays(SUMS, HIDDEN)),
    "a stream too many": lambda s: edited(s, **arrays(SUMS, HIDDEN, HIDDEN, HIDDEN)),
    "another name": lambda s: edited(s, **arrays(["sum", *SUMS[1:]], HIDDEN, HIDDEN)),
    "no arrays": lambda s: edited(s, arrays=[]),
    "a key more": lambda s: edited(s, more=1),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_state_that_is_not_its_own_is_not_taken_up(what, tmp_path, undisturbed, always_saved):
    killed_after(1, tmp_path)
    path = tmp_path / "sweep.state"
    path.write_bytes(HOSTILE[what](path.read_bytes()))
    result = run(tmp_path)
    assert result[0] == 0
    assert_same(result, undisturbed)


def test_an_unedited_state_is_taken_up_so_the_table_above_tests_the_edits(tmp_path, always_saved):
    killed_after(1, tmp_path)
    path = tmp_path / "sweep.state"
    path.write_bytes(edited(path.read_bytes()))
    assert run(tmp_path)[0] == 2


def test_a_state_of_another_run_is_written_over(tmp_path, always_saved):
    killed_after(1, tmp_path)
    assert run(tmp_path, digest="another text")[0] == 0
    assert run(tmp_path, digest="another text")[0] == N_LAYERS
