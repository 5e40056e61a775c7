"""llama.cpp's imatrix loader, `common_imatrix_load`, as it lies in the llama-cpp-python wheel.

    python -m tests.calibrate.llamacpp_loader FILE

prints what it loaded as JSON, or exits with 1 where llama.cpp refuses. It is a C++ function: its
arguments, a std::string and a struct that begins with a std::map, are laid out by hand as
libstdc++ does on 64-bit Linux. A process of its own, because llama.cpp may abort.
"""

from __future__ import annotations

import ctypes as ct
import json
import os
import subprocess
import sys
from pathlib import Path

_LOAD = (
    "_Z19common_imatrix_loadRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEER14common_imatrix"
)


def library() -> Path | None:
    """The wheel's library that has the loader, None where there is none."""
    try:
        import llama_cpp
    except ImportError:
        return None
    path = Path(llama_cpp.__file__).parents[1] / "lib" / "libllama-common.so"
    return path if path.exists() else None


def load(path: Path) -> dict | None:
    """Entries {name: (sums, counts)} and metadata as llama.cpp sees them, None if it refuses."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _words(address: int, n: int):
    return (ct.c_uint64 * n).from_address(address)


def _text(address: int) -> str:
    data, length = _words(address, 2)
    return ct.string_at(data, length).decode()


def _vector(address: int, item: type) -> list:
    begin, end = _words(address, 2)
    n = (end - begin) // ct.sizeof(item)
    return list((item * n).from_address(begin)) if n else []


def _entries(node: int, found: dict) -> None:
    """Collect a red-black tree: each node is colour, parent, left, right, then key and value."""
    if not node:
        return
    _, _, left, right = _words(node, 4)
    _entries(left, found)
    sums, counts = _vector(node + 64, ct.c_float), _vector(node + 88, ct.c_int64)
    found[_text(node + 32)] = (sums, counts)
    _entries(right, found)


def main(path: str) -> int:
    lib = ct.CDLL(str(library()), mode=ct.RTLD_GLOBAL)
    function = getattr(lib, _LOAD)
    function.restype, function.argtypes = ct.c_bool, [ct.c_void_p, ct.c_void_p]
    name = ct.create_string_buffer(os.fsencode(path))
    string = (ct.c_uint64 * 4)(ct.addressof(name), len(name) - 1, len(name) - 1)
    imatrix = (ct.c_uint64 * 64)()  # 12 words are in use; the rest is room for newer builds
    header = ct.addressof(imatrix) + 8
    imatrix[3] = imatrix[4] = header  # an empty tree: leftmost and rightmost are its header
    if not function(ct.addressof(string), ct.addressof(imatrix)):
        return 1
    entries: dict = {}
    _entries(imatrix[2], entries)
    first, last = imatrix[6], imatrix[7]
    tail = ct.addressof(imatrix) + 72
    n_chunks, chunk_size = (ct.c_int32 * 2).from_address(tail)
    is_legacy, has_metadata = (ct.c_bool * 2).from_address(tail + 8)
    told = {
        "entries": entries,
        "datasets": [_text(at) for at in range(first, last, 32)],
        "n_chunks": n_chunks,
        "chunk_size": chunk_size,
        "is_legacy": is_legacy,
        "has_metadata": has_metadata,
    }
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
