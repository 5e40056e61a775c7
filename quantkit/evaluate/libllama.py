"""Bindings to the llama.cpp inside the xllamacpp wheel, for child processes only.

The wheel's extension module exports llama.cpp's C functions, so no build of our own is needed.
Struct layouts follow `llama.h` of the build in `BUILD`; `load` reads the library's own default
parameters back through them and refuses a build whose layout has moved. llama.cpp aborts the
process on some bad files: nothing here belongs into the user's process (see `llamacpp`).
"""

from __future__ import annotations

import ctypes as ct
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import UsageError

BUILD = "xllamacpp 2026.10.11549"
_UBATCH = 512  # llama.cpp's default, and the tools'
_BATCH = 2048


class ModelParams(ct.Structure):
    """`llama_model_params`."""

    _fields_ = (
        ("devices", ct.c_void_p),
        ("tensor_buft_overrides", ct.c_void_p),
        ("n_gpu_layers", ct.c_int32),
        ("split_mode", ct.c_int),
        ("load_mode", ct.c_int),
        ("lazy_mode", ct.c_int),
        ("main_gpu", ct.c_int32),
        ("tensor_split", ct.c_void_p),
        ("progress_callback", ct.c_void_p),
        ("progress_callback_user_data", ct.c_void_p),
        ("kv_overrides", ct.c_void_p),
        ("vocab_only", ct.c_bool),
        ("check_tensors", ct.c_bool),
        ("use_extra_bufts", ct.c_bool),
        ("no_host", ct.c_bool),
        ("no_alloc", ct.c_bool),
        ("load_mtp", ct.c_bool),
    )


class ContextParams(ct.Structure):
    """`llama_context_params`."""

    _fields_ = (
        ("n_ctx", ct.c_uint32),
        ("n_batch", ct.c_uint32),
        ("n_ubatch", ct.c_uint32),
        ("n_seq_max", ct.c_uint32),
        ("n_rs_seq", ct.c_uint32),
        ("n_outputs_max", ct.c_uint32),
        ("n_outputs_max_per_seq", ct.c_uint32),
        ("n_threads", ct.c_int32),
        ("n_threads_batch", ct.c_int32),
        ("ctx_type", ct.c_int),
        ("rope_scaling_type", ct.c_int),
        ("pooling_type", ct.c_int),
        ("attention_type", ct.c_int),
        ("flash_attn_type", ct.c_int),
        ("rope_freq_base", ct.c_float),
        ("rope_freq_scale", ct.c_float),
        ("yarn_ext_factor", ct.c_float),
        ("yarn_attn_factor", ct.c_float),
        ("yarn_beta_fast", ct.c_float),
        ("yarn_beta_slow", ct.c_float),
        ("yarn_orig_ctx", ct.c_uint32),
        ("defrag_thold", ct.c_float),
        ("cb_eval", ct.c_void_p),
        ("cb_eval_user_data", ct.c_void_p),
        ("type_k", ct.c_int),
        ("type_v", ct.c_int),
        # Two callbacks' worth of pointers and one more: null, and left so.
        ("callbacks", ct.c_void_p * 3),
        ("embeddings", ct.c_bool),
        ("offload_kqv", ct.c_bool),
        ("no_perf", ct.c_bool),
        ("op_offload", ct.c_bool),
        ("swa_full", ct.c_bool),
        ("kv_unified", ct.c_bool),
        ("samplers", ct.c_void_p),
        ("n_samplers", ct.c_size_t),
        ("ctx_other", ct.c_void_p),
    )


class Batch(ct.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ct.c_int32),
        ("token", ct.POINTER(ct.c_int32)),
        ("embd", ct.POINTER(ct.c_float)),
        ("pos", ct.POINTER(ct.c_int32)),
        ("n_seq_id", ct.POINTER(ct.c_int32)),
        ("seq_id", ct.POINTER(ct.POINTER(ct.c_int32))),
        ("logits", ct.POINTER(ct.c_int8)),
    )


PTR, INT, STR, BOOL = ct.c_void_p, ct.c_int32, ct.c_char_p, ct.c_bool
Signatures = Mapping[str, tuple[Any, Sequence[Any]]]

# name -> (result, arguments). Pointers to opaque structs are void pointers.
_SIGNATURES: Signatures = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (PTR, (STR, ModelParams)),
    "llama_model_get_vocab": (PTR, (PTR,)),
    "llama_init_from_model": (PTR, (PTR, ContextParams)),
    "llama_batch_init": (Batch, (INT, INT, INT)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (INT, (PTR, Batch)),
    "llama_get_logits_ith": (ct.POINTER(ct.c_float), (PTR, INT)),
    "llama_get_memory": (PTR, (PTR,)),
    "llama_memory_clear": (None, (PTR, BOOL)),
    "llama_vocab_n_tokens": (INT, (PTR,)),
    "llama_vocab_get_add_bos": (BOOL, (PTR,)),
    "llama_vocab_bos": (INT, (PTR,)),
    "llama_tokenize": (INT, (PTR, STR, INT, ct.POINTER(ct.c_int32), INT, BOOL, BOOL)),
}


def load(more: Signatures | None = None) -> ct.CDLL:
    """The library, with the functions used here and those of `more` typed.

    Raises `UsageError` where xllamacpp is missing, lacks a function, or has another layout.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise UsageError("xllamacpp is not installed", hint="pip install 'quantkit[llama]'")
    path = next(Path(spec.origin).parent.glob("xllamacpp*.so"), None)
    if path is None:
        raise _foreign("it has no extension module")
    lib = ct.CDLL(str(path))
    for name, (result, arguments) in {**_SIGNATURES, **(more or {})}.items():
        function = getattr(lib, name, None)
        if function is None:
            raise _foreign(f"it has no {name}")
        function.restype = result
        function.argtypes = list(arguments)
    _check_layout(lib)
    lib.llama_backend_init()
    return lib


def _check_layout(lib: ct.CDLL) -> None:
    """Compare the defaults that llama.cpp documents with what our structs show of them."""
    model = lib.llama_model_default_params()
    context = lib.llama_context_default_params()
    seen = {
        "model flags": (model.vocab_only, model.check_tensors, model.use_extra_bufts),
        "model gpu": (model.n_gpu_layers, model.main_gpu, model.kv_overrides),
        "sizes": (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max),
        "attention": (context.flash_attn_type, context.rope_scaling_type),
        "yarn": (context.yarn_ext_factor, context.yarn_beta_fast, context.yarn_orig_ctx),
        "kv types": (context.type_k, context.type_v),
        "flags": (context.embeddings, context.offload_kqv, context.no_perf, context.kv_unified),
        "tail": (context.samplers, context.n_samplers, context.ctx_other),
    }
    expected = {
        "model flags": (False, False, True),
        "model gpu": (-1, 0, None),
        "sizes": (512, _BATCH, _UBATCH, 1),
        "attention": (-1, -1),  # both: let the model decide
        "yarn": (-1.0, -1.0, 0),
        "kv types": (1, 1),  # F16
        "flags": (False, True, True, False),
        "tail": (None, 0, None),
    }
    if moved := [f"{key}: {seen[key]}" for key in expected if seen[key] != expected[key]]:
        raise _foreign(f"its parameter structs are laid out differently: {'; '.join(moved)}")


def _foreign(problem: str) -> UsageError:
    version = importlib.metadata.version("xllamacpp")
    return UsageError(
        f"xllamacpp {version} is not the build that quantkit knows: {problem}",
        hint=f"install the build that it knows: {BUILD}",
    )


class Session:
    """One model, loaded into this process, and what is asked of it.

    `params` are fields of `ModelParams`. Nothing is freed: the process ends instead. Refusals
    of llama.cpp are `RuntimeError`s here; its reasons are on standard error.
    """

    def __init__(self, lib: ct.CDLL, gguf: str, **params: Any) -> None:
        self.lib = lib
        model_params = lib.llama_model_default_params()
        for name, value in params.items():
            setattr(model_params, name, value)
        self.model = lib.llama_model_load_from_file(gguf.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {gguf}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        add_bos = lib.llama_vocab_get_add_bos(self.vocab)
        self.bos = int(lib.llama_vocab_bos(self.vocab)) if add_bos else None

    def context(self, n_ctx: int, *, threads: int = 1, kv_f32: bool = False, **params: Any) -> Any:
        """A context for one sequence, sized as llama-perplexity sizes it.

        That is an F16 cache, flash attention where the model allows it, and batches of at most
        2048 tokens. `kv_f32` keeps keys and values in F32 and turns flash attention off, which
        removes the rounding of the cache. `params` are fields of `ContextParams`.
        """
        values = self.lib.llama_context_default_params()
        values.n_ctx = n_ctx
        values.n_batch = min(n_ctx, _BATCH)
        values.n_ubatch = min(n_ctx, _UBATCH)
        values.n_outputs_max_per_seq = 0  # as many as the batch holds
        values.n_threads = values.n_threads_batch = threads
        if kv_f32:
            values.type_k = values.type_v = 0
            values.flash_attn_type = 0
        for name, value in params.items():
            setattr(values, name, value)
        context = self.lib.llama_init_from_model(self.model, values)
        if not context:
            raise RuntimeError("llama.cpp did not create a context")
        return context

    def clear(self, context: Any) -> None:
        """Forget what the context has seen."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)

    def decode(
        self, context: Any, ids: Sequence[int], first_pos: int = 0, first_row: int = 0
    ) -> NDArray[np.float32]:
        """Evaluate `ids` [n] from position `first_pos` in batches.

        Gives the logits of `ids[first_row:]`, f32 [n - first_row, n_vocab].
        """
        rows = np.empty((len(ids) - first_row, self.n_vocab), np.float32)
        for begin in range(0, len(ids), _BATCH):
            part = ids[begin : begin + _BATCH]
            batch = self.lib.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i] = token
                batch.pos[i] = first_pos + begin + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = begin + i >= first_row
            if status := self.lib.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode: {status}")
            for i in range(max(0, first_row - begin), len(part)):
                row = self.lib.llama_get_logits_ith(context, i)
                rows[begin + i - first_row] = np.ctypeslib.as_array(row, (self.n_vocab,))
            self.lib.llama_batch_free(batch)
        return rows

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids; `add_special` adds BOS and EOS as the vocabulary says."""
        data = text.encode()
        ids = (ct.c_int32 * (len(data) + 8))()
        count = self.lib.llama_tokenize(
            self.vocab, data, len(data), ids, len(ids), add_special, parse_special
        )
        if count < 0:
            raise RuntimeError(f"llama_tokenize: {count}")
        return ids[:count]
