"""What is read off a file's metadata, which nobody has checked before."""

from __future__ import annotations

import time

import pytest

from quantkit.container.kv import f32, i32, string, u32
from quantkit.errors import GgufError
from quantkit.guide.model import Held, read_sampling, read_shape, thinking_switch
from quantkit.types import GgmlType, Kv, KvType

LLAMA = {
    "general.architecture": string("llama"),
    "llama.block_count": u32(3),
    "llama.embedding_length": u32(256),
    "llama.context_length": u32(2048),
    "llama.vocab_size": u32(1000),
    "llama.attention.head_count": u32(8),
    "llama.attention.head_count_kv": u32(2),
}


def u32s(*values: int) -> Kv:
    return Kv(KvType.ARRAY, list(values), KvType.U32)


def test_grouped_queries_cache_keys_and_values_of_the_key_heads():
    shape = read_shape(LLAMA, where="x")
    assert shape.cache_rows == ((64, 64),) * 3
    assert not shape.is_mla


def test_without_a_number_of_key_heads_every_head_has_its_own():
    kvs = {key: kv for key, kv in LLAMA.items() if not key.endswith("_kv")}
    assert read_shape(kvs, where="x").cache_rows == ((256, 256),) * 3


def test_layers_may_have_numbers_of_their_own():
    kvs = LLAMA | {"llama.attention.head_count_kv": u32s(2, 0, 4)}
    assert read_shape(kvs, where="x").cache_rows == ((64, 64), (0, 0), (128, 128))


def test_given_lengths_go_before_computed_ones():
    kvs = LLAMA | {"llama.attention.key_length": u32(64), "llama.attention.value_length": u32(48)}
    assert read_shape(kvs, where="x").cache_rows == ((128, 96),) * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": None}, "architecture is missing"),
        ({"general.architecture": u32(1)}, "architecture is missing"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.block_count": u32(1 << 31)}, "up to 4096"),
        ({"llama.block_count": i32(-1)}, "not -1"),
        ({"llama.block_count": string("3")}, "should be a number"),
        ({"llama.embedding_length": f32(1.5)}, "should be a number"),
        ({"llama.attention.head_count_kv": u32s(1, 2)}, "should hold 3"),
        ({"llama.attention.head_count_kv": u32s(1, 2, 1 << 30)}, "should be a number"),
        ({"llama.expert_count": u32(4), "llama.expert_used_count": u32(5)}, "up to 4"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(change, message):
    kvs = {key: kv for key, kv in (LLAMA | change).items() if kv is not None}
    with pytest.raises(GgufError, match=message):
        read_shape(kvs, where="m.gguf")


def test_sampling_has_the_digits_that_were_meant():
    kvs = {
        "general.sampling.temp": f32(0.6),
        "general.sampling.top_k": i32(40),
        "general.sampling.top_p": f32(float("nan")),
        "general.sampling.min_p": string("0.1"),
        "general.sampling.mirostat": i32(2),
    }
    assert read_sampling(kvs) == {"temp": 0.6, "top_k": 40}


@pytest.mark.parametrize(
    ("template", "switch"),
    [
        (None, None),
        ("", None),
        ("thinking {{ messages }} enable_thinking", None),
        ("{%- if thinking is defined and not thinking -%}x{%- endif -%}", "thinking"),
        ("{% if not enable_thinking %}{% endif %}", "enable_thinking"),
        ("{{ '}} thinking' }}", None),
        ("{# thinking #}{{ message.thinking }}{{ m['thinking'] }}", None),
        ("{# it's #}{% if a == 'b' and thinking %}", "thinking"),
        ("{{ 'thinking", None),
        ("don't {{ 1 }} 'x' {% if a and thinking %}", "thinking"),
    ],
)
def test_the_switch_is_found_in_statements_alone(template, switch):
    assert thinking_switch(template) == switch


@pytest.mark.parametrize("piece", ["{{", "{%", "'", "{{'", "{{}}", "{#", '{{"', "{{ x }}", "{"])
def test_a_hostile_template_takes_no_time(piece):
    began = time.perf_counter()
    assert thinking_switch(piece * 200_000) is None
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("name", "layer", "expert", "is_input"),
    [
        ("token_embd.weight", None, None, True),
        ("output.weight", None, None, False),
        ("blk.60.ffn_down_exps.weight", 60, "ffn_down_exps", False),
        ("blk.3.ffn_gate_up_exps.weight", 3, "ffn_gate_up_exps", False),
        ("blk.3.ffn_down_exps.bias", 3, "ffn_down_exps", False),
        ("blk.3.ffn_down_shexp.weight", 3, None, False),
        ("blk.3.ffn_gate_inp.weight", 3, None, False),
        ("blk.99999.attn_q.weight", None, None, False),
    ],
)
def test_names_tell_layer_and_expert(name, layer, expert, is_input):
    held = Held(name, GgmlType.F32, 4)
    assert (held.layer, held.expert, held.is_input) == (layer, expert, is_input)
