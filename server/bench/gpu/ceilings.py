"""What the device and its host link can do at best, measured in the same run as what is set beside it.

    copy      device memory to device memory, bytes read and written                      every kernel on the device
    engine    host to device by the copy engine, from registered memory                   staged rows
    stream    host memory read by a kernel, in order, several programs                    an upper bound of `rows`
    rows      whole rows at random places, host or device, copied out undecoded           lookups: misses, hits

The read kernels try several grid sizes and keep the best: a ceiling must not be a bad launch. GB are 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels.language import jit, power_of_two, runs_on, tl
from server.bench.gpu.timing import median_seconds

COPY_BYTES, TINY_BYTES = 1 << 30, 1 << 22
ENGINE_BYTES = 256 << 20
WORDS = 1024  # int32 words that a program of `stream` reads at once
ROWS_AT_ONCE = 16


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written."""
    size = COPY_BYTES if device.type == "cuda" else TINY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, cold=False)


def engine_bandwidth(host: Tensor, device: torch.device) -> float:
    """host uint8[rows, R], registered → bytes per second by the copy engine."""
    rows = min(len(host), max(1, (ENGINE_BYTES if device.type == "cuda" else TINY_BYTES) // host.shape[1]))
    source = host[:rows]
    target = torch.empty(source.shape, dtype=torch.uint8, device=device)
    return source.nbytes / median_seconds(lambda: target.copy_(source, non_blocking=True), device, cold=False)


def stream_bandwidth(host: Tensor, device: torch.device) -> float:
    """host uint8[rows, R], registered → bytes per second read in order by a kernel."""
    size = min(host.nbytes, ENGINE_BYTES if device.type == "cuda" else TINY_BYTES) // (4 * WORDS) * (4 * WORDS)
    words = host.view(-1)[:size].view(torch.int32)
    sums = torch.empty(grids(device)[-1] * WORDS, dtype=torch.int32, device=device)

    def work(programs: int) -> Callable[[], object]:
        if runs_on(sums):
            return lambda: stream_kernel[(programs,)](words, sums, len(words) // WORDS, BLOCK=WORDS)
        return lambda: words.sum()

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


def copy_rows(table: Tensor, row_ids: Tensor, out: Tensor, programs: int) -> None:
    """table int32[rows, W], row_ids[N] → out int32[N, W]."""
    if not runs_on(out):
        torch.index_select(table, 0, row_ids, out=out)
        return
    words = table.shape[1]
    rows_kernel[(programs,)](
        table, row_ids, out, len(row_ids), WORDS=words, WORDS_PADDED=power_of_two(words), ROWS=ROWS_AT_ONCE
    )


def random_ids(rows: int, count: int, device: torch.device, seed: int = 0) -> Tensor:
    """int64[count] below `rows`, evenly."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randint(0, rows, (count,), generator=generator, device=device)


def gigabytes(bandwidths: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {f"{name}_gb_per_s": value / 1e9 for name, value in bandwidths}


@jit
def stream_kernel(words, sums, blocks, BLOCK: tl.constexpr):
    """A program: every P-th block of words, added up so that no load is left out."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    at = tl.program_id(0)
    while at < blocks:
        total += tl.load(words + at.to(tl.int64) * BLOCK + column)
        at += tl.num_programs(0)
    tl.store(sums + tl.program_id(0) * BLOCK + column, total)


@jit
def rows_kernel(
    table, row_ids, out, count, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """A program: every P-th group of rows, copied as they are."""
    lane, column = tl.arange(0, ROWS), tl.arange(0, WORDS_PADDED)
    first = tl.program_id(0) * ROWS
    while first < count:
        index = (first + lane).to(tl.int64)
        there = index < count
        row = tl.load(row_ids + index, mask=there, other=0)
        real = there[:, None] & (column < WORDS)[None, :]
        words = tl.load(table + row[:, None] * WORDS + column[None, :], mask=real, other=0)
        tl.store(out + index[:, None] * WORDS + column[None, :], words, mask=real)
        first += tl.num_programs(0) * ROWS
