"""Load a GGUF file in llama.cpp and continue a prompt: `say.py FILE PROMPT`."""

from __future__ import annotations

import sys

import xllamacpp


def say(path: str, prompt: str, n_tokens: int = 24) -> str:
    """Greedy continuation of `prompt` by stock llama.cpp on the CPU."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 512
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = -1
    params.endpoint_metrics = False
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "seed": 1}
    answer = server.handle_completions(request)
    return str(answer["choices"][0]["text"])


if __name__ == "__main__":
    path, prompt = sys.argv[1:3]
    print(f"{prompt} ... {' '.join(say(path, prompt).split())}")
