"""Bindings to the llama.cpp inside the xllamacpp wheel, for the child process of `llamacpp`.

The wheel's extension module exports llama.cpp's C functions, so no build of our own is needed.
Struct layouts follow `llama.h` and `mtmd.h` of the build in `BUILD`; `load` reads the library's
own default parameters back through them and refuses a build whose layout has moved.
"""

from __future__ import annotations

import ctypes as ct
import importlib.metadata
import importlib.util
from pathlib import Path

BUILD = "xllamacpp 2026.10.11549"


class ModelParams(ct.Structure):
    _fields_ = [
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
    ]


class ContextParams(ct.Structure):
    _fields_ = [
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
    ]


class Batch(ct.Structure):
    _fields_ = [
        ("n_tokens", ct.c_int32),
        ("token", ct.POINTER(ct.c_int32)),
        ("embd", ct.POINTER(ct.c_float)),
        ("pos", ct.POINTER(ct.c_int32)),
        ("n_seq_id", ct.POINTER(ct.c_int32)),
        ("seq_id", ct.POINTER(ct.POINTER(ct.c_int32))),
        ("logits", ct.POINTER(ct.c_int8)),
    ]


class MtmdParams(ct.Structure):
    _fields_ = [
        ("use_gpu", ct.c_bool),
        ("device", ct.c_void_p),
        ("print_timings", ct.c_bool),
        ("n_threads", ct.c_int),
        ("image_marker", ct.c_char_p),
        ("media_marker", ct.c_char_p),
        ("flash_attn_type", ct.c_int),
        ("warmup", ct.c_bool),
        ("image_min_tokens", ct.c_int),
        ("image_max_tokens", ct.c_int),
        ("cb_eval", ct.c_void_p),
        ("cb_eval_user_data", ct.c_void_p),
        ("batch_max_tokens", ct.c_int),
        ("progress_callback", ct.c_void_p),
        ("progress_callback_user_data", ct.c_void_p),
    ]


class MtmdText(ct.Structure):
    _fields_ = [
        ("text", ct.c_char_p),
        ("text_len", ct.c_size_t),
        ("add_special", ct.c_bool),
        ("parse_special", ct.c_bool),
    ]


_PTR, _INT, _STR = ct.c_void_p, ct.c_int32, ct.c_char_p

# name -> (result, arguments). Pointers to opaque structs are void pointers.
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (_PTR, [_STR, ModelParams]),
    "llama_model_free": (None, [_PTR]),
    "llama_model_get_vocab": (_PTR, [_PTR]),
    "llama_model_n_embd": (_INT, [_PTR]),
    "llama_model_meta_count": (_INT, [_PTR]),
    "llama_model_meta_key_by_index": (_INT, [_PTR, _INT, _STR, ct.c_size_t]),
    "llama_model_meta_val_str_by_index": (_INT, [_PTR, _INT, _STR, ct.c_size_t]),
    "llama_init_from_model": (_PTR, [_PTR, ContextParams]),
    "llama_free": (None, [_PTR]),
    "llama_batch_init": (Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_INT, [_PTR, Batch]),
    "llama_get_logits_ith": (ct.POINTER(ct.c_float), [_PTR, _INT]),
    "llama_get_memory": (_PTR, [_PTR]),
    "llama_memory_clear": (None, [_PTR, ct.c_bool]),
    "llama_vocab_n_tokens": (_INT, [_PTR]),
    "llama_vocab_is_eog": (ct.c_bool, [_PTR, _INT]),
    "llama_tokenize": (
        _INT,
        [_PTR, _STR, _INT, ct.POINTER(ct.c_int32), _INT, ct.c_bool, ct.c_bool],
    ),
    "llama_detokenize": (
        _INT,
        [_PTR, ct.POINTER(ct.c_int32), _INT, _STR, _INT, ct.c_bool, ct.c_bool],
    ),
    "mtmd_context_params_default": (MtmdParams, []),
    "mtmd_init_from_file": (_PTR, [_STR, _PTR, MtmdParams]),
    "mtmd_free": (None, [_PTR]),
    "mtmd_support_vision": (ct.c_bool, [_PTR]),
    "mtmd_default_marker": (_STR, []),
    "mtmd_bitmap_init": (_PTR, [ct.c_uint32, ct.c_uint32, _STR]),
    "mtmd_bitmap_free": (None, [_PTR]),
    "mtmd_input_chunks_init": (_PTR, []),
    "mtmd_input_chunks_free": (None, [_PTR]),
    "mtmd_input_chunks_size": (ct.c_size_t, [_PTR]),
    "mtmd_input_chunks_get": (_PTR, [_PTR, ct.c_size_t]),
    "mtmd_input_chunk_get_type": (ct.c_int, [_PTR]),
    "mtmd_input_chunk_get_n_tokens": (ct.c_size_t, [_PTR]),
    "mtmd_tokenize": (
        _INT,
        [_PTR, _PTR, ct.POINTER(MtmdText), ct.POINTER(ct.c_void_p), ct.c_size_t],
    ),
    "mtmd_encode_chunk": (_INT, [_PTR, _PTR]),
    "mtmd_get_output_embd": (ct.POINTER(ct.c_float), [_PTR]),
}


def load() -> ct.CDLL:
    """The library, with every function in use typed; raises RuntimeError for a foreign layout."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("llama.cpp is not here: install the `llama` extra (xllamacpp)")
    path = next(Path(spec.origin).parent.glob("xllamacpp*.so"))
    lib = ct.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    _check_layout(lib)
    lib.llama_backend_init()
    return lib


def _check_layout(lib: ct.CDLL) -> None:
    """Compare the defaults that llama.cpp documents with what our structs show of them."""
    model = lib.llama_model_default_params()
    context = lib.llama_context_default_params()
    vision = lib.mtmd_context_params_default()
    seen = {
        "model flags": (model.vocab_only, model.check_tensors, model.use_extra_bufts),
        "model gpu": (model.n_gpu_layers, model.main_gpu, model.kv_overrides),
        "sizes": (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max),
        "yarn": (context.yarn_ext_factor, context.yarn_beta_fast, context.yarn_orig_ctx),
        "kv types": (context.type_k, context.type_v),
        "flags": (context.embeddings, context.offload_kqv, context.no_perf, context.kv_unified),
        "tail": (context.samplers, context.n_samplers, context.ctx_other),
        "vision": (vision.use_gpu, vision.media_marker, vision.image_max_tokens),
    }
    expected = {
        "model flags": (False, False, True),
        "model gpu": (-1, 0, None),
        "sizes": (512, 2048, 512, 1),
        "yarn": (-1.0, -1.0, 0),
        "kv types": (1, 1),
        "flags": (False, True, True, False),
        "tail": (None, 0, None),
        "vision": (True, lib.mtmd_default_marker(), -1),
    }
    moved = [f"{key}: {seen[key]}" for key in expected if seen[key] != expected[key]]
    if moved:
        version = importlib.metadata.version("xllamacpp")
        raise RuntimeError(
            f"the parameter structs of xllamacpp {version} are laid out differently from {BUILD}: "
            + "; ".join(moved)
        )
