"""The report's JSON: complete, finite, checked when it is read back."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.container.layout import TensorEntry, lay_out
from quantkit.container.shardset import open_shards
from quantkit.errors import NonFiniteError, UsageError
from quantkit.evaluate.report import (
    LOG10_EDGES,
    Histogram,
    Layer,
    Quant,
    Report,
    bpw,
    describe,
    kld_histogram,
    parse_report,
    report_json,
    role_of,
    types_by_role,
)
from quantkit.pipeline import Job, planned
from quantkit.run.events import Silent
from quantkit.types import GgmlType
from tests.builders.gguf import write_shards
from tests.evaluate.reports import EVIL, a_quant, a_report

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"


# --- the document


def test_report_holds_the_fields_that_readers_rely_on():
    report = a_report()
    assert report["version"] == 1
    assert set(report) == {
        "version", "quantkit", "model", "text", "engine", "constants", "base", "quants", "coverage",
    }  # fmt: skip
    assert set(report["text"]) == {"corpus", "n_tokens", "n_chunks", "n_ctx", "digest"}
    assert set(report["base"]) == {"ppl", "ppl_error", "path"}
    (quant,) = report["quants"]
    assert {"path", "bytes", "bpw", "kld_histogram", "layers", "types"} <= set(quant)
    assert quant["kld_mean_ci"] == pytest.approx([0.009, 0.011])
    assert quant["layers"][0] == {"layer": 0, "hidden_error": 0.01, "router_disagreement": None}
    assert quant["types"][0]["role"] == "routed_expert.up"
    assert report["coverage"]["counts"] == [[5, 0, 900], [1, 2, 3]]
    assert report["constants"] == {"kv_cache": "f16", "threads": 2, "beta": 32.0, "exact": True}


def test_report_survives_being_stored_and_read():
    report = a_report([a_quant(), a_quant("b.gguf", 9, 0.5)])
    stored = json.dumps(report, allow_nan=False)
    assert parse_report(json.loads(stored)) == Report.model_validate(report)
    assert parse_report(json.loads(stored)).model_dump(mode="json") == report


@given(
    st.dictionaries(
        st.from_regex(r"kld_[a-z]{1,5}", fullmatch=True),
        st.one_of(
            st.floats(),
            st.floats(width=32).map(np.float32),
            st.integers(-(2**63), 2**63 - 1),
            st.integers(-(2**31), 2**31 - 1).map(np.int64),
            st.lists(st.floats(), max_size=3),
            st.lists(st.floats(), max_size=3).map(np.array),
            st.none(),
        ),
        max_size=6,
    ),
    st.floats(),
)
def test_neither_nan_nor_infinity_reaches_json(figures, hidden_error):
    layer = Layer(layer=0, hidden_error=hidden_error)
    quant = Quant(path="a", bytes=1, bpw=hidden_error, layers=(layer,), **figures)
    (stored,) = json.loads(json.dumps(a_report([quant]), allow_nan=False))["quants"]
    for key, value in figures.items():
        values = np.array(value, dtype=object).reshape(-1).tolist()
        found = stored[key] if isinstance(stored[key], list) else [stored[key]]
        assert found == [None if v is None or not math.isfinite(v) else v for v in values]
    error = hidden_error if math.isfinite(hidden_error) else None
    assert stored["layers"][0]["hidden_error"] == stored["bpw"] == error


def test_names_are_stored_printable():
    stored = a_report([a_quant(EVIL)], model=EVIL)
    assert (
        stored["model"]
        == stored["quants"][0]["path"]
        == ("<script>alert('x')</script>\"&\\u202e\\x1b[31m\\udc80")
    )


HOSTILE = {
    "another version": (["version"], 2),
    "no quants": (["quants"], []),
    "a field of no meaning": (["colour"], "red"),
    "a model that is no text": (["model"], 7),
    "a size below zero": (["quants", 0, "bytes"], -1),
    "a size beyond 64 bits": (["quants", 0, "bytes"], 1 << 63),
    "a figure that is a text": (["quants", 0, "kld_mean"], "0.1"),
    "a figure that is an object": (["quants", 0, "kld_mean"], {"x": 1}),
    "a figure too large for a float": (["quants", 0, "kld_mean"], 10**400),
    "a truth for a figure": (["quants", 0, "ppl"], True),
    "a text for bpw": (["quants", 0, "bpw"], "<b>"),
    "counts without edges": (["quants", 0, "kld_histogram", "log10_edges"], []),
    "edges that descend": (["quants", 0, "kld_histogram"], {"log10_edges": [1, 0], "counts": [3]}),
    "edges beyond floats": (
        ["quants", 0, "kld_histogram"], {"log10_edges": [0, 400], "counts": [3]}),
    "a histogram of nothing": (["quants", 0, "kld_histogram"], {"log10_edges": [0], "counts": []}),
    "a count below zero": (
        ["quants", 0, "kld_histogram"], {"log10_edges": [0, 1], "counts": [-3]}),
    "a layer below zero": (["quants", 0, "layers", 0, "layer"], -1),
    "a layer that is a list": (["quants", 0, "layers", 0], [0, 1.0]),
    "ragged coverage": (["coverage", "counts"], [[1, 2], [3]]),
    "coverage of other layers": (["coverage", "layers"], [1]),
    "tokens below zero": (["coverage", "counts", 0, 0], -5),
    "constants in constants": (["constants", "a"], {"b": 1}),
    "no text": (["text"], None),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_parse_refuses(name):
    path, value = HOSTILE[name]
    report = copy.deepcopy(a_report())
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UsageError, match="not a report of version 1: ") as caught:
        parse_report(report, where="r.json")
    assert caught.value.where == "r.json"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("raw", [None, 7, "report", [], [{}], {}])
def test_parse_refuses_what_is_no_report_at_all(raw):
    with pytest.raises(UsageError):
        parse_report(raw)


def test_histograms_of_different_edges_cannot_be_compared():
    other = a_quant().model_copy(
        update={"kld_histogram": Histogram(log10_edges=(0.0, 1.0), counts=(5,))}
    )
    with pytest.raises(UsageError, match="different edges"):
        parse_report(a_report() | {"quants": [a_quant().model_dump(), other.model_dump()]})


# --- the distribution of KLD


@given(
    st.lists(
        st.floats(-1.0, 300.0, width=32) | st.floats(0.0, 1.0, width=32).map(lambda v: v**9),
        min_size=1,
        max_size=60,
    )
)
def test_every_token_is_counted_once_where_it_belongs(values):
    kld = np.array(values, np.float32)
    histogram = kld_histogram(kld)
    assert sum(histogram.counts) == kld.size
    for index, count in enumerate(histogram.counts):
        low = -math.inf if index == 0 else 10.0 ** LOG10_EDGES[index]
        high = math.inf if index == len(histogram.counts) - 1 else 10.0 ** LOG10_EDGES[index + 1]
        # A value within rounding of an edge may fall on either side of it.
        surely = np.sum((kld > low * (1 + 1e-6)) & (kld < high * (1 - 1e-6)))
        maybe = np.sum((kld >= low * (1 - 1e-6)) & (kld <= high * (1 + 1e-6)))
        assert surely <= count <= maybe


def test_zero_and_less_count_as_the_smallest_and_a_thousand_as_the_largest():
    counts = kld_histogram(np.array([0.0, -1e-9, 1e-30, 1000.0])).counts
    assert (counts[0], counts[-1], sum(counts)) == (3, 1, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_is_refused(bad):
    with pytest.raises(NonFiniteError, match="1 of 3 tokens"):
        kld_histogram(np.array([0.1, bad, 0.2], np.float32))


# --- sizes and types


TENSORS = [
    TensorEntry("token_embd.weight", (8, 256), GgmlType.Q8_0),
    TensorEntry("blk.0.ffn_down_exps.weight", (4, 2, 256), GgmlType.IQ2_XXS),
    TensorEntry("blk.1.ffn_down_exps.weight", (4, 2, 256), GgmlType.Q2_K),
    TensorEntry("blk.2.ffn_down_exps.weight", (4, 2, 256), GgmlType.Q2_K),
    TensorEntry("blk.1.exp_probs_b.bias", (4,), GgmlType.F32),
]


@pytest.fixture
def made(tmp_path):
    layouts = lay_out("m", {}, TENSORS, max_shard_bytes=None, max_shard_tensors=2)
    write_shards(tmp_path, layouts)
    return [tmp_path / layout.file_name for layout in layouts]


def test_types_are_summed_over_all_shards_largest_first(made):
    lines = types_by_role(open_shards(made[1]))
    assert [(x.role, x.type, x.n_tensors, x.weights, x.bytes) for x in lines] == [
        ("token_embd", "Q8_0", 1, 2048, 8 * 8 * 34),
        ("routed_expert.down", "Q2_K", 2, 4096, 2 * 8 * 84),
        ("routed_expert.down", "IQ2_XXS", 1, 2048, 8 * 66),
        ("router_bias", "F32", 1, 4, 16),
    ]


def test_bytes_are_those_of_the_files_and_bpw_that_of_the_tensors(made):
    quant = describe(made[0], {"kld_mean": 0.5}, kld=np.array([0.5], np.float32))
    n_bytes, n_weights = 2176 + 1344 + 528 + 16, 2048 + 4096 + 2048 + 4
    assert quant.bytes == sum(path.stat().st_size for path in made)
    assert quant.bpw == bpw(open_shards(made[0])) == 8 * n_bytes / n_weights
    assert quant.path == str(made[0])
    assert quant.figure("kld_mean") == 0.5
    assert quant.figure("kld_p99") is None
    assert quant.kld_histogram is not None


def test_a_file_without_tensors_has_no_bpw(tmp_path):
    (layout,) = lay_out("m", {}, [], max_shard_bytes=None)
    write_shards(tmp_path, [layout])
    assert describe(tmp_path / "m.gguf", {}).bpw is None


def test_roles_are_those_that_the_converter_gave():
    with planned(Job(FIXTURE, "q8_0"), Silent()) as (_, decided):
        specs = [tensor.spec for plan in decided.plans for tensor in plan.tensors]
    assert len(decided.plans) == 2  # text and vision
    assert {spec.name: role_of(spec.name) for spec in specs} == {
        spec.name: spec.role for spec in specs
    }


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blk.3.attn_q.weight", "attention.q"),
        ("blk.3.attn_k.bias", "attention.k"),
        ("blk.3.attn_qkv.weight", "attention.qkv"),
        ("blk.60.ffn_gate.weight", "dense_ffn.gate"),
        ("rope_freqs.weight", "rope_freqs"),
        ("output.weight", "output"),
        ("blk.0.attn_sinks.weight", "other"),
        ("attn_<b>.weight", "other"),
        ("v.<b>", "other"),
        ("", "other"),
    ],
)
def test_roles_of_other_names(name, role):
    assert role_of(name) == role


def test_a_quant_refuses_a_histogram_that_does_not_fit():
    with pytest.raises(ValueError, match="one edge more"):
        Quant(path="a", bytes=1, bpw=1.0, kld_histogram={"log10_edges": [0, 1], "counts": [1, 2]})


def test_report_json_has_defaults_for_what_may_be_missing():
    report = a_report()
    bare = parse_report(report)
    again = report_json(
        model="m", text=bare.text, engine="e", base=bare.base, quants=list(bare.quants)
    )
    assert again["constants"] == {}
    assert again["coverage"] is None
