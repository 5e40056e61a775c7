"""`quantkit imatrix`: merge, show, convert, fill."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from quantkit import __version__
from quantkit.calibrate.coverage import FILLED, KAPPA
from quantkit.calibrate.imatrix import VERSION, read_imatrix, write_imatrix
from quantkit.calibrate.statistics import N_CTX, add
from quantkit.cli.imatrix import fill_command, imatrix_command, merge_command
from quantkit.errors import GgufError, UsageError
from quantkit.types import Kv, KvType
from tests.calibrate.builders import RECORDED, statistics

UP = "blk.1.ffn_up_exps.weight"
SHAPES = {UP: (3, 4), "blk.0.attn_q_a.weight": (1, 4)}


def run(*args):
    return CliRunner().invoke(imatrix_command, [str(arg) for arg in args], catch_exceptions=False)


@pytest.fixture
def parts(tmp_path):
    paths = [tmp_path / f"{seed}.gguf" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_imatrix(path, statistics(SHAPES, seed=seed))
    return paths


def test_merged_files_hold_the_sums_of_all(parts, tmp_path):
    assert run("merge", *parts, "-o", tmp_path / "all.gguf").exit_code == 0
    merged = read_imatrix(tmp_path / "all.gguf")
    read = [read_imatrix(part) for part in parts]
    for name in SHAPES:
        total = sum(one.sums[name].sum2 for one in read)
        assert np.array_equal(merged.sums[name].sum2, np.float32(total))
    assert merged.n_tokens == sum(one.n_tokens for one in read)
    assert merged.datasets == ("text-0", "text-1", "text-2")
    assert merged.kvs[VERSION].value == __version__


def test_files_of_different_models_are_not_merged(parts, tmp_path):
    write_imatrix(tmp_path / "other.gguf", statistics({UP: (3, 5)}))
    with pytest.raises(GgufError, match=r"blk\.1\.ffn_up_exps\.weight"):
        run("merge", parts[0], tmp_path / "other.gguf", "-o", tmp_path / "all.gguf")
    assert not (tmp_path / "all.gguf").exists()


def test_a_file_goes_to_the_legacy_form_and_back(parts, tmp_path):
    run("convert", parts[0], "-o", tmp_path / "m.dat")
    run("convert", tmp_path / "m.dat", "-o", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    back, whole = read_imatrix(tmp_path / "m.gguf"), read_imatrix(parts[0])
    for name in SHAPES:
        np.testing.assert_allclose(back.mean(name).ravel(), whole.mean(name).ravel(), rtol=1e-6)


def test_the_chunk_size_of_a_legacy_file_can_be_told(parts, tmp_path):
    run("convert", parts[0], "-o", tmp_path / "m.dat")
    run("convert", tmp_path / "m.dat", "-o", tmp_path / "m.gguf", "--dat-chunk-size", 100)
    assert read_imatrix(tmp_path / "m.gguf").chunk_size == 100


def test_what_the_legacy_form_cannot_hold_is_told(tmp_path):
    stats = statistics(SHAPES)
    add(stats.sums, "blk.0.unseen.weight", [0.0], 0)
    add(stats.priors, UP, np.ones(4), 1, n_rows=3)
    write_imatrix(tmp_path / "m.gguf", stats)
    said = run("convert", tmp_path / "m.gguf", "-o", tmp_path / "m.dat").stderr
    assert "no token reached blk.0.unseen.weight" in said
    assert "no place for the sums over all tokens" in said


def test_filling_gives_every_expert_tokens_once(tmp_path):
    stats = statistics(SHAPES)
    stats.sums[UP].counts[1] = stats.sums[UP].sum2[1] = 0
    add(stats.sums, "blk.0.unseen.weight", [0.0], 0)
    write_imatrix(tmp_path / "m.gguf", stats)
    result = run("fill", tmp_path / "m.gguf", "-o", tmp_path / "filled.gguf")
    assert "nothing is known of blk.0.unseen.weight: left out" in result.stderr
    filled = read_imatrix(tmp_path / "filled.gguf")
    assert filled.sums.keys() == SHAPES.keys()
    assert (filled.sums[UP].counts > 0).all()
    assert (filled.sums[UP].sum2 > 0).all()
    assert filled.kvs[FILLED] == Kv(KvType.BOOL, True)
    with pytest.raises(UsageError, match="filled already"):
        run("fill", tmp_path / "filled.gguf", "-o", tmp_path / "again.gguf")


def test_a_file_that_hides_its_experts_is_filled_with_a_remark(parts, tmp_path):
    run("convert", parts[0], "-o", tmp_path / "m.dat")
    said = run("fill", tmp_path / "m.dat", "-o", tmp_path / "filled.gguf").stderr
    assert f"{UP} tells nothing of single experts" in said


def test_a_real_file_is_shown_with_figures_and_coverage():
    result = run("show", RECORDED)
    assert result.exit_code == 0
    lines = {line.split()[0]: " ".join(line.split()) for line in result.stdout.splitlines() if line}
    assert lines["n_tokens"] == "n_tokens 30720"
    assert lines["blk.2.ffn_up_exps.weight"].startswith("blk.2.ffn_up_exps.weight ")
    assert lines["24"] == (
        "24 experts: 0.00% saw no token, 4.17% fewer than 32, 4.17% fewer than 256"
    )


def test_the_same_is_told_in_json():
    told = json.loads(run("show", RECORDED, "--json").stdout)
    assert (told["n_chunks"], told["chunk_size"]) == (60, 512)
    of = told["tensors"]["blk.2.ffn_up_exps.weight"]
    assert of["n_values"] == 8 * 512
    assert of["cosine"] is not None
    assert told["layers"]["0"]["cosine"] == 0
    assert told["coverage"]["layers"][1]["n_below_32"] == 1


def test_json_and_table_survive_hostile_metadata(tmp_path):
    name = "blk.0.\x1b[31mred\n_exps.weight"
    stats = statistics({name: (2, 2)})
    stats.kvs = {"quantkit.\x1b[0m": Kv(KvType.STRING, "\x1b]0;x\x07"), "x": Kv(KvType.U32, 1)}
    write_imatrix(tmp_path / "m.gguf", stats)
    raw = (tmp_path / "m.gguf").read_bytes()
    entry = b"x" + (4).to_bytes(4, "little") + (1).to_bytes(4, "little")
    assert raw.count(entry) == 1
    nan = b"x" + (6).to_bytes(4, "little") + np.float32(math.nan).tobytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(entry, nan))
    assert "\x1b" not in run("show", tmp_path / "m.gguf").stdout
    told = json.loads(run("show", tmp_path / "m.gguf", "--json").stdout)
    assert told["metadata"]["x"] == "nan"


def test_defaults_are_those_of_the_library():
    options = {option.name: option.default for option in fill_command.params}
    assert options["kappa"] == KAPPA
    assert {o.name: o.default for o in merge_command.params}["dat_chunk_size"] == N_CTX


def test_help_needs_no_numpy():
    code = (
        "import sys; from quantkit.cli.imatrix import imatrix_command\n"
        "imatrix_command(['--help'], standalone_mode=False)\n"
        "imatrix_command(['fill', '--help'], standalone_mode=False)\n"
        "sys.exit('numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
