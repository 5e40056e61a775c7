"""torch's devices: finding one by name, and what their failures mean to a user."""

from __future__ import annotations

import re

import torch

from quantkit.errors import DeviceError, UsageError

_MAX_MESSAGE = 240

# What torch says -> what to do about it; the first that fits counts.
_HINTS = {
    "out of memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED": (
        "free memory on the device, or take less of it: --threads 1, a smaller --memory, or"
        " --device cpu; then run the same command again"
    ),
    "no kernel image|invalid device function": (
        "this build of torch has no code for this GPU: install one that has (pytorch.org tells"
        " which), or give --device cpu"
    ),
    "driver version is insufficient|driver on your system is too old": (
        "update the GPU's driver, install a torch built for an older CUDA, or give --device cpu"
    ),
    "not compiled with CUDA": (
        "this torch is built for the CPU alone: install one for your GPU (pytorch.org tells which),"
        " or leave --device out"
    ),
}
_OTHERWISE = (
    "run the same command again to continue; where it fails again, see what the system's log says"
    " of the GPU, or give --device cpu"
)
# Only newer versions of torch have a class for these.
_DEVICES = "^(CUDA|HIP) (error|driver)|CUBLAS_STATUS|CUDNN_STATUS"


def device_of(name: str) -> torch.device:
    """The device of that name, with its number, tried out.

    Raises `UsageError` if it is not there, and `DeviceError` if it is there and fails.
    """
    try:
        trial = torch.zeros(1, device=name)
        trial.cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        failed = device_error(error) if _is_there(name) else None
        if failed:
            raise failed from None
        seen = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        raise UsageError(
            f"device {name!r} cannot be used: {_first_line(error)}",
            hint=_hint(str(error)) or f"torch sees {', '.join(seen)}",
        ) from None
    return trial.device


def device_error(error: Exception) -> DeviceError | None:
    """What to tell the user of a device that fails; None for any other error."""
    kinds = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    if isinstance(error, kinds) or re.search(_DEVICES, str(error)):
        return DeviceError(_first_line(error), hint=_hint(str(error)) or _OTHERWISE)
    return None


def _is_there(name: str) -> bool:
    number = re.fullmatch(r"cuda(?::(\d+))?", name)
    return number is not None and int(number[1] or 0) < torch.cuda.device_count()


def _hint(text: str) -> str:
    return next((hint for pattern, hint in _HINTS.items() if re.search(pattern, text)), "")


def _first_line(error: Exception) -> str:
    """Of what torch says, whose further lines are about debugging torch."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if len(line) <= _MAX_MESSAGE else f"{line[:_MAX_MESSAGE]} ..."
