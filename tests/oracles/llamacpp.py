"""llama.cpp as an oracle: what the real runtime makes of a GGUF file.

llama.cpp aborts the process on some bad files, so each call runs in a child
(`python -m tests.oracles.llamacpp`), which reads its arguments as JSON from standard input and
leaves its answer in an npz file. A child that dies is a `LlamaCppError` with its last words.
"""

from __future__ import annotations

import ctypes as ct
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.evaluate.libllama import Session
from tests.oracles import _libllama

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300


class LlamaCppError(RuntimeError):
    """llama.cpp refused the input or died; `stderr` is what it printed."""

    def __init__(self, message: str, stderr: str) -> None:
        super().__init__(f"{message}\n{stderr[-4000:]}")
        self.stderr = stderr


def logits(
    gguf_path: Path | str,
    token_ids: Any,
    *,
    n_ctx: int | None = None,
    yarn_beta_fast: float | None = None,
    kv_f32: bool = False,
    extra_bufts: bool = True,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Logits of every position.

    `token_ids` is [n_tok], giving f32 [n_tok, n_vocab], or [n_seq, n_tok] of independent
    sequences, giving f32 [n_seq, n_tok, n_vocab] from one load of the model. `kv_f32` keeps keys
    and values in F32 and turns flash attention off, which removes rounding that the default F16
    cache adds. `extra_bufts=False` is llama.cpp's `--no-repack`. `yarn_beta_fast` overrides the
    model's, as `--yarn-beta-fast` does.
    """
    ids = np.asarray(token_ids, dtype=np.int32)
    answer: NDArray[np.float32] = _ask(
        "logits",
        gguf=_path(gguf_path),
        ids=np.atleast_2d(ids).tolist(),
        n_ctx=n_ctx,
        yarn_beta_fast=yarn_beta_fast,
        kv_f32=kv_f32,
        extra_bufts=extra_bufts,
        threads=threads,
    )["logits"]
    return answer if ids.ndim == 2 else answer.reshape(answer.shape[1:])


def tokenize(
    gguf_path: Path | str, texts: list[str], special: bool = True, *, add_special: bool = False
) -> list[list[int]]:
    """Token ids of each text; `special` parses special tokens, `add_special` adds BOS/EOS."""
    answer = _ask(
        "tokenize",
        gguf=_path(gguf_path),
        texts=texts,
        parse_special=special,
        add_special=add_special,
    )
    bounds = np.cumsum(answer["counts"])[:-1]
    return [part.tolist() for part in np.split(answer["ids"], bounds)]


def generate(gguf_path: Path | str, prompt: str, n_tokens: int) -> str:
    """Greedy continuation of `prompt`, up to `n_tokens` tokens or an end-of-generation token."""
    return str(_ask("generate", gguf=_path(gguf_path), prompt=prompt, n_tokens=n_tokens)["text"])


def metadata(gguf_path: Path | str) -> dict[str, str]:
    """Key-value pairs as llama.cpp prints them (arrays are abbreviated by llama.cpp)."""
    answer = _ask("metadata", gguf=_path(gguf_path))
    return dict(zip(answer["keys"].tolist(), answer["values"].tolist(), strict=True))


def loads(gguf_path: Path | str, *, check_tensors: bool = True) -> tuple[bool, str]:
    """Whether llama.cpp loads the file, splits included, and creates a context; and its log."""
    return _succeeds("loads", gguf=_path(gguf_path), check_tensors=check_tensors)


def load_mmproj(gguf_path: Path | str, text_model_gguf: Path | str) -> tuple[bool, str]:
    """Whether llama.cpp opens the vision projector beside this text model; and its log."""
    return _succeeds("load_mmproj", mmproj=_path(gguf_path), gguf=_path(text_model_gguf))


def encode_image(
    gguf_path: Path | str, text_model_gguf: Path | str, image: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Embeddings f32 [n_image_tok, n_embd] of an RGB image u8 [height, width, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is u8 [height, width, 3], got {image.dtype} {image.shape}")
    embeddings: NDArray[np.float32] = _ask(
        "encode_image",
        mmproj=_path(gguf_path),
        gguf=_path(text_model_gguf),
        height=image.shape[0],
        width=image.shape[1],
        rgb=image.tobytes().hex(),
    )["embeddings"]
    return embeddings


def _path(path: Path | str) -> str:
    return str(Path(path).resolve())


def _run(operation: str, result: Path, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.oracles.llamacpp", operation, str(result)],
        input=json.dumps(request),
        cwd=_ROOT,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_TIMEOUT_S,
        check=False,
    )


def _ask(operation: str, **request: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.npz"
        done = _run(operation, result, request)
        if done.returncode:
            raise LlamaCppError(f"{operation}: exit status {done.returncode}", done.stderr)
        with np.load(result) as arrays:
            return {name: arrays[name] for name in arrays.files}


def _succeeds(operation: str, **request: Any) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        done = _run(operation, Path(folder) / "result.npz", request)
    return done.returncode == 0, done.stderr


class _Session(Session):
    """The child's side: one model, and what is asked of it. Freed by the end of the process."""

    def __init__(self, gguf: str, **params: Any) -> None:
        super().__init__(_libllama.load(), gguf, n_gpu_layers=0, **params)

    def detokenize(self, ids: list[int]) -> str:
        data = ct.create_string_buffer(256 * (len(ids) + 1))
        count = self.lib.llama_detokenize(
            self.vocab, (ct.c_int32 * len(ids))(*ids), len(ids), data, len(data), False, True
        )
        if count < 0:
            raise SystemExit(f"llama_detokenize: {count}")
        return data.raw[:count].decode(errors="replace")


def _child_logits(request: dict[str, Any]) -> dict[str, Any]:
    session = _Session(request["gguf"], use_extra_bufts=request["extra_bufts"])
    sequences = request["ids"]
    params = {}
    if request["yarn_beta_fast"] is not None:
        params["yarn_beta_fast"] = request["yarn_beta_fast"]
    context = session.context(
        request["n_ctx"] or len(sequences[0]),
        threads=request["threads"],
        kv_f32=request["kv_f32"],
        **params,
    )
    result = np.empty((len(sequences), len(sequences[0]), session.n_vocab), np.float32)
    for i, ids in enumerate(sequences):
        session.clear(context)
        result[i] = session.decode(context, ids)
    return {"logits": result}


def _child_tokenize(request: dict[str, Any]) -> dict[str, Any]:
    session = _Session(request["gguf"], vocab_only=True)
    parts = [
        session.tokenize(
            text, add_special=request["add_special"], parse_special=request["parse_special"]
        )
        for text in request["texts"]
    ]
    ids = np.array([token for part in parts for token in part], np.int32)
    return {"ids": ids, "counts": np.array([len(part) for part in parts], np.int64)}


def _child_generate(request: dict[str, Any]) -> dict[str, Any]:
    session = _Session(request["gguf"])
    prompt = session.tokenize(request["prompt"], add_special=True, parse_special=True)
    context = session.context(len(prompt) + request["n_tokens"])
    row = session.decode(context, prompt)[-1]
    made: list[int] = []
    while len(made) < request["n_tokens"]:
        token = int(row.argmax())
        if session.lib.llama_vocab_is_eog(session.vocab, token):
            break
        made.append(token)
        row = session.decode(context, [token], len(prompt) + len(made) - 1)[0]
    return {"text": np.array(session.detokenize(made))}


def _child_metadata(request: dict[str, Any]) -> dict[str, Any]:
    session = _Session(request["gguf"], vocab_only=True)
    count = session.lib.llama_model_meta_count(session.model)

    def text(getter: Any, index: int) -> str:
        size = getter(session.model, index, None, 0)
        data = ct.create_string_buffer(size + 1)
        getter(session.model, index, data, len(data))
        return data.value.decode(errors="replace")

    lib = session.lib
    return {
        "keys": np.array([text(lib.llama_model_meta_key_by_index, i) for i in range(count)]),
        "values": np.array([text(lib.llama_model_meta_val_str_by_index, i) for i in range(count)]),
    }


def _child_loads(request: dict[str, Any]) -> dict[str, Any]:
    _Session(request["gguf"], check_tensors=request["check_tensors"]).context(64)
    return {}


def _vision(request: dict[str, Any]) -> tuple[_Session, Any]:
    session = _Session(request["gguf"])
    params = session.lib.mtmd_context_params_default()
    params.use_gpu = params.print_timings = params.warmup = False
    params.n_threads = 1
    params.flash_attn_type = 0
    vision = session.lib.mtmd_init_from_file(request["mmproj"].encode(), session.model, params)
    if not vision or not session.lib.mtmd_support_vision(vision):
        raise SystemExit(f"llama.cpp did not load {request['mmproj']}")
    return session, vision


def _child_load_mmproj(request: dict[str, Any]) -> dict[str, Any]:
    _vision(request)
    return {}


def _child_encode_image(request: dict[str, Any]) -> dict[str, Any]:
    session, vision = _vision(request)
    lib = session.lib
    bitmap = lib.mtmd_bitmap_init(
        request["width"], request["height"], bytes.fromhex(request["rgb"])
    )
    marker = lib.mtmd_default_marker()
    text = _libllama.MtmdText(marker, len(marker), False, True)
    chunks = lib.mtmd_input_chunks_init()
    status = lib.mtmd_tokenize(vision, chunks, ct.byref(text), (ct.c_void_p * 1)(bitmap), 1)
    if status:
        raise SystemExit(f"mtmd_tokenize: {status}")
    n_embd = lib.llama_model_n_embd(session.model)
    parts = []
    for i in range(lib.mtmd_input_chunks_size(chunks)):
        chunk = lib.mtmd_input_chunks_get(chunks, i)
        if lib.mtmd_input_chunk_get_type(chunk) != 1:  # text around the image
            continue
        if status := lib.mtmd_encode_chunk(vision, chunk):
            raise SystemExit(f"mtmd_encode_chunk: {status}")
        shape = (lib.mtmd_input_chunk_get_n_tokens(chunk), n_embd)
        parts.append(np.ctypeslib.as_array(lib.mtmd_get_output_embd(vision), shape).copy())
    return {"embeddings": np.concatenate(parts)}


_OPERATIONS = {
    "logits": _child_logits,
    "tokenize": _child_tokenize,
    "generate": _child_generate,
    "metadata": _child_metadata,
    "loads": _child_loads,
    "load_mmproj": _child_load_mmproj,
    "encode_image": _child_encode_image,
}


def _main() -> None:
    operation, result = sys.argv[1:]
    try:
        np.savez(result, **_OPERATIONS[operation](json.load(sys.stdin)))
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    _main()
