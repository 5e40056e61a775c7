"""`quantkit verify`: one problem a line, and an exit code that scripts can rely on."""

from __future__ import annotations

import json
import struct

import pytest
from click.testing import CliRunner

from quantkit.cli.verify import verify_command
from quantkit.container.layout import TensorEntry, lay_out
from quantkit.types import GgmlType
from quantkit.write.manifest import manifest_path
from tests.builders.gguf import gguf_bytes, info, write_manifest, write_shards

INFINITE_LAST = struct.pack("<4f", 0, 1, 2, float("inf"))
TENSORS = [TensorEntry(f"t{i}", (4, 8), GgmlType.F32) for i in range(4)]


@pytest.fixture
def made(tmp_path):
    layouts = lay_out("m", {}, TENSORS, max_shard_bytes=None, max_shard_tensors=2)
    data = write_shards(tmp_path, layouts)
    write_manifest(tmp_path, "m", layouts, data)
    return [tmp_path / layout.file_name for layout in layouts]


def run(*args):
    return CliRunner().invoke(verify_command, [str(arg) for arg in args])


def test_a_sound_set_is_ok(made):
    result = run(made[1])
    assert result.exit_code == 0
    assert result.stdout.startswith("ok: 2 files, 4 tensors")
    assert "all digests match" in result.stdout


def test_damage_is_told_a_line_each_with_exit_code_6(made):
    for path in made:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    result = run(made[0])
    assert result.exit_code == 6
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{made[0]}, tensor t1: ")
    assert lines[1].startswith(f"{made[1]}, tensor t3: ")
    assert lines[2].startswith("2 problems in 2 files")


def test_nan_alone_is_exit_code_7(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(infos=[info("a", (4,))], data=INFINITE_LAST))
    result = run(path)
    assert result.exit_code == 7
    assert "tensor a: block 3 holds NaN or infinity" in result.stdout


def test_what_is_no_gguf_file_is_exit_code_6(tmp_path):
    assert run(tmp_path / "absent.gguf").exit_code == 6


def test_quick_says_what_was_not_looked_at(made):
    assert "sizes and headers match" in run(made[0], "--quick").stdout
    manifest_path(made[0].parent, "m").unlink()
    assert "only structure was checked" in run(made[0], "--quick").stdout
    assert "only structure and finiteness were checked" in run(made[0]).stdout


def test_json_holds_the_whole_report(made):
    content = bytearray(made[0].read_bytes())
    content[-1] ^= 1
    made[0].write_bytes(content)
    result = run(made[0], "--json", "--threads", 2)
    report = json.loads(result.stdout)
    assert result.exit_code == report["exit_code"] == 6
    assert (report["ok"], report["deep"], report["n_files"], report["n_tensors"]) == (
        False, True, 2, 4,
    )  # fmt: skip
    (problem,) = report["problems"]
    assert problem["kind"] == "GgufError"
    assert problem["where"] == f"{made[0]}, tensor t1"


def test_hostile_names_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(infos=[info("\x1b[2J\u202e", (4,))], data=INFINITE_LAST))
    output = run(path).stdout
    assert "\x1b" not in output
    assert "\u202e" not in output
    assert "\\x1b[2J\\u202e" in output
