"""Files as large as the readers allow, in processes of their own: little time, little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import SourceError
from quantkit.source.checkpoint import open_checkpoint
from tests.builders.gguf import STRING, gguf_bytes, info, kv, text
from tests.builders.safetensors import file_bytes
from tests.faults.guarded import Apart, apart, assert_cheap
from tests.faults.jobs import write_model
from tests.faults.worst import GGUF, INDEX, SAFETENSORS

OFTEN = {"tensors of wide names", "short names"}  # the others are slow
OFTEN |= {"as many tensors as Kimi K3"}
VERBS = [("inspect",), ("inspect", "--full"), ("inspect", "--json", "--full"), ("verify",)]


def _cases(table: dict) -> list:
    marks: Any = {name: () if name in OFTEN else pytest.mark.slow for name in table}
    return [pytest.param(name, id=name, marks=marks[name]) for name in table]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """usual(verb): how it ends on a small sound file; of `plan`, on a small model."""
    known: dict[tuple, Apart] = {}
    folder = tmp_path_factory.mktemp("usual")
    small = folder / "small.gguf"
    head = kv("general.architecture", STRING, text("llama"))
    small.write_bytes(gguf_bytes([head], [info("a")], b"\0" * 128))

    def get(*verb: str) -> Apart:
        if verb not in known:
            what = write_model(folder / "model") if verb == ("plan",) else small
            known[verb] = apart(*verb, what, *(("-r", "q4_0") if verb == ("plan",) else ()))
            assert known[verb].code == 0, known[verb]
        return known[verb]

    return get


@pytest.mark.parametrize("case", _cases(GGUF))
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_the_largest_gguf_headers_are_read_in_bounds(tmp_path, usual, verb, case):
    path = tmp_path / "worst.gguf"
    path.write_bytes(GGUF[case]())
    ended = apart(*verb, path)
    assert ended.code == 0, ended
    assert_cheap(ended, usual(*verb))


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model")


@pytest.mark.parametrize("case", _cases(SAFETENSORS))
def test_the_largest_safetensors_headers_are_read_in_bounds(model, usual, case):
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors").write_bytes(SAFETENSORS[case]())
    ended = apart("plan", model, "-r", "q4_0")
    assert ended.code == 3
    assert "tensor embed_tokens.weight is missing" in ended.err
    assert_cheap(ended, usual("plan"))


@pytest.mark.parametrize("case", _cases(INDEX))
def test_the_largest_indices_are_read_in_bounds(model, usual, case):
    (model / "model.safetensors.index.json").write_text(INDEX[case]())
    ended = apart("plan", model, "-r", "q4_0")
    assert ended.code == 3
    assert "cannot be opened: No such file" in ended.err
    assert_cheap(ended, usual("plan"))


@pytest.mark.parametrize("n_shards", [4096, 4097])
def test_a_folder_full_of_shards_is_read_in_bounds_or_refused(model, usual, n_shards):
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors").unlink()
    for n in range(n_shards):
        one = f'{{"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}'
        (model / f"{n}.safetensors").write_bytes(file_bytes(one))
    ended = apart("plan", model, "-r", "q4_0")
    assert ended.code == 3
    assert ("is missing" if n_shards == 4096 else "more than 4,096 shards") in ended.err
    assert_cheap(ended, usual("plan"))


@pytest.mark.parametrize("has_index", [True, False])
def test_a_checkpoint_of_more_tensors_than_any_is_refused(model, monkeypatch, has_index):
    if not has_index:
        (model / "model.safetensors.index.json").unlink()
    open_checkpoint(model).close()
    monkeypatch.setattr("quantkit.source.index.MAX_TENSORS", 20)
    with pytest.raises(SourceError, match="more than 20 tensors"):
        open_checkpoint(model)
