"""Values as Prometheus reads them: parsed back with its own parser, compared with what was put in."""

from __future__ import annotations

import bisect
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server import metrics
from server.api.families import Observations
from server.api.gpu_metrics import Gpus
from server.api.metrics import RequestMetrics, registry
from server.api.process_metrics import cpu, disk_read, resident
from server.errors import SettingsError
from server.runtime.messages import EngineStats, MemoryCounters, TableResidency
from server.settings import Settings

NO_FETCHES = (0,) * (len(metrics.MEMORY_FETCH.buckets) + 1)
COUNTERS = MemoryCounters("pack", 1, 10, 2560, 0.5, 0.125, fetch_counts=(*NO_FETCHES[:-2], 1, 0))


def exported(stats: EngineStats, requests: RequestMetrics | None = None, **flags: Any) -> str:
    engine: Any = SimpleNamespace(stats=stats, pid=None)  # a scrape reads these two
    return generate_latest(registry(requests or RequestMetrics(), engine, "m", Settings(**flags))).decode()


def values_in(text: str) -> dict[tuple[str, ...], float]:
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(s.name, *(v for k, v in sorted(s.labels.items()) if k != "model_name")): s.value for s in samples}


def scraped(stats: EngineStats, requests: RequestMetrics | None = None, **flags: Any) -> dict[tuple[str, ...], float]:
    return values_in(exported(stats, requests, **flags))


def test_each_table_and_layer_has_its_own_figures() -> None:
    other = replace(COUNTERS, layer=7, rows=20, bytes=5120, stall_s=0.0, page_ins=3, device_bytes=99)
    values = scraped(EngineStats(memory=(COUNTERS, other)))
    for c in (COUNTERS, other):
        labels = (str(c.layer), c.table)
        assert values["engram_memory_rows_total", *labels] == c.rows
        assert values["engram_memory_bytes_total", "read", *labels] == c.bytes
        assert values["engram_memory_bytes_total", "to_device", *labels] == c.device_bytes
        assert values["engram_memory_page_ins_total", *labels] == c.page_ins
        assert values["engram_memory_fetch_seconds_sum", *labels] == c.fetch_s
        assert values["engram_memory_fetch_seconds_count", *labels] == 1
        assert values["engram_memory_stall_seconds_total", *labels] == c.stall_s


@pytest.mark.parametrize("placement", ["device", "pinned", "mapped"])
def test_rows_by_tier_sum_to_the_rows_looked_up(placement: str) -> None:
    values = scraped(EngineStats(memory=(replace(COUNTERS, device_hits=7, placement=placement),)))
    hits = {tier: values["engram_memory_hits_total", "1", "pack", tier] for tier in ("device", "pinned", "mapped")}
    assert sum(hits.values()) == COUNTERS.rows and hits["device"] >= 7 and hits[placement] >= 3


def test_resident_bytes_stand_in_their_tier_with_how_they_were_counted() -> None:
    resident = (TableResidency("pack", 1, 1000, "mincore"), TableResidency("pack", 7, 5, "unknown"))
    hot = replace(COUNTERS, capacity=100, cache_bytes=64)
    values = scraped(EngineStats(memory=(hot, replace(COUNTERS, layer=7)), resident=resident))
    found = {key[1:]: value for key, value in values.items() if key[0] == "engram_memory_resident_bytes"}
    assert found == {("mincore", "1", "pack", "mapped"): 1000, ("cached", "1", "pack", "device"): 64}


def test_what_is_not_there_is_absent_not_zero() -> None:
    bare = exported(EngineStats())
    assert "engram_memory_" not in bare and "engram_gpu_" not in bare and "vllm:" not in bare
    assert "hot_list_age" not in exported(EngineStats(memory=(COUNTERS,)))
    aged = scraped(EngineStats(memory=(replace(COUNTERS, hot_list_age_s=60.0),)))
    assert aged["engram_memory_hot_list_age_seconds", "1", "pack"] == 60


def test_gauges_follow_the_engine() -> None:
    stats = EngineStats(running=3, waiting=2, deferred=1, blocks_used=25, blocks=100, preemptions_total=4)
    values = scraped(stats, block_size=32)
    assert values["engram_num_requests_running",] == 3 and values["engram_num_requests_waiting",] == 2
    assert values["engram_num_requests_waiting_by_reason", "capacity"] == 1
    assert values["engram_num_requests_waiting_by_reason", "deferred"] == 1
    assert values["engram_kv_cache_usage_perc",] == 0.25 and values["engram_num_preemptions_total",] == 4
    assert values["engram_cache_config_info", "32", "100"] == 1
    assert scraped(EngineStats())["engram_kv_cache_usage_perc",] == 0


def test_gateways_find_their_three_gauges_under_vllms_names_if_asked() -> None:
    stats = EngineStats(running=3, waiting=2, blocks_used=25, blocks=100)
    values = scraped(stats, vllm_metrics=True)
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    assert [values[name,] for name in gauges] == [3, 2, 0.25]


@given(st.lists(st.floats(0, 2000)))
def test_a_bucket_counts_what_is_at_most_its_bound(observed: list[float]) -> None:
    observations = Observations(metrics.TTFT.buckets)
    for value in observed:
        observations.observe(value)
    ordered = sorted(observed)
    for bound, count in observations.cumulative():
        assert count == bisect.bisect_right(ordered, float(bound))


def test_buckets_can_be_overridden_with_and_without_the_prefix() -> None:
    flags = ("inter_token_latency_seconds=0.5:1", "engram_memory_fetch_seconds=0.001")
    settings = Settings(metrics_buckets=flags)
    requests = RequestMetrics(metrics.buckets_from(settings.metrics_buckets))
    requests.between_tokens.observe(0.7)
    values = scraped(EngineStats(memory=(replace(COUNTERS, fetch_counts=(2, 1)),)), requests)
    bounds = {key[1] for key in values if key[0] == "engram_inter_token_latency_seconds_bucket"}
    assert bounds == {"0.5", "1.0", "+Inf"}
    assert values["engram_inter_token_latency_seconds_bucket", "1.0"] == 1
    assert values["engram_memory_fetch_seconds_bucket", "1", "0.001", "pack"] == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("inter_token_latency=1", "'inter_token_latency', which is no histogram; did you mean engram_inter_token_lat"),
        ("time_to_first_token_seconds=", "the bounds ''; write rising numbers"),
        ("time_to_first_token_seconds=1:0.5", "'1:0.5'; write rising numbers"),
        ("time_to_first_token_seconds=1:nan", "'1:nan'; write rising numbers"),
        ("time_to_first_token_seconds=1:inf", "'1:inf'; write rising numbers"),
    ],
)
def test_wrong_buckets_are_refused_before_anything_is_loaded(flag: str, message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings(metrics_buckets=(flag,))
    assert message in str(refused.value)


def test_the_finest_buckets_are_a_millisecond_between_tokens_and_ten_microseconds_of_fetching() -> None:
    assert metrics.INTER_TOKEN.buckets[0] == 0.001 and metrics.MEMORY_FETCH.buckets[0] == 10e-6


def test_series_are_named_once_and_by_prometheus_rules() -> None:
    assert len({series.name for series in metrics.ALL}) == len(metrics.ALL) > 50
    for series in metrics.ALL:
        assert series.name.startswith("engram_") and series.help.endswith(".")
        assert (series.kind == "histogram") == bool(series.buckets)
        assert list(series.buckets) == sorted(set(series.buckets))
        if series is not metrics.STEP_TOKENS:  # vLLM's name for a histogram
            assert (series.kind == "counter") == series.name.endswith("_total")


def test_a_scrape_of_twenty_tables_at_two_layers_is_quick() -> None:
    """Under 25 ms of this thread's processor time, the best of many: what else the processor's cores do slows it."""
    counters = [replace(COUNTERS, table=f"pack-{table}", layer=layer) for table in range(20) for layer in range(2)]
    stats, requests, seconds = EngineStats(memory=tuple(counters)), RequestMetrics(), []
    engine: Any = SimpleNamespace(stats=stats, pid=None)
    exposition = registry(requests, engine, "m", Settings())
    while len(seconds) < 15 or (len(seconds) < 500 and min(seconds) >= 0.025):
        begun = time.thread_time()
        text = generate_latest(exposition)
        seconds.append(time.thread_time() - begun)
    assert text.count(b"engram_memory_fetch_seconds_bucket{") == 40 * len(NO_FETCHES)
    assert min(seconds) < 0.025, [f"{s * 1000:.1f} ms" for s in seconds]


# ── process and GPU ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_process_figures_are_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "io").write_text("rchar: 1\nwchar: 2\nread_bytes: 4096\nwrite_bytes: 3\n")
    (tmp_path / "statm").write_text("9 2 1 1 0 1 0\n")
    (tmp_path / "stat").write_text("7 (a b) c) S " + " ".join(map(str, range(4, 40))) + "\n")
    assert disk_read(tmp_path) == 4096
    assert resident(tmp_path) == 2 * 4096
    assert cpu(tmp_path) == (14 + 15) / 100  # fields 14 and 15 of proc(5), in ticks of 10 ms
    values = scraped(EngineStats())
    assert values["engram_process_resident_bytes", "api"] > 1 << 20
    assert values["engram_process_disk_read_bytes_total", "api"] >= 0
    assert values["engram_host_memory_limit_bytes",] > 1 << 28


class Nvml:
    """Stands in for `pynvml` with two cards; the second knows no power and counts no link bytes."""

    NVML_FI_DEV_PCIE_COUNT_TX_BYTES, NVML_FI_DEV_PCIE_COUNT_RX_BYTES, NVML_SUCCESS = 197, 198, 0

    class NVMLError(Exception):
        pass

    def __init__(self, cards: int) -> None:
        self.cards = cards

    def nvmlInit(self) -> None:
        if not self.cards:
            raise self.NVMLError("no driver")

    def nvmlDeviceGetCount(self) -> int:
        return self.cards

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUtilizationRates(self, card: int) -> Any:
        return SimpleNamespace(gpu=40)

    def nvmlDeviceGetMemoryInfo(self, card: int) -> Any:
        return SimpleNamespace(used=3 << 30, total=80 << 30)

    def nvmlDeviceGetPowerUsage(self, card: int) -> int:
        if card == 1:
            raise self.NVMLError("not supported")
        return 250_000

    def nvmlDeviceGetFieldValues(self, card: int, fields: list[int]) -> list[Any]:
        value = SimpleNamespace(ullVal=0)
        return [SimpleNamespace(nvmlReturn=card * 3, value=SimpleNamespace(ullVal=field)) for field in fields] or [
            value
        ]


def test_a_gpu_says_what_it_knows() -> None:
    found = {f.name: {tuple(s.labels.values()): s.value for s in f.samples} for f in Gpus(Nvml(2)).families("m")}
    assert found["engram_gpu_utilization_ratio"] == {("m", "0"): 0.4, ("m", "1"): 0.4}
    assert found["engram_gpu_memory_used_bytes"]["m", "1"] == 3 << 30
    assert found["engram_gpu_memory_total_bytes"]["m", "0"] == 80 << 30
    assert found["engram_gpu_power_watts"] == {("m", "0"): 250}
    assert found["engram_gpu_host_link_bytes"] == {("m", "0", "to_device"): 198, ("m", "0", "to_host"): 197}


def test_without_a_driver_there_are_no_gpu_series() -> None:
    assert not list(Gpus(Nvml(0)).families("m"))
