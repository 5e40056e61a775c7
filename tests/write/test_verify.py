"""Verification finds every change to a set that has a manifest, and says where it is."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import pytest

from quantkit.container.kv import string, u32
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.container.reader import read_gguf
from quantkit.errors import GgufError, NonFiniteError
from quantkit.types import GgmlType
from quantkit.write import verify as verify_module
from quantkit.write.manifest import manifest_path
from quantkit.write.verify import verify
from tests.builders.gguf import gguf_bytes, info, write_manifest, write_shards

KVS = {"general.architecture": string("deepseek2"), "deepseek2.block_count": u32(1)}
TENSORS = [
    TensorEntry("token_embd.weight", (6, 64), GgmlType.Q8_0),
    TensorEntry("norm.weight", (2, 5), GgmlType.F32),
    TensorEntry("blk.0.ffn_up_exps.weight", (4, 2, 256), GgmlType.IQ1_M),
    TensorEntry("blk.0.ffn_gate_exps.weight", (4, 2, 256), GgmlType.IQ1_M),
    TensorEntry("blk.0.ffn_down_exps.weight", (4, 3, 32), GgmlType.Q4_0),
    TensorEntry("output.weight", (2, 256), GgmlType.Q6_K),
]


@pytest.fixture
def made(tmp_path) -> Path:
    """Three shards of two tensors each, with their manifest."""
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=None, max_shard_tensors=2)
    data = write_shards(tmp_path, layouts)
    write_manifest(tmp_path, "m", layouts, data, n_slabs=2)
    return tmp_path


def shard(folder: Path, no: int) -> Path:
    return folder / f"m-{no:05d}-of-00003.gguf"


def place(folder: Path, name: str):
    """(file, tensor) of a tensor."""
    for no in (1, 2, 3):
        for tensor in read_gguf(shard(folder, no)).tensors:
            if tensor.name == name:
                return shard(folder, no), tensor
    raise KeyError(name)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def texts(report) -> str:
    return "\n".join(map(str, report.problems))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("no", [1, 2, 3])
def test_an_untouched_set_is_sound(made, no, threads):
    heard = []
    report = verify(shard(made, no), threads=threads, on_bytes=heard.append)
    assert report.ok, texts(report)
    assert report.exit_code == 0
    assert report.manifest == manifest_path(made, "m")
    assert sum(heard) == sum(t.n_bytes for _, t in report.shards.tensors())


def test_digests_do_not_depend_on_how_the_work_is_cut(made, monkeypatch):
    for read_bytes, job_bytes, job_chunks in ((300, 1, 1), (1000, 700, 2), (1 << 20, 1 << 20, 3)):
        monkeypatch.setattr(verify_module, "_READ_BYTES", read_bytes)
        monkeypatch.setattr(verify_module, "_JOB_BYTES", job_bytes)
        monkeypatch.setattr(verify_module, "_JOB_CHUNKS", job_chunks)
        report = verify(shard(made, 1), threads=2)
        assert report.ok, texts(report)


def change(rng: random.Random, folder: Path) -> str:
    """Damage the set in one of the ways that disks, networks and people do; says how."""
    paths = [shard(folder, no) for no in (1, 2, 3)]
    path, other = rng.sample(paths, 2)
    content = path.read_bytes()
    kind = rng.choice(["flip"] * 6 + ["cut", "grow", "remove", "swap", "copy", "zero", "move"])
    if kind == "flip":
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        overwrite(path, at, bytes([content[at] ^ 1 << bit]))
        return f"flip bit {bit} of byte {at} in {path.name}"
    if kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "grow":
        path.write_bytes(content + bytes(rng.randrange(1, 100)))
    elif kind == "remove":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "copy":
        path.write_bytes(other.read_bytes())
    elif kind == "zero":
        at = rng.randrange(len(content))
        run = content[at : at + rng.randrange(1, 400)]
        if not any(run):
            return ""
        overwrite(path, at, bytes(len(run)))
    else:
        at, to = rng.randrange(len(content)), rng.randrange(len(content))
        moved = content[at : at + 16]
        if content[to : to + len(moved)] == moved or to + len(moved) > len(content):
            return ""
        overwrite(path, to, moved)
    return f"{kind} {path.name}"


def test_every_random_change_to_any_shard_is_found(made, tmp_path_factory):
    rng = random.Random(42)
    pristine = {path: path.read_bytes() for path in made.iterdir()}
    n_changes = 0
    while n_changes < 1000:
        what = change(rng, made)
        if what:
            n_changes += 1
            left = next(path for path in pristine if path.suffix == ".gguf" and path.exists())
            report = verify(left)
            assert report.exit_code == 6, what
        for path, content in pristine.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
    assert verify(shard(made, 1)).ok


def test_every_flipped_byte_of_a_shard_is_found(made):
    path = shard(made, 1)
    content = path.read_bytes()
    for at in range(len(content)):
        overwrite(path, at, bytes([content[at] ^ 0x10]))
        assert not verify(path).ok, at
        overwrite(path, at, content[at : at + 1])
    assert verify(path).ok


def test_a_changed_tensor_is_named_and_its_neighbours_are_not(made):
    path, tensor = place(made, "blk.0.ffn_gate_exps.weight")
    overwrite(path, tensor.end - 60, b"\1\2\3")
    (problem,) = verify(shard(made, 1)).problems
    assert isinstance(problem, GgufError)
    assert problem.where == f"{path}, tensor blk.0.ffn_gate_exps.weight"


def test_tensors_of_one_shape_in_each_others_place_are_found(made):
    path, up = place(made, "blk.0.ffn_up_exps.weight")
    _, gate = place(made, "blk.0.ffn_gate_exps.weight")
    content = path.read_bytes()
    overwrite(path, up.begin, content[gate.begin : gate.end])
    overwrite(path, gate.begin, content[up.begin : up.end])
    report = verify(path)
    assert [p.where.split("tensor ")[1] for p in report.problems] == [up.name, gate.name]


def test_padding_that_is_not_zero_is_found(made):
    path, tensor = place(made, "norm.weight")
    overwrite(path, tensor.end + 3, b"\1")
    assert "tensor norm.weight: the padding behind it is not zero" in texts(verify(path))


def test_a_longer_file_of_the_same_content_is_found_by_its_size(made):
    path, tensor = place(made, "norm.weight")
    path.write_bytes(path.read_bytes()[: tensor.end])
    size = path.stat().st_size
    assert f"{size} bytes, expected {size + 24}" in texts(verify(path))


def test_all_problems_of_a_set_are_told(made):
    shard(made, 2).unlink()
    for name in ("token_embd.weight", "output.weight"):
        path, tensor = place_in(made, name)
        overwrite(path, tensor.begin, b"\x07\x07\x07")
    report = verify(shard(made, 1))
    text = texts(report)
    assert "m-00002-of-00003.gguf" in text
    assert "tensor token_embd.weight" in text
    assert "tensor output.weight" in text
    assert report.exit_code == 6


def place_in(folder: Path, name: str):
    paths = sorted(folder.glob("m-*.gguf"))
    return next((p, t) for p in paths for t in read_gguf(p).tensors if t.name == name)


@pytest.mark.parametrize(
    ("name", "at", "bad", "block"),
    [
        ("norm.weight", 4 * 7, struct.pack("<f", float("nan")), 7),
        ("token_embd.weight", 34 * 9, b"\x00\x7c", 9),
        ("blk.0.ffn_down_exps.weight", 18 * 11, b"\x01\xfe", 11),
        ("output.weight", 210 * 2 - 2, b"\x00\xfc", 1),
        ("blk.0.ffn_up_exps.weight", 56 * 7 + 48, b"\xf0" * 8, 7),
    ],
)
def test_a_block_that_is_not_finite_is_named(tmp_path, name, at, bad, block):
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=None, max_shard_tensors=2)
    data = write_shards(tmp_path, layouts)
    raw = bytearray(data[name])
    raw[at : at + len(bad)] = bad
    path, tensor = place(tmp_path, name)
    overwrite(path, tensor.begin, raw)
    for has_manifest in (False, True):  # written that way: the digest is right
        if has_manifest:
            write_manifest(tmp_path, "m", layouts, data | {name: bytes(raw)}, n_slabs=2)
        report = verify(shard(tmp_path, 1), threads=2)
        (problem,) = report.problems
        assert isinstance(problem, NonFiniteError)
        assert problem.where == f"{path}, tensor {name}"
        assert problem.message.startswith(f"block {block} holds")
        assert report.exit_code == 7


def test_damage_outranks_nan_in_the_exit_code(made):
    path, tensor = place(made, "norm.weight")
    overwrite(path, tensor.begin, struct.pack("<f", float("inf")))
    report = verify(path)
    assert {type(p) for p in report.problems} == {GgufError, NonFiniteError}
    assert report.exit_code == 6


def test_quick_reads_headers_and_sizes_only(made):
    path, tensor = place(made, "output.weight")
    overwrite(path, tensor.begin, b"\7" * 32)
    assert verify(path, deep=False).ok
    overwrite(path, 30, b"\7")
    assert not verify(path, deep=False).ok


def test_a_set_of_another_model_under_the_same_names_is_found(made, tmp_path):
    kvs = KVS | {"deepseek2.block_count": u32(2)}
    write_shards(made, lay_out("m", kvs, TENSORS, max_shard_bytes=None, max_shard_tensors=2))
    report = verify(shard(made, 1), deep=False)
    assert "the header is not the one that was written" in texts(report)


def test_a_file_that_the_manifest_does_not_know_is_found(made):
    whole = made / "m.gguf"
    write_shards(made, lay_out("m", KVS, TENSORS, max_shard_bytes=None))
    assert "m.gguf: not in the manifest" in texts(verify(whole, deep=False))


def test_a_shard_that_only_the_manifest_knows_is_found(made):
    for no in (1, 2, 3):
        shard(made, no).unlink()
    write_shards(made, lay_out("m", KVS, TENSORS, max_shard_bytes=None))
    assert "m-00002-of-00003.gguf: in the manifest but missing" in texts(verify(made / "m.gguf"))


def test_a_manifest_that_leaves_a_tensor_out_is_found(made):
    content = json.loads(manifest_path(made, "m").read_bytes())
    del content["shards"][1]["tensors"][0]
    manifest_path(made, "m").write_text(json.dumps(content))
    assert f"{shard(made, 2)}: the tensors are not those of the manifest" in texts(
        verify(shard(made, 1), deep=False)
    )


def test_a_damaged_manifest_is_a_problem(made):
    manifest_path(made, "m").write_bytes(b"{}")
    report = verify(shard(made, 1))
    assert "not a manifest" in texts(report)
    assert report.manifest is None
    assert report.exit_code == 6


def test_without_a_manifest_structure_and_content_are_checked(made):
    manifest_path(made, "m").unlink()
    report = verify(shard(made, 1))
    assert report.ok
    assert report.manifest is None
    path = shard(made, 3)
    path.write_bytes(path.read_bytes()[:-40])
    assert not verify(shard(made, 1)).ok


def test_what_is_no_gguf_file_is_a_problem_not_an_exception(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"hello")
    assert verify(tmp_path / "x.gguf").exit_code == 6
    assert verify(tmp_path / "absent.gguf").exit_code == 6


def test_a_file_that_shrinks_meanwhile_is_a_problem(made):
    path, _ = place(made, "output.weight")

    def cut(n_bytes: int) -> None:
        with path.open("r+b") as file:
            file.truncate(700)

    assert "shrank while it was read" in texts(verify(path, on_bytes=cut))


@pytest.mark.slow
def test_offsets_beyond_4_gib(tmp_path):
    n = (5 << 30) // 34 * 34
    ne = n // 34 * 32
    path = tmp_path / "big.gguf"
    infos = [info("a", (ne,), GgmlType.Q8_0), info("b", (4,), offset=-(-n // 32) * 32)]
    path.write_bytes(gguf_bytes(infos=infos))
    tensors_end = path.stat().st_size + -(-n // 32) * 32 + 16
    with path.open("r+b") as file:
        file.truncate(tensors_end)
    overwrite(path, tensors_end - 4, struct.pack("<f", float("nan")))
    overwrite(path, path.stat().st_size - 16 - 34 - (-n % 32), b"\x00\x7c")
    report = verify(path, threads=2)
    assert [p.message.split()[1] for p in report.problems] == [str(n // 34 - 1), "3"]


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    # One chunk of 64 MiB, as a careless or hostile manifest may have it.
    import tracemalloc

    n_rows = 1 << 14
    layouts = lay_out(
        "m", KVS, [TensorEntry("a", (n_rows, 1024), GgmlType.F32)], max_shard_bytes=None
    )
    data = write_shards(tmp_path, layouts)
    write_manifest(tmp_path, "m", layouts, data, chunk_rows=n_rows)
    del data
    tracemalloc.start()
    try:
        assert verify(tmp_path / "m.gguf").ok
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    shutil.rmtree(tmp_path)
    assert peak < 24 << 20
