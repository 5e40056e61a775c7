"""Cores and memory that control groups of either version leave, read from made-up trees."""

from __future__ import annotations

import pytest

from quantkit.pipeline.doctor.limits import cpu_quota, memory_available

GIB = 1 << 30
MEMINFO = "MemTotal:       67108864 kB\nMemAvailable:   33554432 kB\n"  # 32 GiB available


@pytest.fixture
def system(tmp_path):
    """system(groups of this process, {file: text}) -> (proc, root of the control groups)"""

    def make(groups: str, files: dict[str, str], meminfo: str = MEMINFO):
        proc, root = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "self" / "cgroup").write_text(groups)
        (proc / "meminfo").write_text(meminfo)
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return proc, root

    return make


QUOTAS = {
    "no groups": ("", {}, None),
    "version 2": ("0::/job\n", {"job/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, no limit": ("0::/job\n", {"job/cpu.max": "max 100000\n"}, None),
    "the least of those above": (
        "0::/a/b\n",
        {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "800000 100000\n"},
        2.0,
    ),
    "version 1": (
        "4:cpu,cpuacct:/job\n",
        {"cpu/job/cpu.cfs_quota_us": "50000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
        0.5,
    ),
    "version 1, no limit": (
        "4:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "a group that is seen as the root": ("0::/gone\n", {"cpu.max": "300000 100000\n"}, 3.0),
    "nonsense": ("0::/job\n", {"job/cpu.max": "lots\n"}, None),
    "a path that climbs": ("0::/../../job\n", {"job/cpu.max": "100000 100000\n"}, 1.0),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_cpu_quota(system, case):
    groups, files, expected = QUOTAS[case]
    assert cpu_quota(*system(groups, files)) == expected


MEMORY = {
    "the machine's": ("", {}, 32 * GIB),
    "version 2": (
        "0::/job\n",
        {"job/memory.max": f"{4 * GIB}\n", "job/memory.current": f"{GIB}\n"},
        3 * GIB,
    ),
    "version 2, no limit": (
        "0::/job\n",
        {"job/memory.max": "max\n", "job/memory.current": f"{GIB}\n"},
        32 * GIB,
    ),
    "pages of files are given back": (
        "0::/job\n",
        {
            "job/memory.max": f"{4 * GIB}\n",
            "job/memory.current": f"{3 * GIB}\n",
            "job/memory.stat": f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB}\n",
        },
        3 * GIB,
    ),
    "version 1": (
        "4:memory:/job\n",
        {
            "memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
            "memory/job/memory.usage_in_bytes": f"{GIB}\n",
        },
        GIB,
    ),
    "version 1, no limit": (
        "4:memory:/\n",
        {"memory/memory.limit_in_bytes": "9223372036854771712\n"},
        32 * GIB,
    ),
    "more used than allowed": (
        "0::/job\n",
        {"job/memory.max": f"{GIB}\n", "job/memory.current": f"{2 * GIB}\n"},
        0,
    ),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_available(system, case):
    groups, files, expected = MEMORY[case]
    assert memory_available(*system(groups, files)) == expected


def test_memory_is_unknown_without_proc(tmp_path):
    assert memory_available(tmp_path, tmp_path) is None
