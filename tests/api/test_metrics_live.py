"""Invariants of the exported series, held against live servers under load with clients that leave."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.commands.attach import attach
from server.metrics import ALL
from tests.api.live import LiveServer

COMPLETIONS = "/v1/completions"
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def served(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The tiny model with a memory at two layers, and room for few requests."""
    pack = tmp_path_factory.mktemp("packs") / "pack"
    attach(
        model=str(tiny_llama_folder),
        out=pack,
        layers=(1, 2),
        rows=500,
        dim=8,
        heads=2,
        orders=(2, 3),
        seed=0,
        dtype="bfloat16",
    )
    flags = {"model": str(tiny_llama_folder), "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4}
    server = LiveServer({**flags, "memory": [str(pack)], "kv_bytes": 16 << 20, "max_waiting": 6, "vllm_metrics": True})
    yield server
    assert server.stop() == 0


def values(live: LiveServer) -> Values:
    families = text_string_to_metric_families(live.request("/metrics").body.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def total(found: Values, name: str, **labels: str) -> float:
    wanted = labels.items()
    return sum(value for (series, pairs), value in found.items() if series == name and wanted <= dict(pairs).items())


def ask(live: LiveServer, fields: dict[str, Any], results: list[int]) -> None:
    """Streams to the end; appends how many tokens came, -1 for a refusal."""
    reply = live.request(COMPLETIONS, {"stream": True, "temperature": 0, **fields})
    results.append(reply.body.count(b'"text"') if reply.status == 200 else -1)


def leave(live: LiveServer, after: int, results: list[int]) -> None:
    """Asks for a long answer and closes the connection after so many bytes of it; appends -1 if it was refused."""
    body = json.dumps({"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}).encode()
    lines = (
        f"POST {COMPLETIONS} HTTP/1.1",
        "Host: a",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    head = "\r\n".join(lines) + "\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while len(received) < after and (data := connection.recv(4096)):
            received += data
    results.append(-1 if b" 429 " in received[:20] else 0)


@pytest.mark.slow
def test_books_balance_after_a_crowd_with_quitters_and_refusals(served: LiveServer) -> None:
    before, seen = values(served), [values(served)]
    results: list[int] = []
    fields = [{"prompt": [7 + i] * 9, "max_tokens": 5 + i, "ignore_eos": True} for i in range(24)]
    threads = [threading.Thread(target=ask, args=(served, each, results)) for each in fields]
    threads += [threading.Thread(target=leave, args=(served, after, results)) for after in (1, 500, 2000)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(values(served))
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert served.settled(10)
    after = values(served)
    seen.append(after)

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    answered, refused = [tokens for tokens in results if tokens > 0], results.count(-1)
    aborted = grown("engram_request_success_total", finished_reason="abort")
    first = grown("engram_time_to_first_token_seconds_count")
    # Every answer with a token counts once; a client that left may or may not have been given one.
    assert len(answered) <= first <= len(answered) + aborted
    assert grown("engram_generation_tokens_total") == first + grown("engram_inter_token_latency_seconds_count")
    assert grown("engram_request_generation_tokens_count") == first == grown("engram_request_params_n_count")
    assert grown("engram_request_generation_tokens_sum") == grown("engram_generation_tokens_total")
    assert grown("engram_prompt_tokens_total") == grown("engram_request_prompt_tokens_sum")
    assert grown("engram_prompt_tokens_by_source_total") == grown("engram_prompt_tokens_total")
    assert grown("engram_admission_rejections_total", reason="requests") == refused
    assert grown("engram_http_requests_total", status="429", handler=COMPLETIONS) == refused
    assert grown("engram_http_request_duration_seconds_count") == grown("engram_http_requests_total") == len(threads)
    computed = grown("engram_iteration_tokens_total_sum")
    assert computed >= grown("engram_prompt_tokens_by_source_total", source="local_compute")
    for layer in ("1", "2"):
        rows = grown("engram_memory_rows_total", layer=layer)
        assert rows == computed * 2 * 2  # two orders of two heads for every token
        assert grown("engram_memory_hits_total", layer=layer) == rows
        assert grown("engram_memory_fetch_seconds_count", layer=layer) == grown("engram_steps_total")
    falling = [
        key[0]
        for earlier, later in itertools.pairwise(seen)
        for key, value in earlier.items()
        if key[0].endswith(("_total", "_count", "_sum", "_bucket")) and later[key] < value
    ]
    assert not falling


@pytest.mark.slow
def test_scoring_without_generating_is_no_first_token(served: LiveServer) -> None:
    before = values(served)
    reply = served.request(COMPLETIONS, {"prompt": [5] * 8, "max_tokens": 0, "echo": True, "logprobs": 1})
    assert reply.status == 200
    after = values(served)
    for name in ("engram_time_to_first_token_seconds_count", "engram_request_generation_tokens_count"):
        assert total(after, name) == total(before, name)


@pytest.mark.slow
def test_one_request_with_two_choices_is_one_first_token_and_two_sequences(served: LiveServer) -> None:
    before = values(served)
    served.request(COMPLETIONS, {"prompt": [5] * 8, "max_tokens": 4, "n": 2, "ignore_eos": True})
    assert served.settled()
    after = values(served)
    expected = {"time_to_first_token_seconds_count": 1, "request_generation_tokens_count": 2}
    expected |= {
        "request_params_n_sum": 2,
        "request_max_num_generation_tokens_sum": 4,
        "request_params_max_tokens_sum": 4,
    }
    expected |= {"request_prefill_kv_computed_tokens_sum": 8, "request_time_per_output_token_seconds_count": 2}
    for name, count in expected.items():
        assert total(after, f"engram_{name}") - total(before, f"engram_{name}") == count, name


@pytest.mark.slow
def test_routes_stand_for_their_paths_and_the_unknown_for_all_others(served: LiveServer) -> None:
    before = values(served)
    for path in ("/v1/models", "/nowhere", "/nowhere/else", "/health", "/metrics"):
        served.request(path)
    after = values(served)
    handlers = {dict(labels)["handler"] for (name, labels) in after if name == "engram_http_requests_total"}
    assert {"/v1/models", "other"} <= handlers and not handlers & {"/nowhere", "/health", "/metrics"}
    count = {"handler": "other", "status": "404", "method": "GET"}
    assert (
        total(after, "engram_http_requests_total", **count) - total(before, "engram_http_requests_total", **count) == 2
    )


@pytest.mark.slow
def test_a_live_server_exports_every_series_that_needs_no_gpu_and_no_hot_list(served: LiveServer) -> None:
    served.request(COMPLETIONS, {"prompt": [5] * 8, "max_tokens": 2})
    families = text_string_to_metric_families(served.request("/metrics").body.decode())
    names = {family.name for family in families}
    absent = {series.name for series in ALL if series.name.removesuffix("_total") not in names} - {
        "engram_iteration_tokens_total"
    }
    assert absent == {s.name for s in ALL if "GPU" in s.needs or "hot list" in s.needs}


@pytest.mark.slow
def test_a_gateway_finds_vllms_names_whatever_format_it_accepts(served: LiveServer) -> None:
    for accept in ("", "text/plain", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3"):
        exported = served.request("/metrics", headers={"Accept": accept}).body.decode()
        assert "\nvllm:num_requests_running{" in exported
