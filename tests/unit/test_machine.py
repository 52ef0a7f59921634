"""CPUs and memory of this process, read from files that stand for /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.builders import refused

from raymask.executor import resources
from raymask.machine import available_memory, usable_cpus

MIB = 2**20

UNLIMITED = str(2**63 - 4096)  # how version 1 writes that there is no limit

V1, V2, DOCKER = "4:memory,cpu:/slurm/job_7", "0::/user/job", "4:memory,cpu:/docker/abc\n0::/"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with eight CPUs for this process and 16 GiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    return write_files(tmp_path, {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {16 * 2**20} kB\n"})


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        (V2, {}, 8),
        (V2, {"user/job/cpu.max": "max 100000"}, 8),
        (V2, {"user/job/cpu.max": "350000 100000"}, 3),
        (V2, {"user/job/cpu.max": "max 100000", "user/cpu.max": "200000 100000"}, 2),
        (V2, {"user/job/cpu.max": "50000 100000"}, 1),
        (V2, {"user/job/cpu.max": "9900000 100000"}, 8),
        (V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": "-1", "cpu/slurm/job_7/cpu.cfs_period_us": "100000"}, 8),
        (V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": "400000", "cpu/slurm/job_7/cpu.cfs_period_us": "100000"}, 4),
        (DOCKER, {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpuset:/", {"cpu.max": "100000 100000"}, 8),
    ],
)
def test_a_quota_of_any_group_around_the_process_counts(
    root: Path, groups: str, files: dict[str, str], cpus: int
) -> None:
    write_files(root, {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert usable_cpus(root) == cpus


def test_cpus_are_those_that_the_process_may_run_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})  # taskset -c 3, on a machine of any size
    assert usable_cpus(root) == 1
    assert usable_cpus() == 1


def memory_files(folder: str, version: int, limit: str, usage: int, **caches: int) -> dict[str, str]:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    stat = "".join(f"{name} {size}\n" for name, size in caches.items())
    return {
        f"{folder}/{name}": text for name, text in zip((*names, "memory.stat"), (limit, str(usage), stat), strict=True)
    }


@pytest.mark.parametrize(
    ("groups", "files", "mebibytes"),
    [
        (V2, {}, 16 * 1024),
        (V2, memory_files("user/job", 2, "max", 5), 16 * 1024),
        (V2, memory_files("user/job", 2, str(1500 * MIB), 500 * MIB), 1000),
        (V2, memory_files("user/job", 2, str(1500 * MIB), 500 * MIB, active_file=MIB, inactive_file=2 * MIB), 1003),
        (V2, memory_files("user", 2, str(700 * MIB), 600 * MIB) | memory_files("user/job", 2, "max", 0), 100),
        (V2, memory_files("user/job", 2, str(100 * MIB), 101 * MIB), 0),
        (V1, memory_files("memory/slurm/job_7", 1, UNLIMITED, 5), 16 * 1024),
        (
            V1,
            memory_files("memory/slurm/job_7", 1, str(MIB * 700), MIB * 500, total_inactive_file=MIB, active_file=9),
            201,
        ),
        (DOCKER, memory_files("memory", 1, str(1500 * MIB), 200 * MIB), 1300),
    ],
)
def test_memory_is_what_every_group_around_the_process_leaves(
    root: Path, groups: str, files: dict[str, str], mebibytes: int
) -> None:
    write_files(root, {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_memory(root) == mebibytes * MIB


def test_too_little_memory_for_ray_is_said_with_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 173 * MIB)
    said = refused(resources.private_resources)
    assert said.startswith("this machine, or this process's share of it, has 173 MiB of memory left, and Ray needs 512")
    assert said.endswith("`raymask search --in-process`)")
    monkeypatch.setattr(resources, "available_memory", lambda: 1000 * MIB)
    assert resources.private_resources()["memory"] == 700 * MIB


def test_without_linux_the_machine_s_own_numbers_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 16384}.__getitem__)
    assert usable_cpus(tmp_path) == 8
    assert available_memory(tmp_path) == 1000 * 16384
