"""A GGUF file in, GGUF files out: the bytes that the checkpoint gives, and nothing else changed."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from make_hf_checkpoint import make

from quantkit.cli import cli
from quantkit.container.kv import string, u32
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.container.reader import read_gguf
from quantkit.container.shardset import open_shards
from quantkit.errors import SourceError, UnsupportedError, UsageError
from quantkit.pipeline import Job, Output, convert, planned
from quantkit.pipeline.opening import Reading, opened, read_tokens
from quantkit.plan.build import Limits, TypeChooser
from quantkit.quantize import decode
from quantkit.quantize.codec import encodable
from quantkit.recipe import load_recipe, shipped_names
from quantkit.run.events import Silent
from quantkit.types import GgmlType
from tests.builders.gguf import write_shards
from tests.oracles import llamacpp
from tests.plan.test_presets import PRESETS, Quantizer
from tests.quantize.ggml import ggml_decode

IMATRIX = Path(__file__).parents[1] / "calibrate" / "tiny-kimi-k2.5.imatrix.gguf"
WHOLE = Limits(None)
CHANGED = {"general.file_type", "general.quantization_version"}


class Heard(Silent):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def run(source: Path, folder: Path, recipe: str, *, limits=WHOLE, n_threads=1, **job) -> Path:
    """Convert; gives the first file."""
    done = convert(
        Job(source, recipe, limits, **({"name": "m"} | job)), Output(folder, n_threads), Silent()
    )
    return folder / done.plans[-1].shards[0].file


def content(path: Path) -> dict[str, tuple[GgmlType, tuple[int, ...], str]]:
    """Type, shape and digest of every tensor of a file or set, in order."""
    found = {}
    for file, tensor in open_shards(path).tensors():
        with file.path.open("rb") as stream:
            stream.seek(tensor.begin)
            digest = hashlib.sha256(stream.read(tensor.n_bytes)).hexdigest()
        found[tensor.name] = (tensor.type, tensor.shape, digest)
    return found


def raw_kvs(path: Path) -> dict[str, bytes]:
    """Every KV's type and value as the bytes they are, by gguf-py's reader."""
    reader = gguf.GGUFReader(path)
    return {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }


@pytest.fixture(scope="module")
def f32(converted) -> Path:
    """The fixture as an F32 file."""
    return converted("f32") / "m-F32.gguf"


class TestTheSameModelAsACheckpoint:
    @pytest.mark.parametrize("recipe", ["q4_k_m", "q8_0", "mxfp4_moe", "q4_x"])
    def test_gives_the_same_file(self, converted, f32, tmp_path, recipe):
        # The checkpoint's INT4 repacks to the very same Q4_0 that is found again in its values
        # only by luck; where a recipe asks for that, types are compared and not bytes.
        ours = content(run(f32, tmp_path, recipe))
        theirs = content(converted(recipe) / f"m-{recipe.upper()}.gguf")
        assert list(ours) == list(theirs)
        if recipe == "q4_x":
            exact = [n for n, (type_, *_) in theirs.items() if type_ is not GgmlType.Q4_0]
            assert len(exact) > 20
        else:
            exact = list(theirs)
        assert [n for n in exact if ours[n] != theirs[n]] == []
        assert [t[:2] for t in ours.values()] == [t[:2] for t in theirs.values()]

    def test_gives_the_same_file_with_an_imatrix(self, fixture_model, f32, tmp_path):
        low = tmp_path / "low.yaml"
        low.write_text(
            "name: low\ndefault: q8_0\nrules:\n  - {role: routed_expert.down, type: iq2_xxs}\n"
            "  - {role: attention.k_b, type: q4_0}\n"
        )
        options = {"imatrix": IMATRIX}
        ours = run(f32, tmp_path / "a", str(low), **options)
        theirs = run(fixture_model, tmp_path / "b", str(low), mmproj=None, **options)
        assert content(ours) == content(theirs)
        assert raw_kvs(ours).keys() == raw_kvs(theirs).keys()

    def test_gets_its_types_from_every_recipe(self, fixture_model, f32):
        specs, differing = [], []
        for model in (f32, fixture_model):
            with planned(Job(model, "bf16", mmproj=None), Silent()) as (_, decided):
                specs.append([tensor.spec for tensor in decided.plans[-1].tensors])
        for recipe in shipped_names():
            choosers = [TypeChooser(load_recipe(recipe), some, encodable()) for some in specs]
            ours, theirs = (
                {spec.name: chooser.choose(spec).type for spec in some}
                for chooser, some in zip(choosers, specs, strict=True)
            )
            # A rule of these recipes keeps experts that are published as INT4 as they are.
            if recipe in {"ud-q4_k_xl", "ud-q5_k_xl", "ud-q6_k_xl", "ud-q8_k_xl"}:
                theirs = {n: t for n, t in theirs.items() if "_exps" not in n}
            differing += [f"{recipe} {n}" for n in theirs if ours[n] is not theirs[n]]
        assert not differing

    def test_has_the_same_roles_layers_and_kept_types(self, fixture_model, f32):
        described = []
        for model in (f32, fixture_model):
            with planned(Job(model, "bf16", mmproj=None), Silent()) as (_, decided):
                specs = [t.spec for t in decided.plans[-1].tensors]
                described.append([(s.name, s.role, s.layer, s.shape, s.keep) for s in specs])
        assert described[0] == described[1]


# Models of other families, as llama.cpp's converter would have made them, with random weights.


def _mlp(i: int, suffix: str = "", n_experts: int | None = None) -> dict[str, tuple[int, ...]]:
    stack = () if n_experts is None else (n_experts,)
    return {
        f"blk.{i}.ffn_gate{suffix}.weight": (*stack, 256, 256),
        f"blk.{i}.ffn_up{suffix}.weight": (*stack, 256, 256),
        f"blk.{i}.ffn_down{suffix}.weight": (*stack, 256, 256),
    }


def _attention(i: int, n_heads: int, n_kv: int, dim: int) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{i}.attn_norm.weight": (256,),
        f"blk.{i}.attn_q.weight": (n_heads * dim, 256),
        f"blk.{i}.attn_k.weight": (n_kv * dim, 256),
        f"blk.{i}.attn_v.weight": (n_kv * dim, 256),
        f"blk.{i}.attn_output.weight": (256, n_heads * dim),
        f"blk.{i}.attn_q_norm.weight": (dim,),
        f"blk.{i}.attn_k_norm.weight": (dim,),
        f"blk.{i}.ffn_norm.weight": (256,),
    }


def _qwen3moe(writer: gguf.GGUFWriter, n_layers: int) -> dict[str, tuple[int, ...]]:
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_expert_count(16)
    writer.add_expert_used_count(4)
    writer.add_expert_feed_forward_length(256)
    tensors = {"token_embd.weight": (320, 256)}
    for i in range(n_layers):
        tensors |= _attention(i, 8, 2, 64) | {f"blk.{i}.ffn_gate_inp.weight": (16, 256)}
        tensors |= _mlp(i, "_exps", 16)
    return tensors | {"output_norm.weight": (256,), "output.weight": (320, 256)}


def _gemma3(writer: gguf.GGUFWriter, n_layers: int) -> dict[str, tuple[int, ...]]:
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_sliding_window(64)
    tensors = {"token_embd.weight": (320, 256)}
    for i in range(n_layers):
        tensors |= _attention(i, 4, 1, 64) | _mlp(i)
        tensors |= {
            f"blk.{i}.post_attention_norm.weight": (256,),
            f"blk.{i}.post_ffw_norm.weight": (256,),
        }
    return tensors | {"output_norm.weight": (256,)}


def _phi3(writer: gguf.GGUFWriter, n_layers: int) -> dict[str, tuple[int, ...]]:
    """Query, key and value in one matrix, two key heads for eight query heads."""
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_sliding_window(64)
    tensors = {"token_embd.weight": (320, 256)}
    for i in range(n_layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": (256,),
            f"blk.{i}.attn_qkv.weight": (256 + 2 * 64, 256),
            f"blk.{i}.attn_output.weight": (256, 256),
            f"blk.{i}.ffn_norm.weight": (256,),
            f"blk.{i}.ffn_up.weight": (512, 256),
            f"blk.{i}.ffn_down.weight": (256, 256),
        }
    return tensors | {"output_norm.weight": (256,), "output.weight": (320, 256)}


ARCHITECTURES = {"qwen3moe": _qwen3moe, "gemma3": _gemma3, "phi3": _phi3}


def made(path: Path, arch: str, type_: GgmlType = GgmlType.BF16, n_layers: int = 3) -> Path:
    """A model with a tokenizer and odd metadata, written by gguf-py."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name("Made Up")
    writer.add_block_count(n_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(32)
    writer.add_array("odd.floats", [0.1, -0.0, 1e-45])
    writer.add_float64("odd.double", 0.1)
    writer.add_int8("odd.byte", -3)
    writer.add_uint64("odd.long", 2**63)
    writer.add_string("odd.text", "Grüße, 世界\n\x00end")
    shapes = ARCHITECTURES[arch](writer, n_layers)
    tokens = [f"<0x{i:02X}>" for i in range(256)] + [f"▁w{i}" for i in range(64)]
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(320)])
    writer.add_token_types([2, 3, 3] + [6] * 253 + [1] * 64)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(1)
    for name, shape in shapes.items():
        is_vector = len(shape) == 1
        x = 1 + 0.1 * rng.standard_normal(shape) if is_vector else rng.standard_normal(shape) / 16
        kind = GgmlType.F32 if is_vector or "ffn_gate_inp" in name else type_
        qtype = gguf.GGMLQuantizationType(int(kind))
        writer.add_tensor(name, gguf.quantize(x.astype(np.float32), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(arch, type) -> a file, made once."""
    folder, cache = tmp_path_factory.mktemp("made"), {}

    def get(arch: str = "qwen3moe", type_: GgmlType = GgmlType.BF16) -> Path:
        if (arch, type_) not in cache:
            cache[arch, type_] = made(folder / f"{arch}-{type_.name}.gguf", arch, type_)
        return cache[arch, type_]

    return get


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("recipe", ["q4_k_m", "q8_0", "ud-q4_k_xl", "iq4_xs"])
def test_another_architecture_runs_in_llamacpp_as_its_source_does(model, tmp_path, arch, recipe):
    source = model(arch)
    path = run(source, tmp_path, recipe, rounding="nearest")
    ids = np.random.default_rng(0).integers(3, 320, 48)
    expected = llamacpp.logits(source, ids, kv_f32=True)
    logits = llamacpp.logits(path, ids, kv_f32=True)
    assert np.isfinite(logits).all()
    off = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 0 < off < 0.5  # another model, or rows in another order: about 1.4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_metadata_and_tokenizer_stay_byte_for_byte_and_in_order(model, tmp_path, arch):
    before, after = (raw_kvs(p) for p in (model(arch), run(model(arch), tmp_path, "q4_k_m")))
    assert list(after) == [*before, "general.quantization_version"]
    assert [key for key in before if before[key] != after[key]] == ["general.file_type"]
    kvs = read_gguf(next(tmp_path.glob("*.gguf"))).kvs
    assert (kvs["general.file_type"], kvs["general.quantization_version"]) == (u32(15), u32(2))
    assert [t.name for t in read_gguf(model(arch)).tensors] == list(
        content(next(tmp_path.glob("*.gguf")))
    )


def test_what_the_source_says_of_its_own_rounding_does_not_stay(model, tmp_path):
    told = {
        "general.architecture": string("llama"),
        "quantize.imatrix.file": string("old.gguf"),
        "quantize.imatrix.chunks_count": u32(7),
        "quantkit.rounding": string("feedback"),
        "quantkit.note": string("stays"),
    }
    entries = [TensorEntry("blk.0.ffn_up.weight", (4, 256), GgmlType.F16)]
    (layout,) = lay_out("told", told, entries, max_shard_bytes=None)
    write_shards(tmp_path, [layout])
    kvs = read_gguf(run(tmp_path / "told.gguf", tmp_path / "out", "q8_0")).kvs
    assert set(kvs) == {"general.architecture", "quantkit.note", *CHANGED}


@pytest.fixture(scope="module")
def quantizer():
    return Quantizer(pytest.importorskip("llama_cpp", reason="needs llama-cpp-python"))


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "the fixture"])
def test_every_preset_gives_the_types_that_llama_quantize_gives(model, f32, quantizer, arch):
    source = f32 if arch == "the fixture" else model(arch)
    differing = []
    for name, number in PRESETS.items():
        theirs = quantizer.types(source, number)
        if theirs is None:
            assert name == "q1_0", "the only default type without a substitute"
            continue
        with planned(Job(source, name), Silent()) as (_, decided):
            ours = {t.spec.name: t.type for t in decided.plans[-1].tensors}
        assert ours.keys() == theirs.keys()
        differing += [
            f"{name} {tensor}: {type_.name}, llama-quantize {theirs[tensor].name}"
            for tensor, type_ in ours.items()
            if type_ is not theirs[tensor]
        ]
    assert not differing


class TestShards:
    def test_go_in_as_they_come_out(self, model, tmp_path):
        whole = run(model(), tmp_path / "whole", "q8_0")
        first = run(model(), tmp_path / "split", "q8_0", limits=Limits(2_000_000))
        assert len(list(first.parent.glob("*-of-*.gguf"))) > 3
        assert content(first) == content(whole)
        again = run(sorted(first.parent.glob("*.gguf"))[2], tmp_path / "again", "q8_0")
        assert again.read_bytes() == whole.read_bytes()
        assert llamacpp.loads(first)[0]


class TestCopies:
    def test_of_blocks_of_the_wanted_type_lose_nothing_and_are_reported(self, model, tmp_path):
        source = model(type_=GgmlType.Q4_0)
        recipe = tmp_path / "keep.yaml"
        recipe.write_text("name: keep\ndefault: q4_0\nrules: [{role: output, type: q8_0}]\n")
        with planned(Job(source, str(recipe)), Silent()) as (_, decided):
            tensors = decided.plans[-1].tensors
        assert [t.spec.name for t in tensors if not t.repack] == ["output.weight"]
        before, after = content(source), content(run(source, tmp_path / "out", str(recipe)))
        assert [n for n in before if before[n] != after[n]] == ["output.weight"]

    def test_of_everything_make_the_same_data(self, model, tmp_path):
        assert content(run(model(), tmp_path, "bf16")) == content(model())


@pytest.mark.parametrize("type_", [GgmlType.F16, GgmlType.Q8_0, GgmlType.Q5_1])
def test_values_are_encoded_from_what_ggml_decodes(model, tmp_path, type_):
    source, name = model(type_=type_), "blk.1.ffn_up_exps.weight"
    path = run(source, tmp_path, "f32")
    for file, is_source in ((source, True), (path, False)):
        tensor = next(t for t in read_gguf(file).tensors if t.name == name)
        raw = np.frombuffer(file.read_bytes()[tensor.begin : tensor.end], np.uint8)
        rows = raw.reshape(-1, tensor.type.row_bytes(256))
        if is_source:
            expected = ggml_decode(rows, type_)
        else:
            assert decode(rows, "F32").tobytes() == expected.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("type_", "warned"),
    [
        (GgmlType.F32, False), (GgmlType.F16, False), (GgmlType.BF16, False),
        (GgmlType.Q8_0, False), (GgmlType.Q4_0, True), (GgmlType.Q5_1, True),
    ],
)  # fmt: skip
def test_quantising_twice_is_warned_of_with_the_type_of_the_source(model, tmp_path, type_, warned):
    heard = Heard()
    convert(Job(model(type_=type_), "q4_1"), Output(tmp_path, 1), heard)
    told = [w for w in heard.warnings if "second time" in w]
    assert bool(told) is warned
    if warned:
        assert f"tensors are {type_.name}" in told[0]


def test_tensors_of_unknown_role_are_listed_in_the_plan_and_get_the_default(tmp_path):
    entries = [
        TensorEntry("token_embd.weight", (64, 256), GgmlType.BF16),
        TensorEntry("blk.0.novel.weight", (64, 256), GgmlType.BF16),
        TensorEntry("blk.0.narrow.weight", (64, 24), GgmlType.BF16),
        TensorEntry("blk.0.novel.bias", (64,), GgmlType.F32),
    ]
    kvs = {"general.architecture": string("novel")}
    write_shards(tmp_path, lay_out("novel", kvs, entries, max_shard_bytes=None))
    source = str(tmp_path / "novel.gguf")
    told = CliRunner().invoke(cli, ["plan", source, "-r", "q4_k_m"]).output
    assert "unknown role get the recipe's default type: blk.0.novel.weight\n" in told
    types = {n: t[0].name for n, t in content(run(Path(source), tmp_path / "o", "q4_k_m")).items()}
    assert types == {
        "token_embd.weight": "Q6_K", "blk.0.novel.weight": "Q4_K",
        "blk.0.narrow.weight": "BF16", "blk.0.novel.bias": "F32",
    }  # fmt: skip


class PowerCut(BaseException):
    """What nothing in the program catches."""


@pytest.mark.parametrize("n", [1, 9, 25])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(model, tmp_path, monkeypatch, n):
    expected = run(model(), tmp_path / "whole", "q5_0", n_threads=3).read_bytes()
    real, count = os.pwrite, [0]

    def dying(*arguments):
        count[0] += 1
        if count[0] == n:
            raise PowerCut
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", dying)
    with pytest.raises(PowerCut):
        run(model(), tmp_path / "cut", "q5_0")
    monkeypatch.undo()
    assert not list((tmp_path / "cut").glob("*.gguf"))
    assert run(model(), tmp_path / "cut", "q5_0").read_bytes() == expected


def test_a_source_that_changes_under_way_ends_the_run_without_a_file(tmp_path, monkeypatch):
    source = made(tmp_path / "s.gguf", "gemma3")
    real, count = os.pwrite, [0]

    def meddling(*arguments):
        count[0] += 1
        if count[0] == 9:
            os.utime(source, ns=(1, 1))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", meddling)
    with pytest.raises(SourceError, match="has changed"):
        run(source, tmp_path / "out", "q8_0")
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_a_file_is_never_replaced_by_what_is_made_of_it(model, tmp_path):
    source = run(model(), tmp_path, "q8_0")
    before = source.read_bytes()
    with pytest.raises(UsageError, match="is the file that is converted"):
        convert(Job(source, "q8_0", WHOLE, name="m"), Output(tmp_path, 1, force=True), Silent())
    assert source.read_bytes() == before


class TestLowBits:
    def test_without_statistics_are_refused_with_what_to_do(self, model, tmp_path):
        with pytest.raises(UsageError, match="without importance statistics") as caught:
            run(model(), tmp_path, "iq2_xxs")
        assert "--imatrix" in (caught.value.hint or "")
        assert "--no-imatrix" in (caught.value.hint or "")
        assert not list(tmp_path.iterdir())

    def test_can_do_without(self, model, tmp_path):
        assert run(model(), tmp_path, "q2_k", corpus=None).exists()

    def test_rounded_with_feedback_are_refused_without_tokens(self, model, tmp_path):
        with pytest.raises(UsageError, match="a GGUF file's tokenizer is not read") as caught:
            run(model(), tmp_path, "ud-iq2_xxs")
        assert "--rounding nearest" in (caught.value.hint or "")

    def test_of_an_architecture_without_a_forward_pass_are_not_calibrated(self, tmp_path):
        kvs = {"general.architecture": string("novel")}
        entries = [TensorEntry("blk.0.ffn_up.weight", (4, 256), GgmlType.F16)]
        write_shards(tmp_path, lay_out("novel", kvs, entries, max_shard_bytes=None))
        with pytest.raises(UnsupportedError, match="no forward pass for architecture 'novel'"):
            run(tmp_path / "novel.gguf", tmp_path, "iq2_xxs", corpus="any.safetensors")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A checkpoint, its F32 file, and tokens of its tokenizer."""
    folder = tmp_path_factory.mktemp("both")
    make("llama", folder / "hf")
    tokens = folder / "t.tokens.safetensors"
    with opened(folder / "hf", "llama.cpp") as model:
        read_tokens(model, Reading("core", 1024)).save(tokens)
    return folder / "hf", run(folder / "hf", folder, "f32"), str(tokens)


class TestSavedTokens:
    """What a checkpoint is run on, a file made of it can be run on as well."""

    @pytest.mark.parametrize("rounding", ["nearest", "feedback"])
    def test_give_the_same_low_bit_file(self, both, tmp_path, rounding):
        checkpoint, file, tokens = both
        options = {"corpus": tokens, "budget": 1024, "rounding": rounding, "limits": WHOLE}
        ours = run(file, tmp_path / "a", "iq2_xxs", **options)
        theirs = run(checkpoint, tmp_path / "b", "iq2_xxs", **options)
        assert content(ours) == content(theirs)
        told = [read_gguf(path).kvs for path in (ours, theirs)]
        wanted = "quantkit.rounding" if rounding == "feedback" else "quantize.imatrix.file"
        assert told[0][wanted] == told[1][wanted]
        assert llamacpp.loads(ours)[0]


class TestAVisionFile:
    def test_gets_the_types_of_its_recipe_and_loads(self, converted, f32, tmp_path):
        source = converted("f32") / "mmproj-m-F16.gguf"
        path = run(source, tmp_path, "q8_0")
        assert path.name == "mmproj-m-Q8_0.gguf"
        before, after = raw_kvs(source), raw_kvs(path)
        assert {k for k in before if before[k] != after[k]} <= CHANGED
        types = {name: t[0] for name, t in content(path).items()}
        assert types["v.patch_embd.weight"] is content(source)["v.patch_embd.weight"][0]
        assert types["v.position_embd.weight"] is GgmlType.F32
        assert types["v.blk.0.attn_qkv.weight"] is GgmlType.Q8_0
        ok, log = llamacpp.load_mmproj(path, f32)
        assert ok, log

    def test_is_not_run_on_text(self, converted, tmp_path):
        source = converted("f32") / "mmproj-m-F16.gguf"
        assert run(source, tmp_path, "ud-iq2_xxs").exists()


def test_the_command_says_what_it_does(model, tmp_path):
    source = str(model(type_=GgmlType.Q4_0))
    run_ = CliRunner().invoke(cli, ["convert", source, "-r", "q8_0", "-o", str(tmp_path)])
    assert run_.exit_code == 0, run_.output
    assert "Made-Up-Q8_0.gguf" in run_.output
    assert "are Q4_0 and are quantised a second time" in run_.output
    assert (tmp_path / "Made-Up-Q8_0.gguf").exists()
    checked = CliRunner().invoke(cli, ["verify", str(tmp_path / "Made-Up-Q8_0.gguf")])
    assert checked.exit_code == 0, checked.output


def test_headers_end_where_the_plan_says(model, tmp_path):
    """The preamble counts what follows, in the version that llama.cpp reads."""
    path = run(model(), tmp_path, "q8_0")
    magic, version, n_tensors, n_kvs = struct.unpack("<4sIQQ", path.read_bytes()[:24])
    assert (magic, version) == (b"GGUF", 3)
    assert (n_tensors, n_kvs) == (len(content(path)), len(raw_kvs(path)))
