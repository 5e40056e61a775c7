"""What a device's failure means to a user: one message, what to do, and exit code 10."""

from __future__ import annotations

import sys

import click
import pytest
import torch

from quantkit import cli
from quantkit.errors import DeviceError, UsageError
from quantkit.quantize.torch import devices
from quantkit.quantize.torch.devices import device_error, device_of

OOM = torch.OutOfMemoryError
FAILURE = getattr(torch, "AcceleratorError", RuntimeError)
DEBUGGING = "\nCUDA kernel errors might be asynchronously reported at some other API call"
TELLING = {
    "memory": (
        OOM("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.20 GiB free."),
        "--threads 1",
    ),
    "memory of the host": (FAILURE("CUDA error: out of memory" + DEBUGGING), "--memory"),
    "memory of a library": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "--memory",
    ),
    "another GPU than torch's": (
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        "no code for this GPU",
    ),
    "an old driver": (
        RuntimeError("CUDA driver version is insufficient for CUDA runtime version"),
        "update the GPU's driver",
    ),
    "a broken GPU": (FAILURE("CUDA error: uncorrectable ECC error encountered"), "--device cpu"),
}


@pytest.mark.parametrize("case", TELLING)
def test_a_failure_of_a_device_is_told_with_what_to_do(case):
    error, hint = TELLING[case]
    told = device_error(error)
    assert isinstance(told, DeviceError)
    assert told.message == str(error).splitlines()[0]
    assert hint in told.hint


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("The tokenizer ran out of memory cells"),
        ValueError("a list of CUDA devices"),
    ],
    ids=str,
)
def test_other_errors_are_left_alone(error):
    assert device_error(error) is None


def test_a_long_message_is_cut():
    told = device_error(OOM("CUDA out of memory. " + "x" * 10_000))
    assert len(told.message) < 300


@pytest.mark.parametrize("case", TELLING)
def test_the_command_line_ends_with_10_and_no_traceback(monkeypatch, capfd, case):
    @click.command()
    def convert() -> None:
        raise TELLING[case][0]

    monkeypatch.setattr(cli.cli, "get_command", lambda context, name: convert)
    monkeypatch.setattr(sys, "argv", ["quantkit", "convert"])
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capfd.readouterr().err
    assert ended.value.code == 10
    assert err.startswith("error: CUDA")
    assert "Traceback" not in err


def test_an_error_of_ours_is_not_taken_for_a_device(monkeypatch):
    @click.command()
    def convert() -> None:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(cli.cli, "get_command", lambda context, name: convert)
    monkeypatch.setattr(sys, "argv", ["quantkit", "convert"])
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(RuntimeError, match="dictionary"):
        cli.main()


@pytest.mark.parametrize("name", ["graphics", "cuda:99", "meta", "hpu", "mps", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match=f"device '{name}' cannot be used") as told:
        device_of(name)
    assert told.value.hint


def test_a_device_that_is_there_and_fails_is_a_failure(monkeypatch):
    def fail(*args, **kwargs):
        raise FAILURE("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices.torch, "zeros", fail)
    with pytest.raises(DeviceError, match="no kernel image"):
        device_of("cuda")
    with pytest.raises(UsageError):
        device_of("cuda:1")
