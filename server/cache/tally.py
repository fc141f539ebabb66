"""Tally: adds up what fetches did, by (table, layer) and n-gram order. Costs a few additions a fetch."""

from __future__ import annotations

from bisect import bisect_left

from server.cache.counters import LayerCounters, OrderCounters
from server.cache.hot_rows import HotRows, Occupancy
from server.cache.lookup import Fetch
from server.metrics import MEMORY_FETCH

LOOKED_UP, HITS, READ, SHARED = range(4)
NOTHING = Occupancy(0, 0)


class Tally:
    """The sums of one (table, layer)."""

    __slots__ = (
        "bounds", "by_order", "durations", "fetch_s", "hits", "layer", "orders", "read", "row_bytes", "sent", "stall_s",
        "table",
    )  # fmt: skip

    def __init__(
        self,
        table: str,
        layer: int,
        row_bytes: int,
        orders: tuple[int, ...],
        bounds: tuple[float, ...] = MEMORY_FETCH.buckets,
    ) -> None:
        self.table, self.layer, self.row_bytes, self.orders = table, layer, row_bytes, orders
        self.bounds, self.durations = bounds, [0] * (len(bounds) + 1)
        self.read = self.hits = self.sent = 0
        self.fetch_s = self.stall_s = 0.0
        self.by_order = [[0, 0, 0, 0] for _ in orders]

    def add(self, fetch: Fetch, stall: float) -> None:
        self.read += fetch.rows_read
        seconds = fetch.done_at - fetch.issued
        self.fetch_s += seconds
        self.durations[bisect_left(self.bounds, seconds)] += 1
        if fetch.copied is not None and fetch.rows is not None:
            width = self.row_bytes if fetch.in_place else fetch.rows.shape[1] * fetch.rows.element_size()
            self.sent += fetch.rows_read * width
        self.stall_s += stall
        tokens, columns = fetch.lookup.row_ids.shape
        if fetch.inverse is not None and columns > 1:
            return  # a row read once may be of several orders
        heads = columns // max(len(self.by_order), 1)
        distinct = len(fetch.rows) if fetch.inverse is not None and fetch.rows is not None else tokens * heads
        for order, sums in enumerate(self.by_order):
            hits = fetch.hits[order] * heads if fetch.hits is not None else 0
            self.hits += hits
            sums[LOOKED_UP] += tokens * heads
            sums[HITS] += hits
            sums[READ] += distinct - hits
            sums[SHARED] += tokens * heads - distinct

    def snapshot(self, hot: HotRows | None) -> LayerCounters:
        key = self.table, self.layer
        cached = None if hot is None else hot.figures(key)
        if cached is None or len(cached[1]) != len(self.orders):  # of another pack, which took over the name
            cached = NOTHING, [(0, 0)] * len(self.orders)
        held, moves = cached
        orders = tuple(
            [
                OrderCounters(order, looked_up, hits, read, shared, *moved)
                for order, (looked_up, hits, read, shared), moved in zip(self.orders, self.by_order, moves, strict=True)
            ]
        )
        return LayerCounters(
            self.table,
            self.layer,
            self.read + self.hits,
            self.read * self.row_bytes,
            self.fetch_s,
            self.stall_s,
            self.hits,
            sum([entered for entered, _ in moves]),
            sum([left for _, left in moves]),
            held.capacity,
            held.nbytes,
            orders,
            self.sent,
        )
