"""`general.*`: who made the model, what it is called, how to sample from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from quantkit.arch.base import SideFiles
from quantkit.container.kv import f32, i32, string, strings, u32
from quantkit.errors import SourceError
from quantkit.types import Kv, KvType, TensorSpec

_QUANTIZATION_VERSION = 2  # of ggml's block layouts; unchanged since 2023
_CARD_BYTES = 4 << 20

# generation_config.json key -> general.sampling key
_SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
}
_INTEGER_SAMPLING = frozenset({"top_k", "penalty_last_n", "mirostat"})


def general_kvs(
    arch: str,
    kind: str,
    root: Path,
    files: SideFiles,
    tensors: Iterable[TensorSpec],
    file_type: int,
    sampling: Mapping[str, float],
) -> dict[str, Kv]:
    """The `general.*` values in the order in which llama.cpp's converter writes them.

    `kind` is `model` or `mmproj`; `root` gives the name where the model card does not;
    `sampling` holds the recipe's values, which go before generation_config.json's.
    """
    kvs = {"general.architecture": string(arch), "general.type": string(kind)}
    chosen = _generation_sampling(files) | dict(sampling)
    for key, value in chosen.items():
        number = i32(int(value)) if key in _INTEGER_SAMPLING else f32(float(value))
        kvs[f"general.sampling.{key}"] = number
    kvs |= _authorship(root, tensors)
    kvs["general.quantization_version"] = u32(_QUANTIZATION_VERSION)
    kvs["general.file_type"] = u32(file_type)
    return kvs


def _generation_sampling(files: SideFiles) -> dict[str, float]:
    config = files.read_json("generation_config.json")
    if not isinstance(config, dict):
        return {}
    chosen = {}
    for source, key in _SAMPLING.items():
        value = config.get(source)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SourceError(f"{source} is not a number", where="generation_config.json")
        chosen[key] = value
    return chosen


def _authorship(root: Path, tensors: Iterable[TensorSpec]) -> dict[str, Kv]:
    """Name, license, tags, base models: gguf-py's heuristics over card, config and folder name."""
    import gguf  # noqa: PLC0415 - a quarter of a second that only conversion needs

    card = root / "README.md"
    if card.is_file() and card.stat().st_size > _CARD_BYTES:
        raise SourceError("larger than 4 MiB", where=str(card))
    total, shared, expert, n_experts = _parameters(tensors)
    metadata = gguf.Metadata.load(model_path=root, total_params=total)
    if metadata.name is None:
        metadata.name = root.resolve().name
    if metadata.size_label is None and total:
        metadata.size_label = gguf.size_label(total, shared, expert, n_experts)
    recorder = gguf.GGUFWriter(None, "none")
    metadata.set_gguf_meta_model(recorder)
    kvs: dict[str, Kv] = {}
    for key, value in recorder.kv_data[0].items():
        if key != "general.architecture" and not key.startswith("general.sampling."):
            kvs[key] = _kv(key, value.value)
    return kvs


def _kv(key: str, value: Any) -> Kv:
    if isinstance(value, str):
        return string(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return u32(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return strings(value)
    raise SourceError(f"{key} has a value that cannot be stored: {value!r:.80}", where="README.md")


def _parameters(tensors: Iterable[TensorSpec]) -> tuple[int, int, int, int]:
    """Total, shared, per-expert parameters and the number of experts, as size labels count them."""
    total = shared = expert = n_experts = 0
    for tensor in tensors:
        total += tensor.n_weights
        if tensor.role.startswith("routed_expert"):
            n_experts = tensor.shape[0]
            expert += prod(tensor.shape[1:])
        else:
            shared += tensor.n_weights
    return total, shared, expert, n_experts


def describe_name(kvs: Mapping[str, Kv], fallback: str) -> str:
    """A file-name stem from `general.*`: `Kimi-K2.5`."""
    name = kvs.get("general.name")
    text = str(name.value) if name and name.type is KvType.STRING else fallback
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-._")
    return kept.encode()[:120].decode(errors="ignore") or "model"
