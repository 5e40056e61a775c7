"""A GGUF file as a source: roles by name, blocks by row, and no trust in what a file says."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import TENSOR_NAMES

from quantkit.arch.gguf_names import UNKNOWN, describe_gguf, role_of, unknown
from quantkit.container.kv import string, u32
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.errors import GgufError, NonFiniteError, SourceError
from quantkit.plan.build import can_repack
from quantkit.quantize.codec import How, encodable
from quantkit.quantize.tiles import Encoding, encode_tile
from quantkit.source.gguf import GgufSource, open_gguf
from quantkit.types import GgmlType, PlannedTensor, WeightFormat
from tests.builders.gguf import write_shards
from tests.quantize.ggml import ggml_decode

ENCODING = Encoding(How())


def written(folder: Path, *tensors: TensorEntry, kvs=None, n_per_shard=None, stem="m") -> Path:
    """A file or set with random finite data; gives the first file."""
    given = {"general.architecture": string("llama")} if kvs is None else kvs
    layouts = lay_out(stem, given, tensors, max_shard_bytes=None, max_shard_tensors=n_per_shard)
    write_shards(folder, layouts)
    return folder / layouts[0].file_name


def matrix(type_=GgmlType.Q8_0, shape=(6, 256), name="blk.0.ffn_up.weight") -> TensorEntry:
    return TensorEntry(name, shape, type_)


def planned(source: GgufSource, name: str, type_: GgmlType) -> PlannedTensor:
    """A tensor with tiles of two rows."""
    model = describe_gguf(source.arch, source.kvs, source.weights)
    (spec,) = (t for t in model.tensors if t.name == name)
    repack = can_repack(spec, type_)
    rows = spec.grid[0] // len(spec.slabs)
    return PlannedTensor(spec, type_, type_, repack, 0, 0, 0, rows, 2)


def encoded(source: GgufSource, tensor: PlannedTensor) -> bytes:
    """All tiles, one after the other."""
    tiles = (encode_tile(source, (tensor,), (0, k), ENCODING) for k in range(tensor.n_tiles))
    return b"".join(bytes(tile.data) for tile in tiles)


def stored(source: GgufSource, name: str) -> np.ndarray:
    ref = source.weights[name].data
    raw = (source.shards.folder / ref.file).read_bytes()[ref.begin : ref.end]
    return np.frombuffer(raw, np.uint8)


class TestRoles:
    @pytest.mark.parametrize(
        ("name", "role", "layer"),
        [
            ("token_embd.weight", "token_embd", None),
            ("per_layer_token_embd.weight", "token_embd", None),
            ("output.weight", "output", None),
            ("output_norm.weight", "norm", None),
            ("blk.0.attn_norm.weight", "norm", 0),
            ("blk.12.attn_q.weight", "attention.q", 12),
            ("blk.12.attn_q.bias", "attention.q", 12),
            ("blk.3.attn_k_norm.weight", "norm", 3),
            ("blk.3.attn_output.weight", "attention.output", 3),
            ("blk.3.attn_qkv.weight", "attention.qkv", 3),
            ("blk.60.attn_kv_a_mqa.weight", "attention.kv_a", 60),
            ("blk.60.attn_k_b.weight", "attention.k_b", 60),
            ("blk.60.attn_v_b.weight", "attention.v_b", 60),
            ("blk.2.attn_kv_b.weight", "attention.kv_b", 2),
            ("blk.7.ffn_down.weight", "dense_ffn.down", 7),
            ("blk.7.ffn_gate_exps.weight", "routed_expert.gate", 7),
            ("blk.7.ffn_gate_up_exps.weight", "routed_expert.gate", 7),
            ("blk.7.ffn_down_exps.weight", "routed_expert.down", 7),
            ("blk.7.ffn_up_shexp.weight", "shared_expert.up", 7),
            ("blk.7.ffn_gate_inp.weight", "router", 7),
            ("blk.7.exp_probs_b.bias", "router_bias", 7),
            ("blk.7.ssm_out.weight", "ssm.out", 7),
            ("blk.7.time_mix_key.weight", "time_mix.key", 7),
            ("dec.blk.7.cross_attn_q.weight", "cross_attention.q", 7),
            ("v.blk.7.attn_qkv.weight", "vision.attn_qkv", 7),
            ("v.patch_embd.weight", "vision.patch_embd", None),
            ("mm.1.weight", "projector", None),
            ("a.blk.2.ffn_up.weight", "audio.ffn_up", 2),
            ("blk.7.something_new.weight", UNKNOWN, 7),
            ("something_new.weight", UNKNOWN, None),
        ],
    )
    def test_come_from_llama_cpps_names(self, name, role, layer):
        assert role_of(name) == (role, layer)

    def test_are_known_for_every_name_that_gguf_py_knows(self):
        names = {name.format(bid=3) + ".weight" for name in TENSOR_NAMES.values()}
        assert [name for name in sorted(names) if role_of(name)[0] == UNKNOWN] == []

    def test_of_gates_of_attention_are_not_taken_for_those_of_an_mlp(self):
        gates = {n.format(bid=3) for n in TENSOR_NAMES.values() if "gate" in n}
        told = {role_of(n)[0] for n in gates if role_of(n)[0].endswith((".gate", ".up", ".down"))}
        assert told == {"dense_ffn.gate", "routed_expert.gate", "shared_expert.gate"}


class TestWhatIsKept:
    @pytest.mark.parametrize(
        ("name", "shape", "type_"),
        [
            ("blk.0.attn_norm.weight", (256,), GgmlType.F32),
            ("blk.0.attn_norm.weight", (256,), GgmlType.F16),
            ("blk.0.ffn_gate_inp.weight", (8, 256), GgmlType.F32),
            ("blk.0.ffn_gate_inp_shexp.weight", (1, 256), GgmlType.BF16),
            ("blk.0.ffn_gate_exps.bias", (8, 256), GgmlType.F32),
            ("blk.0.ssm_conv1d.weight", (256, 4), GgmlType.F32),
            ("blk.0.ffn_gate_tid2eid.weight", (512, 8), GgmlType.I32),
            ("v.patch_embd.weight", (256, 3, 14, 14), GgmlType.F16),
            ("v.position_embd.weight", (64, 256), GgmlType.F32),
            ("a.conv1d.1.weight", (256, 64, 3), GgmlType.F16),
            ("blk.0.something_new.weight", (256, 24), GgmlType.F16),
            ("blk.0.ffn_up.weight", (4, 256), GgmlType.F64),
        ],
    )
    def test_keeps_the_type_that_it_has(self, tmp_path, name, shape, type_):
        with open_gguf(written(tmp_path, TensorEntry(name, shape, type_))) as source:
            (spec,) = describe_gguf("llama", {}, source.weights).tensors
            tensor = planned(source, name, type_)
            assert spec.keep is type_
            assert tensor.repack
            if type_ is not GgmlType.F64:  # random doubles overflow
                assert encoded(source, tensor) == stored(source, name).tobytes()

    def test_a_matrix_of_unknown_role_takes_the_recipes_type_and_is_told(self, tmp_path):
        name = "blk.0.something_new.weight"
        with open_gguf(written(tmp_path, matrix(name=name))) as source:
            model = describe_gguf("llama", {}, source.weights)
        assert model.tensors[0].keep is None
        assert unknown(model) == [name]

    def test_stacked_experts_are_a_slab_each(self, tmp_path):
        name = "blk.0.ffn_up_exps.weight"
        with open_gguf(written(tmp_path, matrix(shape=(5, 4, 256), name=name))) as source:
            (spec,) = describe_gguf("llama", {}, source.weights).tensors
        rows = [(slab.row_begin, slab.row_end) for slab in spec.slabs]
        assert rows == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]


@pytest.mark.parametrize("type_", sorted(encodable()), ids=lambda t: t.name)
@pytest.mark.parametrize("shape", [(7, 256), (3, 5, 256)])
def test_tiles_are_what_ggml_decodes_and_copies_are_what_is_stored(tmp_path, type_, shape):
    name = "blk.0.ffn_up_exps.weight"
    path = written(tmp_path, matrix(GgmlType.F32, (4, 32), "a.weight"), matrix(type_, shape, name))
    with open_gguf(path) as source:
        blocks = stored(source, name)
        expanded = encoded(source, planned(source, name, GgmlType.F32))
        copied = encoded(source, planned(source, name, type_))
    rows = blocks.reshape(-1, type_.row_bytes(256))
    assert expanded == ggml_decode(rows, type_).astype(np.float32).tobytes()
    assert copied == blocks.tobytes()


def test_a_shard_set_is_one_source_whichever_shard_is_named(tmp_path):
    tensors = [matrix(name=f"blk.{i}.ffn_up.weight") for i in range(5)]
    first = written(tmp_path, *tensors, n_per_shard=2)
    last = sorted(tmp_path.glob("*.gguf"))[-1]
    with open_gguf(first) as a, open_gguf(last) as b:
        assert list(a.weights) == [t.name for t in tensors]
        assert a.weights == b.weights
        assert a.fingerprint() == b.fingerprint()
        assert {w.format for w in a.weights.values()} == {WeightFormat.GGUF}
        for t in tensors:
            assert encoded(a, planned(a, t.name, t.type)) == stored(b, t.name).tobytes()


class TestAChangeUnderWay:
    NAME = "blk.0.ffn_up.weight"

    def read(self, source):
        return encoded(source, planned(source, self.NAME, GgmlType.Q8_0))

    @pytest.mark.parametrize(
        "change",
        [
            lambda path: os.truncate(path, path.stat().st_size - 1),
            lambda path: os.utime(path, ns=(1, 1)),
            lambda path: path.write_bytes(path.read_bytes()),
        ],
        ids=["cut", "touched", "rewritten"],
    )
    def test_is_noticed_when_the_next_tile_is_read(self, tmp_path, change):
        path = written(tmp_path, matrix())
        with open_gguf(path) as source:
            self.read(source)
            change(path)
            with pytest.raises(SourceError, match=r"changed|ends at"):
                self.read(source)

    def test_makes_another_fingerprint(self, tmp_path):
        path = written(tmp_path, matrix())
        seen = set()
        for _ in range(2):
            with open_gguf(path) as source:
                seen.add(source.fingerprint())
        assert len(seen) == 1
        os.utime(path, ns=(1, 1))
        with open_gguf(path) as source:
            seen.add(source.fingerprint())
        written(tmp_path, matrix(), kvs={"general.architecture": string("qwen3")})
        with open_gguf(path) as source:
            seen.add(source.fingerprint())
        assert len(seen) == 3


@pytest.mark.parametrize("type_", [GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0])
@pytest.mark.parametrize("wanted", [GgmlType.F32, GgmlType.Q8_0, None])
def test_nan_is_refused_also_where_bytes_would_only_be_copied(tmp_path, type_, wanted):
    path = written(tmp_path, matrix(type_))
    with open_gguf(path) as source:
        ref = source.weights["blk.0.ffn_up.weight"].data
        stored_row = type_.row_bytes(256)
    raw = bytearray(path.read_bytes())
    # The first value or scale of row 3 becomes a quiet NaN.
    raw[ref.begin + 3 * stored_row : ref.begin + 3 * stored_row + 4] = (
        b"\0\0\xc0\x7f" if type_ is GgmlType.F32 else b"\xff\x7f\xff\x7f"
    )
    path.write_bytes(raw)
    with open_gguf(path) as source:
        tensor = planned(source, "blk.0.ffn_up.weight", wanted or type_)
        with pytest.raises(NonFiniteError, match=r"NaN or infinity in row 3 \(for blk\.0\.ffn_up"):
            encoded(source, tensor)


LLAMA = {"general.architecture": string("llama")}


@pytest.mark.parametrize(
    ("tensors", "kvs", "message"),
    [
        ([], LLAMA, "holds no tensors"),
        ([matrix()], {}, "general.architecture is missing or no text"),
        (
            [matrix()],
            {"general.architecture": u32(1)},
            "general.architecture is missing or no text",
        ),
        ([matrix()], LLAMA | {"general.type": string("imatrix")}, "is an imatrix, not a model"),
        ([matrix()], LLAMA | {"general.type": string("adapter")}, "is an adapter, not a model"),
        ([matrix()], LLAMA | {"general.type": string("x\x1b[2J")}, r"file of type x\\x1b\[2J"),
        ([matrix()], {"general.type": string("imatrix")}, "is an imatrix, not a model"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, tensors, kvs, message):
    path = written(tmp_path, *tensors, kvs=kvs)
    with pytest.raises(GgufError, match=message):
        open_gguf(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorEntry("blk.0.attn_norm.weight", (64,), GgmlType.Q8_0), "a vector stored as Q8_0"),
        (matrix(shape=(5000, 1, 32)), "5000 matrices in one tensor, at most 4096"),
    ],
)
def test_tensors_that_no_model_has_are_refused(tmp_path, tensor, message):
    with open_gguf(written(tmp_path, tensor)) as source, pytest.raises(GgufError, match=message):
        describe_gguf("llama", {}, source.weights)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(GgufError, match="no such file"):
        open_gguf(tmp_path / "m.gguf")
    first = written(tmp_path, *(matrix(name=f"{i}.weight") for i in range(3)), n_per_shard=1)
    sorted(tmp_path.glob("*.gguf"))[1].unlink()
    with pytest.raises(GgufError, match=r"1 of 3 shards are missing: m-00002-of-00003\.gguf"):
        open_gguf(first)


def test_a_fifo_does_not_hang_the_run(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(GgufError, match="no such file"):
        open_gguf(tmp_path / "m.gguf")
