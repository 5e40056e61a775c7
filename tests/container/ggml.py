"""ggml's own GGUF parser and row check, through the library in `libggml-python`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG_CALLBACK(lambda level, text, data: None)


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@dataclass(frozen=True)
class Parsed:
    """What ggml found: (key, type, item type) and (name, type, ne, absolute begin, bytes)."""

    alignment: int
    kvs: list[tuple[bytes, int, int | None]]
    tensors: list[tuple[bytes, int, tuple[int, ...], int, int]]


@cache
def library() -> ctypes.CDLL:
    package = Path(find_spec("libggml").origin).parent
    lib = ctypes.CDLL(str(package / "lib64" / "libggml-base.so"))
    pointer, size, i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    lib.gguf_init_from_buffer.restype = pointer
    lib.gguf_init_from_buffer.argtypes = [ctypes.c_char_p, size, _InitParams]
    lib.gguf_init_from_file.restype = pointer
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    lib.gguf_free.argtypes = [pointer]
    for name, restype in {
        "gguf_get_alignment": size,
        "gguf_get_data_offset": size,
        "gguf_get_n_kv": i64,
        "gguf_get_n_tensors": i64,
    }.items():
        getattr(lib, name).argtypes = [pointer]
        getattr(lib, name).restype = restype
    for name, restype in {
        "gguf_get_key": ctypes.c_char_p,
        "gguf_get_kv_type": ctypes.c_int,
        "gguf_get_arr_type": ctypes.c_int,
        "gguf_get_tensor_name": ctypes.c_char_p,
        "gguf_get_tensor_type": ctypes.c_int,
        "gguf_get_tensor_ne": ctypes.POINTER(i64),
        "gguf_get_tensor_offset": size,
        "gguf_get_tensor_size": size,
    }.items():
        getattr(lib, name).argtypes = [pointer, i64]
        getattr(lib, name).restype = restype
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_char_p, size]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_log_set(_SILENT, None)
    return lib


def parse(content: bytes) -> Parsed | None:
    """ggml's view of a file's header, None where it refuses."""
    lib = library()
    params = _InitParams(True, None)
    return _parsed(lib, lib.gguf_init_from_buffer(content, len(content), params))


def parse_file(path: str) -> Parsed | None:
    """The same, read from the file by ggml itself."""
    lib = library()
    return _parsed(lib, lib.gguf_init_from_file(path.encode(), _InitParams(True, None)))


def _parsed(lib: ctypes.CDLL, context: int | None) -> Parsed | None:
    if not context:
        return None
    try:
        data_begin = lib.gguf_get_data_offset(context)
        kvs = []
        for i in range(lib.gguf_get_n_kv(context)):
            type_ = lib.gguf_get_kv_type(context, i)
            item = lib.gguf_get_arr_type(context, i) if type_ == 9 else None
            kvs.append((lib.gguf_get_key(context, i), type_, item))
        tensors = [
            (
                lib.gguf_get_tensor_name(context, i),
                lib.gguf_get_tensor_type(context, i),
                tuple(lib.gguf_get_tensor_ne(context, i)[:4]),
                data_begin + lib.gguf_get_tensor_offset(context, i),
                lib.gguf_get_tensor_size(context, i),
            )
            for i in range(lib.gguf_get_n_tensors(context))
        ]
        return Parsed(lib.gguf_get_alignment(context), kvs, tensors)
    finally:
        lib.gguf_free(context)


def rows_are_valid(type_: int, data: bytes) -> bool:
    """ggml's --check-tensors verdict on whole blocks."""
    return bool(library().ggml_validate_row_data(type_, data, len(data)))
