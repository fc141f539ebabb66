"""RowReader: one lookup's rows, from the device cache and the table to where the layer reads them.

    CPU    table ─ gather ─→ missed ┐                                  all on the worker thread; straight into staging
           cache ────────────→ hits ┴─→ raw ─ decode ─→ staging        where the table is stored as the model computes
    CUDA   table ─ gather ─→ raw, on the host ─ decode ─→ pinned staging ─ copy ─→ staging on the device
           with a cache: table ─ gather ─→ missed ─ copy ─┐
                         cache, on the device ──────→ hits ┴─→ raw ─ decode ─→ staging on the device

Shapes: T tokens, C rows per token, D values and R bytes a row, O orders, N = T · O cache entries. Belongs to one
thread, the prefetcher's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from server.cache.cuda_memory import send
from server.cache.hot_rows import Found, HotRows
from server.cache.lookup import Fetch
from server.cache.row_table import Ids, Table
from server.cache.row_types import Bytes
from server.cache.staging import Half, Staging

DECODE_VALUES = 32768  # values per torch call: a larger call would start a second team of compute threads
FEW_IDS = 64  # of so many, a set says sooner than a sort whether one comes twice


class RowReader:
    """Fills fetches through `staging`; `hot` None: no device cache."""

    def __init__(self, staging: Staging, hot: HotRows | None) -> None:
        self.staging, self.hot = staging, hot
        self._raw = np.empty(0, np.uint8)  # row bytes before they are decoded
        self._missed = np.empty(0, np.uint8)

    def fill(self, fetch: Fetch) -> None:
        """Reads the fetch's rows into its place of the staging. Raises TableError."""
        lookup = fetch.lookup
        ids, keys, askers = np.ascontiguousarray(lookup.row_ids.reshape(-1)), lookup.keys, lookup.askers
        if lookup.dedup and not are_distinct(ids):
            ids, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
            with self.staging.on_side_stream():  # the current one computes the layers before
                fetch.inverse = send(inverse.reshape(lookup.row_ids.shape), self.staging.device)
            # Distinct rows are cache entries only where an entry is one row of one order.
            keys = None if keys is None or lookup.row_ids.shape[1] > 1 else keys[first]
            askers = None if askers is None or keys is None else askers[first]
        fetch.rows_read = len(ids)
        half = self.staging.half(fetch.step)
        host, fetch.rows = self.staging.buffers(half, fetch.begin, len(ids), lookup.table.dim)
        hot = self.hot
        if hot is not None and keys is not None:
            with hot.turn:
                found = hot.find(lookup.table, lookup.layer, keys)
                if found is not None:
                    fetch.hits = found.hits_by_order()
                    fetch.rows_read -= len(found.hits) * found.source.heads
                    if self.staging.device.type == "cpu":
                        self._assemble(hot, found, ids, host)
                    else:
                        self._assemble_on_device(hot, found, ids, half, fetch)
                    hot.remember(found, ids, askers)
                    return
        self._read(lookup.table, ids, host)
        fetch.copied = self.staging.send(half, host, fetch.rows)

    def _read(self, table: Table, ids: Ids, out: Tensor) -> None:
        """Rows ids[N] → out[N, D]: one gather, straight into `out` if nothing is to be decoded."""
        if is_stored_as(table, out):
            table.gather(ids, out.view(torch.uint8).numpy())
            return
        self._raw, raw = room(self._raw, len(ids), table.row_bytes)
        table.gather(ids, raw)
        decode(table, torch.from_numpy(raw), out)

    def _assemble(self, hot: HotRows, found: Found, ids: Ids, out: Tensor) -> None:
        table = found.source.table
        missed = self._gather_missed(found, ids)
        if is_stored_as(table, out):
            hot.assemble(found, missed, out.view(torch.uint8).numpy().reshape(len(found.slots), -1))
            return
        self._raw, raw = room(self._raw, len(found.slots), found.source.entry_bytes)
        hot.assemble(found, missed, raw)
        decode(table, torch.from_numpy(raw.reshape(len(ids), table.row_bytes)), out)

    def _assemble_on_device(self, hot: HotRows, found: Found, ids: Ids, half: Half, fetch: Fetch) -> None:
        table, rows = found.source.table, fetch.rows
        assert rows is not None
        missed = torch.from_numpy(self._gather_missed(found, ids))
        with self.staging.on_side_stream():
            raw = hot.assemble_on_device(found, missed.to(rows.device))
            table.row_type.decode(raw.view(len(ids), table.row_bytes), rows)
            fetch.copied = self.staging.sent(half)

    def _gather_missed(self, found: Found, ids: Ids) -> Bytes:
        """uint8[M, E] of the entries missed. Without a miss the table only looks whether its files are as they were."""
        source = found.source
        wanted = ids.reshape(-1, source.heads)[found.misses].reshape(-1)
        self._missed, missed = room(self._missed, len(wanted), source.table.row_bytes)
        source.table.gather(wanted, missed)
        return missed.reshape(len(found.misses), source.entry_bytes)


def are_distinct(ids: Ids) -> bool:
    """Whether few ids are all different. Many need sorting to know, and then it may as well be done."""
    return len(ids) <= FEW_IDS and len(set(ids.tolist())) == len(ids)


def is_stored_as(table: Table, out: Tensor) -> bool:
    return table.row_type.is_stored_as(out.dtype) and table.row_bytes == out.shape[1] * out.itemsize


def decode(table: Table, raw: Tensor, out: Tensor) -> None:
    """raw uint8[N, R] → out[N, D], in pieces."""
    piece = max(1, DECODE_VALUES // table.dim)
    for at in range(0, len(raw), piece):
        table.row_type.decode(raw[at : at + piece], out[at : at + piece])


def room(buffer: Bytes, rows: int, width: int) -> tuple[Bytes, Bytes]:
    """The buffer, larger if it must be, and uint8[rows, width] of it."""
    if rows * width > len(buffer):
        buffer = np.empty(rows * width, np.uint8)
    return buffer, buffer[: rows * width].reshape(rows, width)
