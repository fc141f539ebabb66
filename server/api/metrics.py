"""The values of the series in `server/metrics.py`, and their exposition.

A token must cost next to nothing: plain lists and floats of the one event loop, without locks, that become Prometheus
families only when someone scrapes. Gauges and the engine's totals are read from its latest statistics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from server import metrics
from server.metrics import Series
from server.runtime.client import EngineClient
from server.runtime.messages import EngineStats, FinishReason


class Observations:
    """A histogram's state: counts per bucket, the last one beyond all bounds, and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        pairs, total = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            pairs.append((bound, float(total)))
        return pairs


class RequestMetrics:
    """What the API process counts itself."""

    def __init__(self) -> None:
        self.first_token = Observations(metrics.TTFT.buckets)
        self.between_tokens = Observations(metrics.INTER_TOKEN.buckets)
        self.end_to_end = Observations(metrics.E2E.buckets)
        self.queue = Observations(metrics.QUEUE.buckets)
        self.prefill = Observations(metrics.PREFILL.buckets)
        self.prompt_tokens = self.generation_tokens = self.unknown_fields = 0
        reasons: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
        self.finished: Counter[FinishReason] = Counter(dict.fromkeys(reasons, 0))
        self.refused: Counter[str] = Counter(dict.fromkeys(("unauthorized", "requests", "tokens", "concurrency"), 0))

    def families(self, model: str) -> Iterator[Metric]:
        for series, observations in (
            (metrics.TTFT, self.first_token),
            (metrics.INTER_TOKEN, self.between_tokens),
            (metrics.E2E, self.end_to_end),
            (metrics.QUEUE, self.queue),
            (metrics.PREFILL, self.prefill),
        ):
            histogram = HistogramMetricFamily(series.name, series.help, labels=["model_name"])
            histogram.add_metric([model], observations.cumulative(), observations.sum)
            yield histogram
        yield _family(metrics.PROMPT_TOKENS, model, {(): self.prompt_tokens})
        yield _family(metrics.GENERATION_TOKENS, model, {(): self.generation_tokens})
        yield _family(metrics.UNKNOWN_FIELDS, model, {(): self.unknown_fields})
        yield _family(metrics.REFUSED, model, {(reason,): count for reason, count in self.refused.items()})
        yield _family(metrics.SUCCESS, model, {(reason,): count for reason, count in self.finished.items()})


def engine_families(stats: EngineStats, model: str) -> Iterator[Metric]:
    """The engine's statistics as families."""
    for series, value in (
        (metrics.RUNNING, stats.running),
        (metrics.WAITING, stats.waiting),
        (metrics.KV_USAGE, stats.blocks_used / stats.blocks if stats.blocks else 0.0),
        (metrics.PREFIX_QUERIES, stats.prefix_queries_total),
        (metrics.PREFIX_HITS, stats.prefix_hits_total),
        (metrics.PREEMPTIONS, stats.preemptions_total),
        (metrics.STEPS, stats.steps_total),
        (metrics.STEP_SECONDS, stats.step_s_total),
    ):
        yield _family(series, model, {(): value})
    tables = [((counters.table, str(counters.layer)), counters) for counters in stats.memory]
    yield _family(metrics.MEMORY_ROWS, model, {labels: c.rows for labels, c in tables})
    yield _family(metrics.MEMORY_BYTES, model, {labels: c.bytes for labels, c in tables})
    yield _family(metrics.MEMORY_FETCH, model, {labels: c.fetch_s for labels, c in tables})
    yield _family(metrics.MEMORY_STALL, model, {labels: c.stall_s for labels, c in tables})
    resident = [((r.table, str(r.layer), r.counted), r.bytes) for r in stats.resident if r.counted != "unknown"]
    yield _family(metrics.MEMORY_RESIDENT, model, dict(resident))


def _family(series: Series, model: str, values: Mapping[tuple[str, ...], float]) -> Metric:
    labels = ["model_name", *series.labels]
    family: CounterMetricFamily | GaugeMetricFamily
    if series.kind == "counter":
        family = CounterMetricFamily(series.name.removesuffix("_total"), series.help, labels=labels)
    else:
        family = GaugeMetricFamily(series.name, series.help, labels=labels)
    for rest, value in values.items():
        family.add_metric([model, *rest], value)
    return family


class _Scrape(Collector):
    def __init__(self, requests: RequestMetrics, engine: EngineClient, model: str) -> None:
        self._requests, self._engine, self._model = requests, engine, model

    def collect(self) -> Iterable[Metric]:
        yield from engine_families(self._engine.stats, self._model)
        yield from self._requests.families(self._model)


def registry(requests: RequestMetrics, engine: EngineClient, model: str) -> CollectorRegistry:
    """A registry of its own: two apps in one process do not share numbers. Adds the API process's CPU and memory."""
    own = CollectorRegistry()
    own.register(_Scrape(requests, engine, model))
    ProcessCollector(registry=own)
    return own
