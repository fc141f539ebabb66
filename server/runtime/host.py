"""What this machine lends us: processors under the cgroup's quota, memory under its limit."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def _cgroup_number(name: str) -> int | None:
    try:
        text = (CGROUP / name).read_text().split()[0]
    except (OSError, IndexError):
        return None
    return None if text == "max" else int(text)


def cpu_quota() -> int:
    """Processors this process may use at once: its affinity, cut to the cgroup's quota, at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_number("cpu.max")
    if quota is not None:
        period = int((CGROUP / "cpu.max").read_text().split()[1])
        cpus = min(cpus, math.ceil(quota / period))
    return max(cpus, 1)


def memory_limit() -> int:
    """Bytes this machine lends: MemTotal, cut to the cgroup's limit."""
    limit, total = _cgroup_number("memory.max"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total if limit is None else min(limit, total)


def available_memory() -> int:
    """Bytes that can still be taken: MemAvailable, cut to what the cgroup's limit leaves."""
    available = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, current = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is not None and current is not None:
        available = min(available, limit - current)
    return max(available, 0)


def resident_bytes() -> int:
    """This process's resident set now, or 0 where /proc is not there."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
