"""What the processes and the host they run on say of themselves, from /proc. Absent where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import Metric

from server import metrics
from server.api.families import Labels, family
from server.metrics import Series
from server.runtime.host import memory_limit

PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


def process_families(model: str, processes: Mapping[str, int | None], proc: Path = Path("/proc")) -> Iterator[Metric]:
    """Role → process id, None for this process. A process that is gone, or may not be read, is left out."""
    found: dict[Series, dict[Labels, float]] = {metrics.DISK_READ: {}, metrics.RESIDENT: {}, metrics.CPU_SECONDS: {}}
    for role, pid in processes.items():
        folder = proc / str(pid or os.getpid())
        for series, read in ((metrics.DISK_READ, disk_read), (metrics.RESIDENT, resident), (metrics.CPU_SECONDS, cpu)):
            try:
                found[series][role,] = read(folder)
            except (OSError, ValueError, IndexError):
                continue
    for series, values in found.items():
        if values:
            yield family(series, model, values)


def host_families(model: str, limit: int) -> Iterator[Metric]:
    """`limit`: that of --host-memory-limit, 0 for none."""
    yield family(metrics.HOST_LIMIT, model, {(): limit or memory_limit()})


def disk_read(folder: Path) -> float:
    """`read_bytes` of /proc/PID/io: what really came from storage, by read() or by page fault."""
    lines = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
    return float(lines["read_bytes"])


def resident(folder: Path) -> float:
    return float((folder / "statm").read_text().split()[1]) * PAGE


def cpu(folder: Path) -> float:
    """utime + stime of /proc/PID/stat; the name before them may hold spaces and brackets."""
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
