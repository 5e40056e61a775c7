"""The doctor says what there is and what would fail, and leaves nothing behind."""

from __future__ import annotations

import json
import sys
import warnings
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch

from quantkit.cli import main
from quantkit.errors import DeviceError
from quantkit.pipeline.doctor import disks, job, machine
from quantkit.pipeline.doctor.machine import as_numbers
from quantkit.quantize.torch import devices

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
CANARY = "hf_CANARYCANARYCANARYCANARYCANARYCANA"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def doctor(monkeypatch, capfd, tmp_path):
    """Run `quantkit doctor` as its entry point does: (exit code, stdout, stderr)."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(job, "_MEASURED_S", 0.02)
    monkeypatch.setattr(disks, "_SAMPLE", 1 << 20)

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantkit", "doctor", *map(str, arguments)])
        monkeypatch.setattr("signal.signal", lambda number, handler: None)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return run


def findings(out: str) -> dict[str, dict]:
    return {finding["topic"]: finding for finding in json.loads(out)["findings"]}


def test_a_machine_without_a_model(doctor):
    code, out, _ = doctor("--json")
    found = findings(out)
    assert code == 0
    assert {"system", "cores", "vectors", "memory", "GPU", "kernels", "token"} <= set(found)
    assert found["cores"]["value"].split()[0].isdigit()


def _torch(monkeypatch, **cuda) -> None:
    """A torch that is built for CUDA, whose functions say these things."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_a_torch_for_the_cpu_is_told_from_a_machine_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = machine._gpu()
    assert (found.level, "built for the CPU alone" in found.value) == ("ok", True)
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    (tmp_path / "driver" / "nvidia" / "version").write_text("NVRM version: 580.1")
    found = machine._gpu()
    assert (found.level, "install a build of torch" in found.hint) == ("warning", True)
    _torch(monkeypatch, is_available=lambda: False)
    found = machine._gpu()
    assert (found.level, "CUDA 12.8" in found.value) == ("ok", True)


def test_why_torch_can_use_no_gpu_is_said(monkeypatch):
    def old() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\nmore", stacklevel=1)
        return False

    _torch(monkeypatch, is_available=old)
    found = machine._gpu()
    assert (found.level, found.value.endswith("the driver is too old")) == ("warning", True)


def test_gpus_are_named_with_their_memory(monkeypatch):
    _torch(
        monkeypatch,
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda number: (10**9 * (number + 1), 8 * 10**10),
        get_device_name=lambda number: f"Card {number}",
    )
    monkeypatch.setattr(devices, "device_of", lambda name: None)
    found = machine._gpu()
    assert found.level == "ok"
    for part in ("Card 0", "Card 1", "80", "CUDA 12.8"):
        assert part in found.value
    assert "cuda:1" in found.hint


def test_a_gpu_that_this_torch_has_no_code_for_is_a_warning(monkeypatch):
    def refuse(name: str) -> None:
        raise DeviceError("CUDA error: no kernel image", hint="install one that has")

    _torch(monkeypatch, is_available=lambda: True, device_count=lambda: 1)
    monkeypatch.setattr(devices, "device_of", refuse)
    found = machine._gpu()
    assert (found.level, found.hint) == ("warning", "install one that has")


def test_a_job_is_planned_tried_and_timed(doctor, tmp_path):
    code, out, _ = doctor(
        FIXTURE, "-r", "q4_k_m", "-o", tmp_path / "new" / "out", "-t", "1", "--json"
    )
    told, found = json.loads(out)["job"], findings(out)
    assert code == 0
    assert told["limit"] in told["seconds"]
    assert told["total_seconds"] == max(told["seconds"].values()) > 0
    assert told["n_written"] > 10e6
    assert "Q4_K_M" in found["job"]["value"]
    assert not list(tmp_path.rglob("*"))  # neither the folder nor a file


def test_feedback_is_forecast_as_what_it_is(doctor):
    code, out, _ = doctor(FIXTURE, "-r", "ud-q2_k_xl", "-t", "1", "--json")
    assert code == 0
    assert json.loads(out)["job"]["limit"] == "rounding with feedback"


def test_people_get_lines(doctor):
    code, out, _ = doctor(FIXTURE, "-r", "q4_x", "-t", "1")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("ok    time")]


def test_a_full_disk_is_a_failure(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**6))
    code, out, _ = doctor(FIXTURE, "-r", "q4_x", "-o", tmp_path, "-t", "1", "--json")
    assert code == 5
    assert findings(out)["output"]["level"] == "failure"


def test_an_output_that_is_a_file_is_a_failure(doctor, tmp_path):
    (tmp_path / "taken").write_text("")
    code, out, _ = doctor("-o", tmp_path / "taken", "--json")
    assert (code, findings(out)["output"]["level"]) == (5, "failure")


def test_too_little_memory_is_a_failure(doctor, monkeypatch):
    monkeypatch.setattr(job, "memory_available", lambda: 100 << 20)
    code, out, _ = doctor(FIXTURE, "-r", "q4_x", "-t", "1", "--json")
    assert (code, findings(out)["memory"]["level"]) == (5, "failure")


def test_a_budget_that_no_tile_fits_is_refused_as_convert_would(doctor):
    code, _, err = doctor(FIXTURE, "-r", "q4_x", "--memory", "1MB")
    assert code == 2
    assert "--memory" in err


def test_a_model_that_is_not_there_is_told_as_convert_would(doctor, tmp_path):
    code, _, err = doctor(tmp_path / "nowhere", "-r", "q4_x")
    assert code != 0
    assert "Traceback" not in err


@pytest.mark.parametrize("place", ["environment", "file", "nowhere"])
def test_a_token_is_seen_and_never_shown(doctor, monkeypatch, tmp_path, place):
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", CANARY)
    elif place == "file":
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "token").write_text(CANARY)
    for arguments in ((), ("--json",)):
        _, out, err = doctor(*arguments)
        assert CANARY not in out + err
    assert ("none" in findings(out)["token"]["value"]) == (place == "nowhere")


BAD = {
    "too old and needed": ({"numba": "0.59.1"}, "numba", "failure", 2),
    "missing and needed": ({"gguf": None}, "gguf", "failure", 2),
    "too old, not needed": ({"torch": "2.1.0+cpu"}, "torch", "warning", 0),
    "known to be bad": ({"jinja2": "3.1.5"}, "jinja2", "warning", 0),
    "a bad one between good ones": ({"click": "8.4.1"}, "click", "warning", 0),
}


@pytest.mark.parametrize("case", BAD)
def test_versions(doctor, monkeypatch, case):
    versions, package, level, expected = BAD[case]
    real = metadata.version

    def version(name):
        if name in versions and versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    code, out, _ = doctor("--json")
    assert (findings(out)[package]["level"], code) == (level, expected)


def test_versions_compare_as_numbers():
    assert as_numbers("2.13.0+cpu") == (2, 13, 0)
    assert as_numbers("0.60") > as_numbers("0.59.1")
    assert as_numbers("2026.10.1") > as_numbers("2026.9")
