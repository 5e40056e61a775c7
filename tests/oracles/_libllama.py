"""What the oracles call beyond `quantkit.evaluate.libllama`: metadata, text and vision."""

from __future__ import annotations

import ctypes as ct
import importlib.metadata

from quantkit.evaluate import libllama
from quantkit.evaluate.libllama import BOOL, INT, PTR, STR


class MtmdParams(ct.Structure):
    _fields_ = (
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
    )


class MtmdText(ct.Structure):
    _fields_ = (
        ("text", ct.c_char_p),
        ("text_len", ct.c_size_t),
        ("add_special", ct.c_bool),
        ("parse_special", ct.c_bool),
    )


_SIGNATURES: libllama.Signatures = {
    "llama_model_n_embd": (INT, (PTR,)),
    "llama_model_meta_count": (INT, (PTR,)),
    "llama_model_meta_key_by_index": (INT, (PTR, INT, STR, ct.c_size_t)),
    "llama_model_meta_val_str_by_index": (INT, (PTR, INT, STR, ct.c_size_t)),
    "llama_vocab_is_eog": (BOOL, (PTR, INT)),
    "llama_detokenize": (INT, (PTR, ct.POINTER(ct.c_int32), INT, STR, INT, BOOL, BOOL)),
    "mtmd_context_params_default": (MtmdParams, ()),
    "mtmd_init_from_file": (PTR, (STR, PTR, MtmdParams)),
    "mtmd_support_vision": (BOOL, (PTR,)),
    "mtmd_default_marker": (STR, ()),
    "mtmd_bitmap_init": (PTR, (ct.c_uint32, ct.c_uint32, STR)),
    "mtmd_input_chunks_init": (PTR, ()),
    "mtmd_input_chunks_size": (ct.c_size_t, (PTR,)),
    "mtmd_input_chunks_get": (PTR, (PTR, ct.c_size_t)),
    "mtmd_input_chunk_get_type": (ct.c_int, (PTR,)),
    "mtmd_input_chunk_get_n_tokens": (ct.c_size_t, (PTR,)),
    "mtmd_tokenize": (INT, (PTR, PTR, ct.POINTER(MtmdText), ct.POINTER(PTR), ct.c_size_t)),
    "mtmd_encode_chunk": (INT, (PTR, PTR)),
    "mtmd_get_output_embd": (ct.POINTER(ct.c_float), (PTR,)),
}


def load() -> ct.CDLL:
    """The library, with every function in use typed; refuses a foreign layout."""
    lib = libllama.load(_SIGNATURES)
    vision = lib.mtmd_context_params_default()
    seen = (vision.use_gpu, vision.media_marker, vision.image_max_tokens)
    if seen != (True, lib.mtmd_default_marker(), -1):
        version = importlib.metadata.version("xllamacpp")
        raise RuntimeError(f"mtmd_context_params of xllamacpp {version} are laid out differently")
    return lib
