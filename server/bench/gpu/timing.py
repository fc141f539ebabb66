"""Seconds that a piece of work takes on the device: warmed up, captured once, replayed, the median of many.

CUDA: the work becomes a graph, so that what the host needs to launch it does not count, and work that waits for the
host cannot be measured at all: its capture fails. Long work may go without. Events stand before and after each run; the
L2 cache is overwritten between them where a step would find its data cold. CPU: the clock around each call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM, REPEATS = 3, 31
Work = Callable[[], object]


def median_seconds(
    work: Work, device: torch.device, *, cold: bool = True, graph: bool = True, repeats: int = REPEATS
) -> float:
    """`cold`: with the L2 cache overwritten before each run. `graph`: raises torch's RuntimeError where work syncs."""
    return statistics.median(all_seconds(work, device, cold=cold, graph=graph, repeats=repeats))


def all_seconds(work: Work, device: torch.device, *, cold: bool, graph: bool, repeats: int) -> list[float]:
    if device.type == "cpu":
        return [clocked(work) for _ in range(WARM + repeats)][WARM:]
    replay = captured(work) if graph else warmed(work)
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if cold else 0
    flushed = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
    pairs = [(event(), event()) for _ in range(repeats)]
    for begun, ended in pairs:
        flushed.zero_()  # also keeps the device busy until the replay is queued
        begun.record()
        replay()
        ended.record()
    torch.cuda.synchronize(device)
    return [begun.elapsed_time(ended) / 1e3 for begun, ended in pairs]


def warmed(work: Work) -> Work:
    for _ in range(WARM):
        work()
    return work


def captured(work: Work) -> Work:
    """The work as a graph's replay; it has run WARM times before, so that kernels are compiled."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warmed(work)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clocked(work: Work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
