"""RowReader: one lookup's rows, from the device cache and the table to where the layer reads them.

    CPU    table ─ gather ─→ missed ┐                                  all on the worker thread; straight into staging
           cache ────────────→ hits ┴─→ raw ─ decode ─→ staging        where the table is stored as the model computes
    CUDA   table in registered RAM ─ read and decoded by the device (`in_place.py`) ─→ staging on the device
           others: table ─ gather ─→ raw, on the host ─ decode ─→ pinned staging ─ copy ─→ staging on the device
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
from server.cache.in_place import read_in_place
from server.cache.lookup import Fetch, Lookup
from server.cache.pinned_table import PinnedTable
from server.cache.row_table import Ids, Table
from server.cache.row_types import Bytes
from server.cache.staging import Half, Staging

DECODE_VALUES = 32768  # values per torch call: a larger call would start a second team of compute threads
FEW_IDS = 64  # of so many, a set says sooner than a sort whether one comes twice


class RowReader:
    """Fills fetches through `staging`; `hot` None: no device cache."""

    def __init__(self, staging: Staging, hot: HotRows | None) -> None:
        self.staging, self.hot = staging, hot
        self.in_place: frozenset[Table] = frozenset()  # the tables whose rows the device reads itself
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
        hot, table = self.hot, lookup.table
        if isinstance(table, PinnedTable) and table in self.in_place:
            fetch.in_place = True
            self._read_in_place(table, lookup, ids, half, fetch)
        if hot is not None and keys is not None:
            with hot.turn:
                found = hot.find(table, lookup.layer, keys)
                if found is not None:
                    if not fetch.in_place:
                        self._read_through(hot, found, ids, host, half, fetch)
                    hot.remember(found, ids, askers)
                    return
        if not fetch.in_place:
            self._read(table, ids, host)
            fetch.copied = self.staging.send(half, host, fetch.rows)

    def try_in_place(self, table: PinnedTable, columns: int, orders: tuple[int, ...]) -> None:
        """Reads the rows of one token. Raises what a kernel raises."""
        out = torch.empty(1, columns * table.dim, dtype=self.staging.dtype, device=self.staging.device)
        read_in_place(table, np.zeros((1, columns), np.int64), len(orders) or 1, out)

    def _read_in_place(self, table: PinnedTable, lookup: Lookup, ids: Ids, half: Half, fetch: Fetch) -> None:
        """Rows that a cache holds too: what a prefill reads twice costs less than who would have to look after it."""
        columns, orders = lookup.row_ids.shape[1], len(lookup.orders) or 1
        if fetch.inverse is not None:  # distinct rows, each on its own
            columns = orders = 1
        row_ids = ids.reshape(-1, columns)
        assert fetch.rows is not None
        with self.staging.on_side_stream():
            read_in_place(table, row_ids, orders, fetch.rows.view(len(row_ids), -1))
            fetch.copied = self.staging.sent(half)

    def _read_through(self, hot: HotRows, found: Found, ids: Ids, host: Tensor, half: Half, fetch: Fetch) -> None:
        """Hits from the cache, the others from the table."""
        fetch.hits = found.hits_by_order()
        fetch.rows_read -= len(found.hits) * found.source.heads
        if self.staging.device.type == "cpu":
            self._assemble(hot, found, ids, host)
        else:
            self._assemble_on_device(hot, found, ids, half, fetch)

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
