"""Values as Prometheus reads them: parsed back with its own parser, compared with what was put in."""

from __future__ import annotations

import bisect
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server import metrics
from server.api.metrics import Observations, RequestMetrics, registry
from server.runtime.messages import EngineStats, MemoryCounters


def scraped(stats: EngineStats, requests: RequestMetrics | None = None) -> dict[tuple[str, ...], float]:
    engine: Any = SimpleNamespace(stats=stats)  # a scrape reads the one attribute
    text = generate_latest(registry(requests or RequestMetrics(), engine, "m")).decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(s.name, *(v for k, v in sorted(s.labels.items()) if k != "model_name")): s.value for s in samples}


def test_each_table_and_layer_has_its_rows_bytes_and_seconds() -> None:
    counters = (MemoryCounters("pack", 1, 10, 2560, 0.5, 0.125), MemoryCounters("pack", 7, 20, 5120, 1.5, 0.0))
    values = scraped(EngineStats(memory=counters))
    for c in counters:
        labels = (str(c.layer), c.table)
        assert values["engram_memory_rows_total", *labels] == c.rows
        assert values["engram_memory_bytes_total", *labels] == c.bytes
        assert values["engram_memory_fetch_seconds_total", *labels] == c.fetch_s
        assert values["engram_memory_stall_seconds_total", *labels] == c.stall_s


def test_gauges_follow_the_engine() -> None:
    stats = EngineStats(running=3, waiting=2, blocks_used=25, blocks=100, preemptions_total=4)
    values = scraped(stats)
    assert values["engram_num_requests_running",] == 3 and values["engram_num_requests_waiting",] == 2
    assert values["engram_kv_cache_usage_perc",] == 0.25 and values["engram_num_preemptions_total",] == 4
    assert scraped(EngineStats())["engram_kv_cache_usage_perc",] == 0


@given(st.lists(st.floats(0, 2000)))
def test_a_bucket_counts_what_is_at_most_its_bound(observed: list[float]) -> None:
    observations = Observations(metrics.TTFT.buckets)
    for value in observed:
        observations.observe(value)
    ordered = sorted(observed)
    for bound, count in observations.cumulative():
        assert count == bisect.bisect_right(ordered, float(bound))


def test_series_are_named_once_and_by_prometheus_rules() -> None:
    assert len({series.name for series in metrics.ALL}) == len(metrics.ALL) > 20
    for series in metrics.ALL:
        assert series.name.startswith("engram_") and series.help.endswith(".")
        assert (series.kind == "counter") == series.name.endswith("_total")
        assert (series.kind == "histogram") == bool(series.buckets)
        assert list(series.buckets) == sorted(set(series.buckets))
