"""Stock llama.cpp runs what we write, with the logits of the source checkpoint.

The reference is Hugging Face's DeepSeek-V3 in f32 on the expanded weights. Its latent norms get
the checkpoint's epsilon, as llama.cpp, vLLM and SGLang do; keys and values are kept in F32, so
that what is compared are the files.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles import llamacpp
from tests.oracles.compare import mean_kl, same_top1

TEXT = """The library keeps a cache of open files, so that reading many small ranges does not
reopen the same file again and again. If a file is replaced while it is open, the next read fails
with an error that names it; nothing is read from the old copy.

def parse(line: str) -> tuple[str, int]:
    name, _, count = line.partition(":")
    if not count.strip().isdigit():
        raise ValueError(f"{line!r} has no count")
    return name.strip(), int(count)

Returns a new list; the original is left unchanged. Raises KeyError if the key is not found. When
the connection is lost, the client tries again after a delay that doubles each time, to a minute. On
most systems the default is 4096 bytes. See the section on buffering for the reasons.
"""
EPS = 1e-5  # rms_norm_eps of the fixture


@pytest.fixture(scope="module")
def token_ids(converted):
    ids = llamacpp.tokenize(converted("bf16") / "m-BF16.gguf", [TEXT])[0]
    assert len(ids) >= 200
    return np.array(ids)


@pytest.fixture(scope="module")
def reference(fixture_model, token_ids):
    from tests.oracles import hf

    return hf.reference_logits(fixture_model, token_ids, latent_eps=EPS)


@pytest.mark.parametrize(
    ("recipe", "top1", "kl"),
    [("f32", 1.0, 1e-9), ("bf16", 0.99, 1e-3), ("f16", 0.99, 1e-4), ("q8_0", 0.96, 2e-3)],
)
def test_logits_agree_with_the_source(converted, token_ids, reference, recipe, top1, kl):
    path = converted(recipe) / f"m-{recipe.upper()}.gguf"
    ours = llamacpp.logits(path, token_ids, kv_f32=True)
    assert same_top1(reference, ours) >= top1
    assert mean_kl(reference, ours) < kl


@pytest.mark.parametrize(("limit", "at_least"), [(6_000_000, 3), (1_500_000, 8)])
def test_a_split_file_gives_the_same_logits_as_a_whole_one(converted, token_ids, limit, at_least):
    whole = llamacpp.logits(converted("q4_x") / "m-Q4_X.gguf", token_ids)
    shards = sorted(converted("q4_x", limit).glob("m-*.gguf"))
    assert len(shards) >= at_least
    assert np.array_equal(whole, llamacpp.logits(shards[0], token_ids))


def test_llamacpp_checks_every_tensor_and_continues_a_text(converted):
    path = converted("q4_x") / "m-Q4_X.gguf"
    loaded, log = llamacpp.loads(path, check_tensors=True)
    assert loaded, log
    assert len(llamacpp.generate(path, "The function returns", 12).split()) >= 4


# ggml's GELU goes through a table of f16 values, so even f32 weights leave 1e-4 or so.
@pytest.mark.parametrize(("type_", "close"), [("f32", 1e-3), ("f16", 2e-3), ("bf16", 1e-2)])
def test_the_vision_tower_sees_what_the_source_sees(
    converted, fixture_model, tmp_path, type_, close
):
    from quantkit.pipeline import Job, Output, convert
    from quantkit.run.events import Silent
    from quantkit.types import GgmlType
    from tests.oracles import hf

    text = converted("bf16") / "m-BF16.gguf"
    job = Job(fixture_model, "bf16", name="v", mmproj=GgmlType[type_.upper()])
    convert(job, Output(tmp_path, 2), Silent())
    (vision,) = tmp_path.glob("mmproj-*.gguf")
    image = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    theirs = hf.vision_reference(fixture_model, image)
    ours = llamacpp.encode_image(vision, text, image)
    assert ours.shape == theirs.shape
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error < close
