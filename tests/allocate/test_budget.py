"""Targets in bytes, and files that hold them exactly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from quantkit.allocate.as_recipe import allocated_yaml
from quantkit.allocate.budget import Files, allocate, parse_bpw, parse_fit
from quantkit.allocate.choices import build_groups
from quantkit.container.kv import string, strings
from quantkit.errors import UsageError
from quantkit.pipeline import Job, planned
from quantkit.plan.build import Limits
from quantkit.run.events import Silent
from quantkit.run.sizes import parse_size
from quantkit.types import GgmlType
from tests.allocate.models import kimi, made_up_costs, tensor

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"
KIMI_KV_BYTES = 70_272  # of a token, f16: 61 layers of 576 numbers


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("240GB", 240 * 10**9),
        ("240 gb", 240 * 10**9),
        ("240G", 240 * 10**9),
        ("223.5GiB", 223 * 2**30 + 2**29),
        ("1.5 TB", 1_500_000_000_000),
        ("4KiB", 4096),
        ("240000000001", 240_000_000_001),
        ("17B", 17),
        ("0.3GB", 300_000_000),
        ("9007199.254740993GB", 9_007_199_254_740_993),
    ],
)
def test_sizes(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1e9", "1.GB", "12 parsecs", "1iB", "1GBB", "١GB", "nan", "9" * 40]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.9x", "inf", "1e1", "9999"])
def test_what_are_no_bits_per_weight_is_refused(text):
    with pytest.raises(UsageError, match="are not bits per weight"):
        parse_bpw(text, Files((), {}))


def test_kimi_k2_5_in_24_and_256_gigabytes_leaves_room_for_the_smallest_recipe():
    fit = parse_fit("24GB+256GB", kv_bytes_per_token=KIMI_KV_BYTES, n_ctx=98_304)
    assert fit.memories == (24 * 10**9, 256 * 10**9)
    assert fit.kv_cache == 70_272 * 98_304
    assert fit.kv_cache / 2**30 == pytest.approx(6.43, abs=0.01)
    assert fit.n_bytes == 280 * 10**9 - fit.kv_cache - 2 * (2 << 30)
    assert fit.n_bytes > 240 * 10**9


def test_a_context_is_rounded_up_as_llama_cpp_does():
    assert parse_fit("1GB", kv_bytes_per_token=10, n_ctx=1, reserve=0).kv_cache == 2560
    assert parse_fit("1GB", kv_bytes_per_token=10, n_ctx=512, reserve=0).kv_cache == 5120


def test_memories_that_leave_nothing_for_the_weights_are_refused():
    with pytest.raises(UsageError, match="24GB leaves nothing for the weights"):
        parse_fit("24GB", kv_bytes_per_token=KIMI_KV_BYTES, n_ctx=1_000_000)


def kimi_files(**limits):
    """Headers with a vocabulary in it, so that they are megabytes."""
    vocabulary = strings([f"token {i}" for i in range(100_000)])
    return Files(kimi().tensors, {"general.name": string("k"), "tokens": vocabulary}, **limits)


@pytest.fixture(scope="module")
def kimi_groups():
    return build_groups(kimi().tensors, made_up_costs(3))


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_shard_bytes": 49_000_000_000}, {"max_shard_tensors": 7}],
    ids=["one file", "49 GB each", "7 tensors each"],
)
def test_files_of_kimi_k2_5_are_within_a_thousandth_below_any_target(kimi_groups, limits):
    rng = random.Random(6)
    files = kimi_files(**limits)
    for _ in range(4):
        target = rng.randint(204 * 10**9, 595 * 10**9)
        found = allocate(kimi_groups, files, target)
        assert 0.999 * target <= files.n_bytes(found.types()) <= target


@pytest.mark.parametrize("bpw", ["1.9", "2.7123", "4.5"])
def test_bits_per_weight_count_all_tensors_and_are_never_exceeded(kimi_groups, bpw):
    files = kimi_files(max_shard_bytes=49_000_000_000)
    found = allocate(kimi_groups, files, parse_bpw(bpw, files))
    types = found.types()
    n_bits = n_weights = 0
    for spec in files.specs:
        type_ = types[spec.name] if spec.keep is None else spec.keep
        n_bits += spec.n_weights * type_.bpw
        n_weights += spec.n_weights
    assert 0.999 * float(bpw) <= n_bits / n_weights <= float(bpw)


def test_the_last_byte_counts():
    specs = tuple(tensor(f"blk.{i}.x.weight", "x", i, 3, 256) for i in range(9))
    files = Files(specs, {"general.name": string("n")})
    groups = build_groups(specs, made_up_costs(5))
    size = files.n_bytes(allocate(groups, files, 9000).types())
    exact = allocate(groups, files, size)
    assert files.n_bytes(exact.types()) == size
    assert files.n_bytes(allocate(groups, files, size - 1).types()) < size


def test_more_shards_than_the_smallest_file_has_are_paid_for():
    """Each shard has a header of its own, which only the finished assignment tells."""
    specs = tuple(tensor(f"blk.{i}.x.weight", "x", i, 1, 256) for i in range(60))
    files = Files(specs, {}, max_shard_bytes=4096)
    groups = build_groups(specs, made_up_costs(8))
    least = files.n_bytes({spec.name: GgmlType.IQ1_S for spec in specs})
    for target in range(least, least + 6000, 97):
        assert files.n_bytes(allocate(groups, files, target).types()) <= target


def test_a_target_below_the_smallest_file_is_refused():
    specs = (tensor("a.weight", "x", 0),)
    files = Files(specs, {})
    least = files.n_bytes({"a.weight": GgmlType.IQ1_S})
    groups = build_groups(specs, made_up_costs(1))
    assert allocate(groups, files, least).types() == {"a.weight": GgmlType.IQ1_S}
    with pytest.raises(UsageError, match=f"the smallest file takes {least:,}"):
        allocate(groups, files, least - 1)


def test_groups_of_another_model_are_refused():
    specs = (tensor("a.weight", "x", 0), tensor("b.weight", "x", 1))
    groups = build_groups(specs[:1], made_up_costs(1))
    with pytest.raises(UsageError, match=r"b\.weight is only in one"):
        allocate(groups, Files(specs, {}), 10**6)
    with pytest.raises(UsageError, match=r"a\.weight is only in one, or in two"):
        allocate([*groups, *groups], Files(specs[:1], {}), 10**6)


@pytest.mark.parametrize("max_shard_bytes", [None, 400_000])
def test_a_planned_recipe_has_exactly_the_bytes_that_were_allocated(tmp_path, max_shard_bytes):
    limits = Limits(max_shard_bytes)

    def plan_of(recipe):
        with planned(Job(FIXTURE, str(recipe), limits, mmproj=None), Silent()) as (_, decided):
            return decided.plans[-1]

    source = plan_of("q8_0")
    specs = tuple(t.spec for t in source.tensors)
    files = Files(specs, source.kvs, max_shard_bytes)
    groups = build_groups(specs, made_up_costs(9))
    for share in (0.3, 0.5, 0.8):
        target = int(share * source.n_bytes)
        found = allocate(groups, files, target)
        recipe = tmp_path / f"{share}.yaml"
        recipe.write_text(allocated_yaml(specs, found, "fits", target=f"{target:,} bytes"))
        plan = plan_of(recipe)
        assert plan.n_bytes == files.n_bytes(found.types())
        assert 0.999 * target <= plan.n_bytes <= target
        assert len(plan.shards) == 1 if max_shard_bytes is None else len(plan.shards) > 1
