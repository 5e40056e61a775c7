"""The machine and what is installed on it."""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.pipeline.doctor.finding import Finding
from quantkit.pipeline.doctor.limits import (
    PROC,
    cpu_quota,
    load_of_others,
    memory_available,
    n_cores,
)
from quantkit.run.events import size

# package -> lowest version, and whether converting needs it
_NEEDED: dict[str, tuple[str, bool]] = {
    "numpy": ("1.26", True),
    "numba": ("0.60", True),
    "gguf": ("0.19", True),
    "pydantic": ("2.7", True),
    "click": ("8.1", True),
    "regex": ("2024.5", True),
    "huggingface_hub": ("2.0", True),
    "torch": ("2.6", False),
    "tokenizers": ("0.21", False),
    "tiktoken": ("0.9", False),
    "jinja2": ("3.1.6", False),
    "datasets": ("3.0", False),
    "xllamacpp": ("2026.9", False),
}
# package -> (from, up to but without, what is wrong with it)
_BAD: dict[str, tuple[str, str, str]] = {
    "click": ("8.4.0", "8.4.2", "completion in fish is broken"),
    "datasets": ("0", "5.0.1", "an archive from the Hub may write outside its folder"),
    "huggingface_hub": ("3.0", "9999", "not known to this version of quantkit"),
    "jinja2": ("0", "3.1.6", "templates can leave the sandbox"),
}


def machine() -> Iterator[Finding]:
    """Everything that can be said without a model."""
    yield Finding(
        "system",
        f"quantkit {__version__}, Python {platform.python_version()}, {platform.system()}"
        f" {platform.machine()}",
    )
    yield from _cores()
    yield _simd()
    yield _memory()
    yield _gpu()
    yield _kernel_cache()
    yield _hub_cache()
    yield _token()
    yield from _versions()


def usable_cores() -> float:
    """Cores' worth of time that this process can have."""
    return min(float(n_cores()), cpu_quota() or float("inf"))


def _cores() -> Iterator[Finding]:
    n, quota, load = n_cores(), cpu_quota(), load_of_others()
    total = os.cpu_count() or n
    value = f"{n} of {total}" if n < total else f"{n}"
    if quota is not None and quota < n:
        hint = f"give --threads {max(1, round(quota))}: more only wait for each other"
        yield Finding("cores", f"{value}, {quota:.1f} by the control group", "warning", hint)
    else:
        yield Finding("cores", value)
    if load is not None and load > n / 2:
        hint = "what takes an hour alone takes longer beside them"
        yield Finding("load", f"{load:.1f} processes want a core", "note", hint)


def _simd() -> Finding:
    from llvmlite import binding  # noqa: PLC0415
    from numba import config  # noqa: PLC0415

    named = config.CPU_FEATURES
    if named is None:
        features = {name for name, has in binding.get_host_cpu_features().items() if has}
    else:
        features = {f[1:] for f in named.split(",") if f.startswith("+")}
    known = [name for name in ("avx512f", "avx2", "fma", "f16c", "neon") if name in features]
    value = f"{', '.join(known) or 'none'} ({config.CPU_NAME or binding.get_host_cpu_name()})"
    if features & {"avx2", "neon"}:
        return Finding("vectors", value)
    return Finding("vectors", value, "warning", "encoders are several times slower without AVX2")


def _memory() -> Finding:
    free = memory_available()
    if free is None:
        return Finding("memory", "not known here", "note")
    level = "warning" if free < 1 << 30 else "ok"
    hint = "a conversion wants about 1 GB" if level == "warning" else ""
    return Finding("memory", f"{size(free)} available", level, hint)  # type: ignore[arg-type]


def _gpu() -> Finding:
    if find_spec("torch") is None:
        hint = "pip install 'quantkit[calibrate]' to calibrate, to evaluate, and for --device cuda"
        return Finding("GPU", "no torch: weights are encoded on the CPU", "note", hint)
    torch = import_module("torch")
    if not (torch.version.cuda or torch.version.hip):
        value = f"torch {torch.__version__} is built for the CPU alone"
        if not (PROC / "driver/nvidia/version").exists():
            return Finding("GPU", value)
        hint = "install a build of torch for the GPU (pytorch.org tells which), for --device cuda"
        return Finding("GPU", f"{value}, though there is an NVIDIA driver", "warning", hint)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    with warnings.catch_warnings(record=True) as told:  # why torch can use none: an old driver
        warnings.simplefilter("always")
        n_found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not n_found:
        why = f": {str(told[0].message).splitlines()[0]}" if told else ""
        value = f"none that torch {torch.__version__} ({built}) can use{why}"
        return Finding("GPU", value, "warning" if told else "ok")
    return _gpus(torch, n_found, built)


def _gpus(torch: Any, n_found: int, built: str) -> Finding:
    """Each by name, with its memory; a trial on the first tells whether torch has code for it."""
    from quantkit.errors import QuantkitError  # noqa: PLC0415
    from quantkit.quantize.torch.devices import device_of  # noqa: PLC0415

    found = []
    try:
        for number in range(n_found):
            device_of(f"cuda:{number}")
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            found.append(f"{name}, {size(free)} of {size(total)} free")
    except QuantkitError as error:
        said = "; ".join([*found, error.message])
        return Finding("GPU", f"{said} (torch {torch.__version__})", "warning", error.hint)
    hint = "used with --device cuda" + (", or cuda:1 and so on" if n_found > 1 else "")
    return Finding("GPU", f"{'; '.join(found)} (torch for {built})", "ok", hint)


def _kernel_cache() -> Finding:
    own = Path(str(import_module("quantkit.quantize.kernels").__file__)).parent / "__pycache__"
    named = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(named) if named else own
    n = sum(1 for _ in folder.rglob("*.nbc")) if folder.is_dir() else 0
    if n:
        return Finding("kernels", f"{n} compiled, in {folder}")
    present = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(present, os.W_OK):
        return Finding("kernels", f"none compiled yet, kept in {folder}", "note")
    hint = "set NUMBA_CACHE_DIR to a folder that can be written"
    return Finding("kernels", f"{folder} cannot be written: compiled anew each run", "note", hint)


def _hf_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()


def _hub_cache() -> Finding:
    home = _hf_home()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    value = f"{home}{'' if home.is_dir() else ' (not there yet)'}"
    if offline:
        return Finding("Hub", value, "note", "HF_HUB_OFFLINE is set: models on the Hub are refused")
    return Finding("Hub", value)


def _token() -> Finding:
    """Whether there is a token. What it is stays where it is."""
    stored = Path(os.environ.get("HF_TOKEN_PATH") or _hf_home() / "token").expanduser()
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return Finding("token", "in the environment (--online asks the Hub whether it is valid)")
    if stored.is_file():
        return Finding("token", f"in {stored} (--online asks the Hub whether it is valid)")
    return Finding("token", "none: public models only, and nothing can be published", "note")


def token_online() -> Finding:
    """Whose token it is, by asking the Hub."""
    from quantkit.errors import QuantkitError  # noqa: PLC0415
    from quantkit.hub.client import Caller, Patience, api  # noqa: PLC0415

    try:
        found = Caller("", Patience(tries=2)).call(lambda: api().whoami(), "asking for the account")
    except QuantkitError as error:
        return Finding("account", error.message, "warning", error.hint)
    except OSError:  # what the client raises without any token
        return Finding("account", "no token to ask with", "warning", "`hf auth login`")
    name = found.get("name", "") if isinstance(found, dict) else ""
    plain = name if re.fullmatch(r"[\w.-]{1,96}", str(name)) else "?"
    return Finding("account", f"the Hub knows the token as {plain}'s")


def _versions() -> Iterator[Finding]:
    seen = []
    for package, (lowest, needed) in _NEEDED.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            if needed:
                hint = f"pip install '{package}>={lowest}'"
                yield Finding(package, "not installed", "failure", hint, 2)
            continue
        seen.append(f"{package} {version}")
        first, end, wrong = _BAD.get(package, ("", "", ""))
        if as_numbers(version) < as_numbers(lowest):
            level = "failure" if needed else "warning"
            hint = f"pip install --upgrade '{package}>={lowest}'"
            code = 2 if needed else 0
            yield Finding(package, f"{version} is too old", level, hint, code)  # type: ignore[arg-type]
        elif wrong and as_numbers(first) <= as_numbers(version) < as_numbers(end):
            yield Finding(package, f"{version}: {wrong}", "warning", "install another version")
    yield Finding("packages", ", ".join(seen))
    if not any(find_spec(name) for name in ("xllamacpp", "llama_cpp")):
        hint = "pip install 'quantkit[llama]' to run converted files here"
        yield Finding("llama.cpp", "no wheel: files can be made, not run", "note", hint)


def as_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: 2.13.0+cpu -> (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
