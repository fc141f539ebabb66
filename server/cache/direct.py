"""Direct lookups: the device reads a table's rows itself, where they lie or through the hot rows; no host takes part.

    row_ids[T, C], keys[T, O] ─ hot? ─ hit ──────────────────────────────────────┐
                                 └ miss ─ rows on the device, or registered RAM ─┴─→ decode ─→ staging[T, C · D]

Every tensor is made once and rewritten in place, so that a captured CUDA graph finds it again. Rows are the host
path's, bit for bit. Shapes: T tokens, C = O · heads rows a token, O orders, D values a row. Knows ids, never tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kernels.row_lookup import HotTags, lookup
from server.cache.counters import LayerCounters
from server.cache.device_table import DeviceTable
from server.cache.hot_rows import HotRows
from server.cache.hot_sources import SourceKey
from server.cache.in_place import PROGRAMS, row_format
from server.cache.pinned_table import PinnedTable
from server.cache.row_table import Ids


class DirectTable:
    """One table at one layer. `counters` int64[O, 2] on the device: n-grams hit and missed, kept by `lookup`.

    `hot`: the cache in front of the table, mirrored; None for tables on the device and where there is none.
    """

    def __init__(
        self,
        table: DeviceTable | PinnedTable,
        layer: int,
        orders: tuple[int, ...],
        heads: int,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        counters: Tensor,
        hot: HotRows | None,
    ) -> None:
        self.table, self.layer, self.orders, self.heads = table, layer, orders, heads
        self.counters, self.hot = counters, hot
        self._raw, self._form = table.raw, row_format(table)
        self._tags: HotTags | None = None
        width = len(orders) * heads * table.dim
        with torch.inference_mode(False):
            self._staging = torch.zeros(max_tokens, width, dtype=dtype, device=device)
            self._owners = torch.zeros(len(orders), dtype=torch.int64, device=device)
        if hot is not None:
            self._tags, self._owners = hot.on_device(self.key)

    @property
    def key(self) -> SourceKey:
        return self.table.name, self.layer

    @property
    def nbytes(self) -> int:
        """Of its staging, on the device."""
        return self._staging.nbytes

    def lookup(self, row_ids: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
        """row_ids[T, C], keys[T, O], seen bool[T] → [T, C · D] in the model's dtype, until the next lookup. Rows of
        tokens that do not see the table are left as they were. On the current stream; may be captured.
        """
        rows = self._staging[: len(seen)]
        lookup(self._raw, self._form, row_ids, keys, self._owners, self._tags, rows, self.counters, PROGRAMS, seen)
        return rows

    def counted(self, before: LayerCounters, counts: Ids) -> LayerCounters:
        """`before`, of fetches of the same rows, and what `counters` said when it was counts[O, 2]."""
        found = counts * self.heads
        hits, read = (int(total) for total in found.sum(0))
        orders = tuple(
            [
                order._replace(
                    looked_up=order.looked_up + hit + miss, device_hits=order.device_hits + hit, read=order.read + miss
                )
                for order, (hit, miss) in zip(before.orders, found.tolist(), strict=True)
            ]
            if before.orders
            else []
        )
        sent = 0 if isinstance(self.table, DeviceTable) else read * self.table.row_bytes
        return LayerCounters(
            self.table.name,
            self.layer,
            before.rows + hits + read,
            before.bytes + read * self.table.row_bytes,
            before.fetch_s,
            before.stall_s,
            before.device_hits + hits,
            before.admissions,
            before.evictions,
            before.capacity,
            before.cache_bytes,
            orders,
            before.device_bytes + sent,
        )


Beside = TypeVar("Beside")


class Observed(Generic[Beside]):
    """What the device counted and looked up, read by the host without waiting: int64 `words` on the device, copied to a
    ring of pinned memory after a launch, and read when the copy is over.

        device   launch k ─ copy ─ launch k + 1 ─ copy ─ …
        host              push      poll: k's words, a step late
    """

    def __init__(self, words: int, device: torch.device, depth: int = 4) -> None:
        cuda = device.type == "cuda"
        with torch.inference_mode(False):
            self.words = torch.zeros(words, dtype=torch.int64, device=device)
            host = torch.zeros(depth, words, dtype=torch.int64, device="cpu", pin_memory=cuda)
        self._free: list[Tensor] = list(host)
        self._pushed: list[tuple[Tensor, torch.cuda.Event | None, Beside]] = []

    def push(self, what: Beside) -> bool:
        """Has the words copied in the current stream's order, `what` kept beside them. False if the ring is full."""
        if not self._free:
            return False
        host = self._free.pop()
        host.copy_(self.words, non_blocking=True)
        event = torch.cuda.current_stream(self.words.device).record_event() if self.words.is_cuda else None
        self._pushed.append((host, event, what))
        return True

    def poll(self) -> list[tuple[Ids, Beside]]:
        """The words that have arrived, oldest first, and what was kept beside them."""
        arrived = []
        while self._pushed and (self._pushed[0][1] is None or self._pushed[0][1].query()):  # type: ignore[no-untyped-call]
            host, _, what = self._pushed.pop(0)
            arrived.append((host.numpy().copy(), what))
            self._free.append(host)
        return arrived


def with_direct(
    counted: Sequence[LayerCounters], tables: Sequence[DirectTable], counts: Sequence[Ids]
) -> tuple[LayerCounters, ...]:
    """`counted` with what direct lookups add to those of its tables; counts[O, 2] of each table."""
    found = {(counters.table, counters.layer): counters for counters in counted}
    for table, seen in zip(tables, counts, strict=True):
        if table.key in found:
            found[table.key] = table.counted(found[table.key], seen)
    return tuple(found.values())
