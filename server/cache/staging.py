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
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from server.cache.row_table import Table
from server.errors import CapacityError

ALIGNMENT = 64  # a cache line
HALVES = 2
KEPT_VIEWS = 256


class Half:
    """All buffers of one step; `device` None on CPU. `free`: when the step that last read it ends (CUDA); `copied`: its
    last copy's end."""

    def __init__(self, host: Tensor, device: Tensor | None) -> None:
        self.host, self.device = host, device
        self.free: torch.cuda.Event | None = None
        self.copied: torch.cuda.Event | None = None
        self._used, self._size = 0, len(host)
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def restart(self) -> None:
        """Forgets the buffers given out. One worker fills them in turn, so late writes of old ones do no harm."""
        self._used = 0

    def views(self, begin: int, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[rows, width] from byte `begin` on, on the host and on the device. Steps of one size ask for the same again,
        and making views takes longer than copying a few rows."""
        key = begin, rows, width
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= KEPT_VIEWS:
                self._views.clear()
            end = begin + rows * width * dtype.itemsize
            host = self.host[begin:end].view(dtype).view(rows, width)
            device = host if self.device is None else self.device[begin:end].view(dtype).view(rows, width)
            found = self._views[key] = host, device
        return found

    def reserve(self, nbytes: int) -> int | None:
        """Where a buffer of `nbytes` begins; None if it does not fit. No tensor is made: `begin` has to be quick."""
        begin = self._used
        if begin + nbytes > self._size:
            return None
        self._used = aligned(begin + nbytes)
        return begin


class Staging:
    """`nbytes` of buffers of `dtype` for `device`, in two halves."""

    def __init__(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.half_bytes = nbytes // HALVES // ALIGNMENT * ALIGNMENT
        cuda = device.type == "cuda"
        with torch.inference_mode(False):  # else only threads in inference mode could write them
            # Without device="cpu" a default device set elsewhere would put the pinned buffer on the GPU.
            host = torch.empty(HALVES, self.half_bytes, dtype=torch.uint8, device="cpu", pin_memory=cuda)
            on_device = torch.empty(host.shape, dtype=host.dtype, device=device) if cuda else [None] * HALVES
            self.halves = [Half(host[i], on_device[i]) for i in range(HALVES)]
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def half(self, step: int) -> Half:
        return self.halves[step % HALVES]

    def step_begins(self, step: int) -> Half:
        """The half of `step`. The step before it, issued by now, was the last to read the other half: that is free for
        hints once that step has ended."""
        other = self.halves[(step + 1) % HALVES]
        other.restart()
        if self._stream is not None:
            other.free = torch.cuda.current_stream(self.device).record_event()
        return self.halves[step % HALVES]

    def buffers(self, half: Half, begin: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """On the worker: the reserved buffer [rows, width] on the host and on the device, once it may be overwritten.

        On CPU both are the same tensor."""
        for event in (half.free, half.copied):
            if event is not None:
                event.synchronize()
        return half.views(begin, rows, width, self.dtype)

    def send(self, half: Half, host: Tensor, device: Tensor) -> torch.cuda.Event | None:
        """On the worker: starts copying to the device. The event of the copy's end; None on CPU."""
        if self._stream is None:
            return None
        with self.on_side_stream():
            device.copy_(host, non_blocking=True)
            return self.sent(half)

    def on_side_stream(self) -> AbstractContextManager[object]:
        """Where the worker's own work on the device goes; on CPU it makes no difference."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def sent(self, half: Half) -> torch.cuda.Event | None:
        """After work on the side stream that fills the device's side of `half`: the event of its end; None on CPU."""
        half.copied = None if self._stream is None else self._stream.record_event()
        return half.copied


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
