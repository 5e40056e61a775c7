"""What has to be done before any test module is imported."""

from __future__ import annotations

import contextlib

# llama-cpp-python binds to whichever ggml is loaded first, and other oracles bring theirs; where it
# is installed, it has to be the first.
with contextlib.suppress(ImportError):
    import llama_cpp  # noqa: F401
