"""CPUs and memory that this process may use: the machine's, less what affinity and control groups withhold."""

from __future__ import annotations

import math
import os
from pathlib import Path

ROOT = Path("/")  # where /proc and /sys are

CGROUPS = "sys/fs/cgroup"


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may use, at least 1: those that it may run on, or fewer where a control group has a quota.

    Args:
        root: The folder with /proc and /sys.
    """
    quota = min(map(cpu_quota, cgroup_folders("cpu", root)), default=math.inf)
    # only Linux has affinity
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpus, quota)))


def available_memory(root: Path = ROOT) -> int:
    """Memory that this process may still use, in bytes: the machine's, or less where a control group has a limit.

    Args:
        root: The folder with /proc and /sys.
    """
    words = read_words(root / "proc/meminfo")
    if "MemAvailable:" in words:
        of_machine = 1024 * int(words[words.index("MemAvailable:") + 1])
    else:  # no Linux
        of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(max(0, min([of_machine, *map(memory_left, cgroup_folders("memory", root))])))


def cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Folders of the control groups that this process is in, of version 1 and 2, with the groups around them.

    In a container the process's own group may have no folder; the container's limits then stand in the outermost one.

    Args:
        controller: "cpu" or "memory".
        root: The folder with /proc and /sys.
    """
    folders: list[Path] = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            outermost = root / CGROUPS / (controller if controllers else "")
            group = outermost / path.strip("/")
            folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(outermost)]
    return folders


def cpu_quota(folder: Path) -> float:
    """CPUs' worth of time that a control group may use; infinite without a quota."""
    version_1 = [*read_words(folder / "cpu.cfs_quota_us"), *read_words(folder / "cpu.cfs_period_us")]
    words = read_words(folder / "cpu.max") or version_1
    has_quota = len(words) == 2 and words[0].isdigit()  # without one it is "max", or -1
    return int(words[0]) / int(words[1]) if has_quota else math.inf


def memory_left(folder: Path) -> float:
    """Bytes that a control group may still use; infinite without a limit. File caches count as free."""
    for limit_name, usage_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, usage = read_words(folder / limit_name), read_words(folder / usage_name)
        if limit and usage and limit[0].isdigit():
            words = read_words(folder / "memory.stat")
            counts = dict(zip(words[::2], map(int, words[1::2]), strict=False))
            caches = sum(counts.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            return int(limit[0]) - int(usage[0]) + caches
    return math.inf


def read_words(path: Path) -> list[str]:
    """The words of a text file; none where it cannot be read."""
    return read_text(path).split()


def read_text(path: Path) -> str:
    """A text file's contents; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
