"""From plain numbers to what prometheus_client exposes: one family per series, every sample with `model_name`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from server.metrics import Bounds, Series

Labels = tuple[str, ...]
Buckets = tuple[list[tuple[str, float]], float]  # cumulative counts, and the sum


class Observations:
    """A histogram's state: counts per bucket, the last one beyond all bounds, and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        return cumulative(self.bounds, self.counts)


def cumulative(bounds: Bounds, counts: Sequence[int]) -> list[tuple[str, float]]:
    """What Prometheus calls buckets: how many were at most each bound."""
    pairs, total = [], 0
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        total += count
        pairs.append((bound, float(total)))
    return pairs


def family(series: Series, model: str, values: Mapping[Labels, float]) -> Metric:
    """A counter or gauge: label values beside `model_name` → value."""
    made: CounterMetricFamily | GaugeMetricFamily
    labels = ["model_name", *series.labels]
    if series.kind == "counter":
        made = CounterMetricFamily(series.name.removesuffix("_total"), series.help, labels=labels)
    else:
        made = GaugeMetricFamily(series.name, series.help, labels=labels)
    for rest, value in values.items():
        made.add_metric([model, *rest], value)
    return made


def histogram(series: Series, model: str, values: Mapping[Labels, Buckets]) -> HistogramMetricFamily:
    """Label values beside `model_name` → cumulative buckets and sum."""
    made = HistogramMetricFamily(series.name, series.help, labels=["model_name", *series.labels])
    for rest, (buckets, total) in values.items():
        made.add_metric([model, *rest], buckets, total)
    return made
