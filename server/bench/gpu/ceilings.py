"""What the device and its host link can do at best, measured in the same run as what is set beside it.

    copy      device memory to device memory, bytes read and written                      every kernel on the device
    engine    host to device by the copy engine, from registered memory                   staged rows
    stream    host memory read by a kernel, in order, several programs                    an upper bound of `rows`
    rows      whole rows at random places, host or device, copied out undecoded           lookups: misses, hits

The read kernels try several grid sizes and keep the best: a ceiling must not be a bad launch. GB are 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.reads import BLOCK, add_words, copy_rows
from server.bench.gpu.timing import median_seconds

COPY_BYTES, TINY_BYTES = 1 << 30, 1 << 22
ENGINE_BYTES = 256 << 20


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written."""
    size = COPY_BYTES if device.type == "cuda" else TINY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, cold=False, graph=False)


def engine_bandwidth(host: Tensor, device: torch.device) -> float:
    """host uint8[rows, R], registered → bytes per second by the copy engine."""
    rows = min(len(host), max(1, (ENGINE_BYTES if device.type == "cuda" else TINY_BYTES) // host.shape[1]))
    source = host[:rows]
    target = torch.empty(source.shape, dtype=torch.uint8, device=device)
    work = partial(target.copy_, source, non_blocking=True)
    return source.nbytes / median_seconds(work, device, cold=False, graph=False)


def stream_bandwidth(host: Tensor, device: torch.device) -> float:
    """host uint8[rows, R], registered → bytes per second read in order by a kernel."""
    size = min(host.nbytes, ENGINE_BYTES if device.type == "cuda" else TINY_BYTES) // (4 * BLOCK) * (4 * BLOCK)
    words = host.view(-1)[:size].view(torch.int32)
    sums = torch.empty(grids(device)[-1], BLOCK, dtype=torch.int32, device=device)

    def work(programs: int) -> Callable[[], object]:
        return lambda: add_words(words, sums[:programs])

    return size / best(work, device)


def row_bandwidth(table: Tensor, row_ids: Tensor, device: torch.device) -> float:
    """table uint8[rows, R] registered or on the device, row_ids int64[N] on the device → bytes of rows per second."""
    wide = table.view(torch.int32)
    out = torch.empty(len(row_ids), wide.shape[1], dtype=torch.int32, device=device)

    def work(programs: int) -> Callable[[], object]:
        return lambda: copy_rows(wide, row_ids, out, programs)

    return row_ids.numel() * table.shape[1] / best(work, device)


def grids(device: torch.device) -> list[int]:
    if device.type == "cpu":
        return [1]
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return [count, 2 * count, 4 * count, 8 * count]


def best(work: Callable[[int], Callable[[], object]], device: torch.device) -> float:
    """The least seconds over all grid sizes."""
    return min(median_seconds(work(programs), device, cold=True, repeats=9) for programs in grids(device))


def random_ids(rows: int, count: int, device: torch.device, seed: int = 0) -> Tensor:
    """int64[count] below `rows`, evenly."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randint(0, rows, (count,), generator=generator, device=device)
