"""Staging: where fetched rows wait for the layer that reads them. Bounded, allocated once.

    | step k, all its layers            | step k + 1, all its layers        |      two halves, taken in turns
      ▲ being computed                    ▲ being fetched

A half is overwritten two steps later, when nothing reads it any more: on CPU by program order, on CUDA because the
worker first waits for an event recorded after the step was issued. On CUDA a half stands twice: in pinned host memory,
where rows are gathered and decoded, and on the device, where a side stream copies them.
Knows sizes, nothing of tables' contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.cache.row_table import Table
from server.errors import CapacityError

ALIGNMENT = 64  # a cache line
HALVES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One fetch's buffer [rows, width]: the worker fills `host`, the layer reads `rows`. On CPU they are the same."""

    host: Tensor
    rows: Tensor
    half: Half


class Half:
    """All buffers of one step. `free`: when the step that last read it ends (CUDA); `copied`: its last copy's end."""

    def __init__(self, host: Tensor, rows: Tensor) -> None:
        self.host, self.rows = host, rows
        self.free: torch.cuda.Event | None = None
        self.copied: torch.cuda.Event | None = None
        self._used = 0

    def restart(self) -> None:
        """Forgets the buffers given out. One worker fills them in turn, so late writes of old ones do no harm."""
        self._used = 0

    def take(self, rows: int, width: int, dtype: torch.dtype) -> Slot | None:
        """A buffer [rows, width]; None if it does not fit."""
        begin, end = self._used, self._used + rows * width * dtype.itemsize
        if end > len(self.host):
            return None
        self._used = aligned(end)
        host = self.host[begin:end].view(dtype).view(rows, width)
        device = self.rows[begin:end].view(dtype).view(rows, width) if self.rows.is_cuda else host
        return Slot(host, device, self)


class Staging:
    """`nbytes` of buffers of `dtype` for `device`, in two halves."""

    def __init__(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.half_bytes = nbytes // HALVES // ALIGNMENT * ALIGNMENT
        cuda = device.type == "cuda"
        # Without device="cpu" a default device set elsewhere would put the pinned buffer on the GPU.
        host = torch.empty(HALVES, self.half_bytes, dtype=torch.uint8, device="cpu", pin_memory=cuda)
        rows = torch.empty_like(host, device=device) if cuda else host
        self.halves = [Half(host[i], rows[i]) for i in range(HALVES)]
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def half(self, step: int) -> Half:
        return self.halves[step % HALVES]

    def step_begins(self, step: int) -> None:
        """Called before `step` is issued: the step before it was the last to read the other half."""
        if self._stream is not None:
            self.half(step + 1).free = torch.cuda.current_stream(self.device).record_event()

    def wait_free(self, slot: Slot) -> None:
        """On the worker, before `slot` is filled."""
        for event in (slot.half.free, slot.half.copied):
            if event is not None:
                event.synchronize()

    def send(self, slot: Slot, rows: int) -> torch.cuda.Event | None:
        """On the worker: starts copying the first `rows` rows to the device. The event of its end; None on CPU."""
        if self._stream is None:
            return None
        with torch.cuda.stream(self._stream):
            slot.rows[:rows].copy_(slot.host[:rows], non_blocking=True)
            slot.half.copied = self._stream.record_event()
        return slot.half.copied


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def step_bytes(values: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of staging that a step needs whose lookups fetch so many values each."""
    return HALVES * sum(aligned(count * dtype.itemsize) for count in values)


def max_tokens(staging_bytes: int, tables: Sequence[tuple[Table, int]], dtype: torch.dtype) -> int:
    """The most tokens one step may have; `tables`: (table, rows per token) of every lookup of a step, at least one.

    Raises CapacityError, with the value that would do, if not even one token fits.
    """
    widths = [columns * table.dim for table, columns in tables]
    available = HALVES * (staging_bytes // HALVES // ALIGNMENT * ALIGNMENT)
    tokens = available // (HALVES * sum(widths) * dtype.itemsize)
    while tokens and step_bytes((tokens * width for width in widths), dtype) > available:
        tokens -= 1
    if tokens < 1:
        needed = step_bytes(widths, dtype)
        raise CapacityError(f"--staging is {staging_bytes} bytes; the rows of one token need {needed}: raise --staging")
    return tokens
