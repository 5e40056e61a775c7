"""`quantkit inspect`: facts, metadata and tensors, harmless whatever the file says."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
from click.testing import CliRunner

from quantkit.cli.inspect import inspect_command
from quantkit.container.kv import f32s, i32s, string, strings, u32
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.errors import GgufError
from quantkit.types import GgmlType
from tests.builders.gguf import F64, STRING, gguf_bytes, info, kv, text, write_shards

KVS = {
    "general.architecture": string("deepseek2"),
    "general.name": string("Tiny [bold]Kimi[/bold]"),
    "deepseek2.block_count": u32(2),
    "tokenizer.ggml.tokens": strings([f"<{i}>" for i in range(100)]),
    "tokenizer.ggml.token_type": i32s([1, 2, 3]),
    "some.floats": f32s([0.5, 1e-05]),
    "tokenizer.chat_template": string("{% x %}\n" * 100),
}
TENSORS = [
    TensorEntry("token_embd.weight", (8, 256), GgmlType.Q8_0),
    TensorEntry("blk.0.ffn_up_exps.weight", (4, 2, 256), GgmlType.IQ2_XXS),
    TensorEntry("blk.1.ffn_up_exps.weight", (4, 2, 256), GgmlType.IQ2_XXS),
    TensorEntry("blk.1.exp_probs_b.bias", (4,), GgmlType.F32),
]


@pytest.fixture
def made(tmp_path):
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=None, max_shard_tensors=2)
    write_shards(tmp_path, layouts)
    return [tmp_path / layout.file_name for layout in layouts]


def run(*args):
    return CliRunner().invoke(inspect_command, [str(arg) for arg in args], catch_exceptions=False)


def row(output: str, first: str) -> str:
    """The table row that begins with `first`, blanks squeezed."""
    (line,) = (line for line in output.splitlines() if line.split()[:1] == [first])
    return " ".join(line.split())


def test_facts_metadata_roles_and_tensors_are_shown_from_any_shard(made):
    result = run(made[1])
    assert result.exit_code == 0
    out = result.stdout
    assert row(out, "architecture") == "architecture deepseek2"
    assert row(out, "n_tensors") == "n_tensors 4"
    assert row(out, "deepseek2.block_count") == "deepseek2.block_count U32 2"
    assert row(out, "ffn_up_exps") == "ffn_up_exps IQ2_XXS 2 1 kB 2.062"
    assert row(out, "exp_probs_b.bias") == "exp_probs_b.bias F32 1 16 bytes 32.000"
    assert row(out, "blk.1.ffn_up_exps.weight") == (
        "blk.1.ffn_up_exps.weight IQ2_XXS 256 × 2 × 4 528 2"
    )


def test_long_values_are_cut_unless_asked_for(made):
    out = run(made[0], "--kv-only").stdout
    assert "'<0>', '<1>', '<2>', '<3>', '<4>', '<5>', …]" in row(out, "tokenizer.ggml.tokens")
    assert row(out, "tokenizer.ggml.tokens").split()[1] == "STRING[100]"
    assert row(out, "tokenizer.ggml.token_type").endswith("I32[3] [1, 2, 3]")
    assert row(out, "some.floats").endswith("F32[2] [0.5, 1e-05]")
    assert len(row(out, "tokenizer.chat_template")) < 200
    full = run(made[0], "--kv-only", "--full").stdout
    assert "'<99>']" in row(full, "tokenizer.ggml.tokens")
    assert row(full, "tokenizer.chat_template").count("{% x %}\\n") == 100


def test_parts_can_be_chosen(made):
    kv_only = run(made[0], "--kv-only").stdout
    assert "deepseek2.block_count" in kv_only
    assert "token_embd" not in kv_only
    tensors_only = run(made[0], "--tensors-only").stdout
    assert "deepseek2.block_count" not in tensors_only
    assert "token_embd.weight" in tensors_only


def test_parts_exclude_each_other(made):
    assert run(made[0], "--kv-only", "--tensors-only").exit_code == 2


def test_markup_in_values_is_text(made):
    assert row(run(made[0]).stdout, "name") == "name Tiny [bold]Kimi[/bold]"


def test_json_has_everything_a_script_needs(made):
    report = json.loads(run(made[0], "--json").stdout)
    general = report["general"]
    assert general["files"] == [path.name for path in made]
    assert general["n_bytes"] == sum(path.stat().st_size for path in made)
    assert general["n_weights"] == 8 * 256 + 2 * 4 * 2 * 256 + 4
    n_bits = 8 * (8 * 8 * 34 + 2 * 8 * 66 + 16)
    assert general["bpw"] == pytest.approx(n_bits / general["n_weights"], abs=1e-4)
    assert report["kvs"]["deepseek2.block_count"] == {"type": "U32", "value": 2}
    tokens = report["kvs"]["tokenizer.ggml.tokens"]
    assert (tokens["type"], tokens["item"], tokens["count"]) == ("ARRAY", "STRING", 100)
    assert len(tokens["value"]) == 6
    tensor = report["tensors"][1]
    assert tensor["name"] == "blk.0.ffn_up_exps.weight"
    assert (tensor["type"], tensor["ne"], tensor["n_bytes"]) == ("IQ2_XXS", [256, 2, 4], 528)
    assert tensor["file"] == made[0].name


def test_full_json_gives_values_as_they_are(made):
    kvs = json.loads(run(made[0], "--json", "--full", "--kv-only").stdout)["kvs"]
    assert {key: kvs[key]["value"] for key in KVS} == {key: kv.value for key, kv in KVS.items()}


def test_json_stays_json_where_a_value_is_nan(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes([kv("x", F64, struct.pack("<d", float("nan")))]))
    assert json.loads(run(path, "--json").stdout)["kvs"]["x"]["value"] == "nan"


def test_a_missing_sibling_is_a_note_on_stderr(made):
    made[1].unlink()
    result = run(made[0])
    assert result.exit_code == 0
    assert "1 of 2 shards are missing" in result.stderr
    assert row(result.stdout, "n_tensors") == "n_tensors 2"


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"hello")
    with pytest.raises(GgufError):
        run(path)


@pytest.mark.parametrize("mode", [[], ["--full"], ["--json"], ["--json", "--full"]])
def test_hostile_names_and_values_do_not_reach_the_terminal(tmp_path, mode):
    nasty = "\x1b]0;x\x07\u202e[red]"
    path = tmp_path / "x.gguf"
    content = gguf_bytes(
        [kv(nasty, STRING, text(nasty)), kv("general.name", STRING, text(nasty))],
        [info(nasty, (4,))],
        b"\0" * 16,
    )
    path.write_bytes(content)
    out = run(path, *mode).stdout
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert "[red]" in out


def test_the_commands_do_not_wait_for_heavy_imports():
    code = (
        "import sys, quantkit.cli.inspect, quantkit.cli.verify;"
        "print({'numpy', 'rich', 'pydantic', 'numba', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
