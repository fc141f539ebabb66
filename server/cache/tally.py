"""Tally: adds up what fetches did, by (table, layer) and n-gram order. Costs a few additions a fetch."""

from __future__ import annotations

from server.cache.counters import LayerCounters, OrderCounters
from server.cache.hot_rows import HotRows
from server.cache.lookup import Fetch

LOOKED_UP, HITS, READ, SHARED = range(4)


class Tally:
    """The sums of one (table, layer)."""

    __slots__ = ("by_order", "fetch_s", "layer", "nbytes", "orders", "rows", "stall_s", "table")

    def __init__(self, table: str, layer: int, orders: tuple[int, ...]) -> None:
        self.table, self.layer, self.orders = table, layer, orders
        self.rows = self.nbytes = 0
        self.fetch_s = self.stall_s = 0.0
        self.by_order = [[0, 0, 0, 0] for _ in orders]

    def add(self, fetch: Fetch, stall: float) -> None:
        self.rows += fetch.rows_read
        self.nbytes += fetch.rows_read * fetch.lookup.table.row_bytes
        self.fetch_s += fetch.done_at - fetch.issued
        self.stall_s += stall
        if not self.by_order:
            return
        tokens, columns = fetch.lookup.row_ids.shape
        heads = columns // len(self.by_order)
        distinct = len(fetch.rows) if fetch.inverse is not None and fetch.rows is not None else tokens * heads
        for order, sums in enumerate(self.by_order):
            hits = fetch.hits[order] * heads if fetch.hits is not None else 0
            sums[LOOKED_UP] += tokens * heads
            sums[HITS] += hits
            sums[READ] += distinct - hits
            sums[SHARED] += tokens * heads - distinct

    def snapshot(self, hot: HotRows | None) -> LayerCounters:
        moves = hot.moves((self.table, self.layer)) if hot is not None else None
        moved = moves or [(0, 0)] * len(self.orders)
        orders = tuple(
            [
                OrderCounters(order, looked_up, hits, read, shared, *pair)
                for order, (looked_up, hits, read, shared), pair in zip(self.orders, self.by_order, moved, strict=True)
            ]
        )
        return LayerCounters(self.table, self.layer, self.rows, self.nbytes, self.fetch_s, self.stall_s, orders)
