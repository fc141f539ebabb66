"""The engine's statistics as Prometheus families: scheduler, KV cache, memory tables."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric

from server import metrics
from server.api.families import Labels, cumulative, family, histogram
from server.metrics import Bounds
from server.runtime.messages import EngineStats, MemoryCounters, TableResidency


def engine_families(stats: EngineStats, model: str, block_size: int, fetch_bounds: Bounds) -> Iterator[Metric]:
    """All but what a memory's counters leave out: no memory, no `engram_memory_*`."""
    for series, value in (
        (metrics.RUNNING, stats.running),
        (metrics.WAITING, stats.waiting),
        (metrics.KV_USAGE, kv_usage(stats)),
        (metrics.PREFIX_QUERIES, stats.prefix_queries_total),
        (metrics.PREFIX_HITS, stats.prefix_hits_total),
        (metrics.PREEMPTIONS, stats.preemptions_total),
        (metrics.STEPS, stats.steps_total),
        (metrics.STEP_SECONDS, stats.step_s_total),
    ):
        yield family(series, model, {(): value})
    reasons: dict[Labels, float] = {("capacity",): stats.waiting - stats.deferred, ("deferred",): stats.deferred}
    yield family(metrics.WAITING_BY_REASON, model, reasons)
    if stats.blocks:  # the engine has spoken
        yield family(metrics.CACHE_CONFIG, model, {(str(block_size), str(stats.blocks)): 1})
    if stats.memory:
        yield from memory_families(stats.memory, stats.resident, model, fetch_bounds)


def gateway_families(stats: EngineStats, model: str) -> Iterator[Metric]:
    """The three gauges of Kubernetes' inference gateways under the names they know, vLLM's."""
    values = {metrics.RUNNING: stats.running, metrics.WAITING: stats.waiting, metrics.KV_USAGE: kv_usage(stats)}
    for name, series in metrics.VLLM_ALIASES.items():
        yield family(metrics.Series(name, series.kind, series.help), model, {(): values[series]})


def kv_usage(stats: EngineStats) -> float:
    return stats.blocks_used / stats.blocks if stats.blocks else 0.0


def memory_families(
    memory: tuple[MemoryCounters, ...], resident: tuple[TableResidency, ...], model: str, fetch_bounds: Bounds
) -> Iterator[Metric]:
    """Per table and layer: rows, tiers, bytes, seconds, and what the hot rows do."""
    tables: list[tuple[Labels, MemoryCounters]] = [((c.table, str(c.layer)), c) for c in memory]
    hits = {(*labels, tier): count for labels, c in tables for tier, count in hits_by_tier(c).items()}
    placements = {labels: c.placement for labels, c in tables}
    held: dict[Labels, float] = {(*labels, "device", "cached"): c.cache_bytes for labels, c in tables if c.capacity}
    for each in resident:
        labels = each.table, str(each.layer)
        if labels in placements and each.counted != "unknown":
            held[*labels, placements[labels], each.counted] = each.bytes
    moved = {(*labels, "read"): c.bytes for labels, c in tables}
    moved |= {(*labels, "to_device"): c.device_bytes for labels, c in tables}
    yield family(metrics.MEMORY_ROWS, model, {labels: c.rows for labels, c in tables})
    yield family(metrics.MEMORY_HITS, model, hits)
    yield family(metrics.MEMORY_PAGE_INS, model, {labels: c.page_ins for labels, c in tables})
    yield family(metrics.MEMORY_BYTES, model, moved)
    fetches = {labels: (cumulative(fetch_bounds, c.fetch_counts), c.fetch_s) for labels, c in tables if c.fetch_counts}
    yield histogram(metrics.MEMORY_FETCH, model, fetches)
    yield family(metrics.MEMORY_STALL, model, {labels: c.stall_s for labels, c in tables})
    yield family(metrics.MEMORY_RESIDENT, model, held)
    yield family(metrics.MEMORY_CAPACITY, model, {labels: c.capacity for labels, c in tables})
    yield family(metrics.MEMORY_ADMISSIONS, model, {labels: c.admissions for labels, c in tables})
    yield family(metrics.MEMORY_EVICTIONS, model, {labels: c.evictions for labels, c in tables})
    ages = {labels: c.hot_list_age_s for labels, c in tables if c.hot_list_age_s is not None}
    if ages:
        yield family(metrics.HOT_LIST_AGE, model, ages)


def hits_by_tier(counters: MemoryCounters) -> dict[str, int]:
    """Rows by where they were found. What the hot rows did not hold came from where the table is placed."""
    tiers = {"device": counters.device_hits, "pinned": 0, "mapped": 0}
    tiers[counters.placement] += counters.rows - counters.device_hits
    return tiers
