"""What has to be done before any test module is imported."""

from __future__ import annotations

import contextlib
import signal

# llama-cpp-python binds to whichever ggml is loaded first, and other oracles bring theirs; where it
# is installed, it has to be the first.
with contextlib.suppress(ImportError):
    import llama_cpp  # noqa: F401

# In the background of a script SIGINT is ignored, and what tests start would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
