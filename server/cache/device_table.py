"""DeviceTable: a table whose rows lie on the model's device as one tensor, and are looked up where they are read.

    file ──(once, at start)──▶ raw[rows, R] on the device        begin ─ … ─ layer: index_select, decode ─ …

No fetch, no staging, no worker: the memory layer's own `wait` looks the rows up. They are kept as they are stored,
values and scales side by side, and decoded by the same row type as everywhere: bit for bit what a fetch brings. On CPU
the device is RAM. The file may go once it is loaded. Knows ids, never tokens.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from server.cache.counters import LayerCounters
from server.cache.lookup import Lookup
from server.cache.row_table import RowTable, check_range
from server.cache.row_types import Bytes, Ids
from server.errors import CapacityError, TableError

logger = logging.getLogger(__name__)

RUN_BYTES = 64 << 20
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class DeviceTable:
    """All rows of `source` on `device`: `raw` uint8[rows, R].

    Raises TableError if its file changes meanwhile, CapacityError without room.
    """

    def __init__(self, source: RowTable, device: torch.device) -> None:
        self.name, self.rows, self.dim, self.row_type = source.name, source.rows, source.dim, source.row_type
        self.row_bytes, self.nbytes = source.row_bytes, source.nbytes
        self.fault: str | None = None
        self.device, self.looked_up = device, 0
        try:
            with torch.inference_mode(False):
                raw = torch.empty(self.rows, self.row_bytes, dtype=torch.uint8, device=device)
        except (RuntimeError, MemoryError):
            raise CapacityError(
                f"table {self.name} needs {self.nbytes} bytes on {device} and they are not free; "
                f"set --placement {self.name}=mapped"
            ) from None
        if device.type == "cpu":
            copy_rows(source, raw.numpy())
        else:
            _send_rows(source, raw)
        # As wide words as rows allow: index_select of bytes is several times slower.
        word = next(word for word in WORDS if self.row_bytes % word.itemsize == 0)
        self.raw, self._words = raw, raw.view(word)

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ids[N] → [N, D] of `dtype`, both on the device; row ids of an addresser are always in range."""
        self.looked_up += len(ids)
        raw = self._words.index_select(0, ids)
        if self.row_type.is_stored_as(dtype) and self.row_bytes == self.dim * dtype.itemsize:
            return raw.view(dtype)
        rows = torch.empty(len(ids), self.dim, dtype=dtype, device=self.device)
        self.row_type.decode(raw.view(torch.uint8), rows)
        return rows

    def gather(self, ids: Ids, out: Bytes) -> None:
        """As the other tables': rows ids[N] → out uint8[N, R] on the host."""
        if self.fault is not None:
            raise TableError(self.fault)
        if not len(ids):
            return
        check_range(self, ids)
        out[:] = self.raw.index_select(0, torch.from_numpy(ids).to(self.device)).cpu().numpy()

    def page_in(self, ids: Ids) -> int:
        return 0

    def counters(self, layer: int) -> LayerCounters:
        return LayerCounters(self.name, layer, self.looked_up, self.looked_up * self.row_bytes)

    def close(self) -> None:
        self.fault = self.fault or f"table {self.name} is closed"


class DeviceFetch:
    """A lookup into a DeviceTable, in the place of a `Fetch`: nothing is under way, `wait` looks the rows up."""

    __slots__ = ("_dtype", "_ids", "_rows", "done_at", "issued", "lookup")

    def __init__(self, lookup: Lookup, dtype: torch.dtype) -> None:
        assert isinstance(lookup.table, DeviceTable)
        self.lookup, self._dtype = lookup, dtype
        self._ids = torch.from_numpy(np.ascontiguousarray(lookup.row_ids)).to(lookup.table.device, non_blocking=True)
        self._rows: Tensor | None = None
        self.issued = self.done_at = time.perf_counter()

    def wait(self) -> Tensor:
        """[T, C · D] in the model's dtype, as `Fetch.wait`."""
        if self._rows is None:
            assert isinstance(self.lookup.table, DeviceTable)
            self._rows = self.lookup.table.lookup(self._ids.view(-1), self._dtype)
        return self._rows.view(self._ids.shape[0], -1)


def copy_rows(source: RowTable, out: Bytes) -> None:
    """All rows → out uint8[rows, R] in RAM, several runs at once. Raises TableError if the file changed meanwhile.

    The OS keeps no pages of the file behind the copy, so that the table stands in memory once.
    """

    def run(first: int, count: int) -> None:
        source.read_run(first, out[first : first + count])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        _each_run(source, lambda first, count: pool.submit(run, first, count).result)


def _send_rows(source: RowTable, raw: Tensor) -> None:
    buffer = np.empty((max(1, RUN_BYTES // source.row_bytes), source.row_bytes), np.uint8)

    def run(first: int, count: int) -> Callable[[], object]:
        source.read_run(first, buffer[:count])
        raw[first : first + count].copy_(torch.from_numpy(buffer[:count]))
        return lambda: None

    _each_run(source, run)


def _each_run(source: RowTable, run: Callable[[int, int], Callable[[], object]]) -> None:
    """Starts `run` for every run of rows, then asks each for its end."""
    begun = time.perf_counter()
    rows = max(1, RUN_BYTES // source.row_bytes)
    source.check()
    ends = [run(first, min(rows, source.rows - first)) for first in range(0, source.rows, rows)]
    for end in ends:
        end()
    source.check()
    source.forget()
    seconds = time.perf_counter() - begun
    logger.info("table %s: %d bytes copied in %.1f s", source.name, source.nbytes, seconds)
