"""Locust and the server measure the same: means within 5 %, medians and 95th percentiles in neighbouring buckets.

With the default model, whose steps are long beside what a client on the same cores adds.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from bisect import bisect_left
from pathlib import Path

import pytest

from server import metrics
from server.metrics import Series
from tests.live import ROOT, Live, live_server

KINDS = {"TTFT": metrics.TTFT, "ITL": metrics.INTER_TOKEN}


def histogram(gauges: dict[str, float], series: Series) -> tuple[list[float], float, float]:
    """Cumulative bucket counts, sum and count."""
    named = {key: value for key, value in gauges.items() if key.startswith(series.name)}
    buckets = [value for key, value in named.items() if key.startswith(f"{series.name}_bucket")]
    (total,) = (value for key, value in named.items() if key.startswith(f"{series.name}_sum"))
    (count,) = (value for key, value in named.items() if key.startswith(f"{series.name}_count"))
    return buckets, total, count


def grown(live: Live, series: Series, before: dict[str, float]) -> tuple[list[float], float, float]:
    now, then = histogram(live.gauges(), series), histogram(before, series)
    return [a - b for a, b in zip(now[0], then[0], strict=True)], now[1] - then[1], now[2] - then[2]


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="no locust: pip install -e '.[loadtest]'")
@pytest.mark.parametrize("users", [1, 4])
def test_means_agree_within_five_percent_and_percentiles_within_a_bucket(
    users: int, tmp_path: Path, soak_seconds: float
) -> None:
    seconds = int(min(60, soak_seconds / 4))
    with live_server(tmp_path / "log", "--kv-bytes", "256M") as live:
        run = ("-m", "locust", "-f", "loadtest/locustfile.py", "Streaming", "--headless", "--host", live.url, "--json")
        flags = ("-u", str(users), "-r", str(users), "--stop-timeout", "60", "-t")
        subprocess.run([sys.executable, *run, *flags, "5s"], cwd=ROOT, check=True, capture_output=True)  # warm
        before = live.gauges()
        done = subprocess.run([sys.executable, *run, *flags, f"{seconds}s"], cwd=ROOT, check=True, capture_output=True)
        client = {entry["method"]: entry for entry in json.loads(done.stdout)}
        for kind, series in KINDS.items():
            cumulative, total, count = grown(live, series, before)
            seen = client[kind]
            assert seen["num_requests"] == count  # --stop-timeout lets every answer end
            assert seen["total_response_time"] / count == pytest.approx(total / count * 1e3, rel=0.05)
            for percent in (50, 95):
                ours = bisect_left(cumulative, percent / 100 * count)
                theirs = bisect_left(series.buckets, percentile(seen["response_times"], percent) / 1e3)
                assert abs(ours - theirs) <= 1, (kind, percent, cumulative)


def percentile(times: dict[str, int], percent: float) -> float:
    """Milliseconds, of Locust's counts by rounded time."""
    left = percent / 100 * sum(times.values())
    for milliseconds, count in sorted((float(key), count) for key, count in times.items()):
        left -= count
        if left <= 0:
            return milliseconds
    raise AssertionError("no time was counted")
