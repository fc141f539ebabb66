"""What operators rely on: probes, metrics that count, request ids, drained shutdowns, and clients that leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from server.api import replies
from server.api.serve import bind
from server.errors import SettingsError
from server.metrics import ALL
from tests.api.live import LiveServer
from tests.live import engine_of

COMPLETIONS = "/v1/completions"


def test_probes_and_version(live: LiveServer) -> None:
    assert live.request("/health").json == {"status": "ok"}
    assert live.request("/ready").json == {"status": "ready"}
    assert set(live.request("/version").json) == {"version"}


def test_models_can_be_listed_and_named(live: LiveServer, model: str) -> None:
    listed = replies.Models.model_validate(live.request("/v1/models").json).data
    assert [entry.id for entry in listed] == [model] and listed[0].max_model_len == 256
    assert live.request(f"/v1/models/{model}").json == listed[0].model_dump()


def test_whole_answers_are_what_the_documentation_says(live: LiveServer) -> None:
    fields: dict[str, Any] = {"max_tokens": 2, "return_token_ids": True}
    completion = live.request(COMPLETIONS, {**fields, "prompt": "a", "logprobs": 1, "echo": True})
    replies.Completion.model_validate(completion.json)
    messages = [{"role": "user", "content": "hi"}]
    chat = live.request("/v1/chat/completions", {**fields, "messages": messages, "logprobs": True, "top_logprobs": 1})
    replies.ChatCompletion.model_validate(chat.json)


def test_the_documentation_names_every_route_and_no_422(live: LiveServer) -> None:
    document = live.request("/openapi.json").json
    assert {COMPLETIONS, "/v1/chat/completions", "/v1/models", "/metrics", "/ready"} <= set(document["paths"])
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all("422" not in operation["responses"] for operation in operations)
    assert live.request("/docs").status == 200


def test_text_and_tokens_convert_both_ways(live: LiveServer, smollm2: Any) -> None:
    text = "Tokens 안녕 12345 <|im_end|>"
    reply = live.request("/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert reply["tokens"] == smollm2.tokenizer.encode(text) and reply["count"] == len(reply["tokens"])
    assert reply["max_model_len"] == 256 and len(reply["token_strs"]) == reply["count"]
    assert live.request("/detokenize", {"tokens": reply["tokens"]}).json == {"prompt": text}
    assert live.request("/detokenize", {"tokens": []}).json == {"prompt": ""}
    assert live.request("/detokenize", {"tokens": [10**6]}).status == 400
    assert live.request("/tokenize", {}).status == 400
    assert live.request("/tokenizer_info").json["eos_token"] == "<|im_end|>"


def test_tokenized_conversations_are_what_chat_computes(live: LiveServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = live.request("/tokenize", {"messages": messages}).json["tokens"]
    chat = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    assert live.request("/v1/chat/completions", chat).json["prompt_token_ids"] == tokens


def test_a_request_id_goes_in_and_out(live: LiveServer) -> None:
    reply = live.request(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, headers={"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1" and reply.json["id"] == "cmpl-mine-1"
    made = [live.request("/health").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    hostile = live.request("/health", headers={"X-Request-Id": "a b" * 100}).headers["x-request-id"]
    assert " " not in hostile
    assert live.request("/nowhere", headers={"X-Request-Id": "lost"}).headers["x-request-id"] == "lost"


def test_two_requests_may_carry_the_same_id(live: LiveServer) -> None:
    statuses: list[int] = []

    def ask() -> None:
        fields = {"prompt": "a", "max_tokens": 30}
        statuses.append(live.request(COMPLETIONS, fields, headers={"X-Request-Id": "twin"}).status)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 4


def test_every_series_is_exported_and_counts(live: LiveServer, client: openai.OpenAI, model: str) -> None:
    names = {"engram_prompt_tokens_total": 9, "engram_generation_tokens_total": 2 * 7}
    names |= {"engram_time_to_first_token_seconds_count": 1, "engram_request_queue_time_seconds_count": 1}
    names |= {"engram_request_prefill_time_seconds_count": 1, "engram_e2e_request_latency_seconds_count": 2}
    names |= {"engram_inter_token_latency_seconds_count": 2 * 6}
    before = {name: live.metric(name) for name in names}
    ended = live.metric("engram_request_success_total", finished_reason="length")
    extra = {"ignore_eos": True}
    client.completions.create(model=model, prompt=[7] * 9, max_tokens=7, n=2, extra_body=extra)
    assert {name: live.metric(name) - value for name, value in before.items()} == names
    assert live.metric("engram_request_success_total", finished_reason="length") == ended + 2
    exported = live.request("/metrics").body.decode()
    assert all(series.name.removesuffix("_total") in exported for series in ALL if not series.needs)
    assert live.metric("process_resident_memory_bytes") > 0


def test_prefix_hits_are_counted_in_tokens(live: LiveServer) -> None:
    prompt = [11, 13] * 50
    live.request(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    queries, hits = (live.metric(f"engram_prefix_cache_{kind}_total") for kind in ("queries", "hits"))
    reply = live.request(COMPLETIONS, {"prompt": prompt, "max_tokens": 1}).json
    cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == 96  # whole blocks of 32
    assert live.metric("engram_prefix_cache_queries_total") == queries + 100
    assert live.metric("engram_prefix_cache_hits_total") == hits + cached


# ── clients that leave ──────────────────────────────────────────────────────────────────────────────────────────────


def leave(live: LiveServer, fields: dict[str, Any], *, after: int) -> None:
    """Asks, reads `after` bytes of the answer, and closes the connection."""
    body = json.dumps({"prompt": "a", "max_tokens": 240, "ignore_eos": True, **fields}).encode()
    lines = (
        f"POST {COMPLETIONS} HTTP/1.1",
        "Host: a",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    head = "\r\n".join(lines) + "\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        received = 0
        while received < after:
            received += len(connection.recv(4096))
        if not after:
            time.sleep(0.1)


@pytest.mark.parametrize(
    "fields, after",
    [
        ({"stream": True}, 1000),
        ({"stream": True}, 0),
        ({"stream": False}, 0),
        ({"stream": True, "n": 4, "prompt": ["a", "b", "c"]}, 1000),
        ({"stream": False, "n": 4, "prompt": ["a", "b", "c"]}, 0),
    ],
    ids=["streaming", "before the first chunk", "unstreamed", "many choices", "many unstreamed"],
)
def test_a_client_that_leaves_frees_what_it_held(live: LiveServer, fields: dict[str, Any], after: int) -> None:
    aborts = live.metric("engram_request_success_total", finished_reason="abort")
    choices = fields.get("n", 1) * len(fields.get("prompt", "a"))
    threads = [threading.Thread(target=leave, args=(live, fields), kwargs={"after": after}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live.settled(5)
    assert live.metric("engram_request_success_total", finished_reason="abort") == aborts + 4 * choices
    assert live.request(COMPLETIONS, {"prompt": "a", "max_tokens": 2}).status == 200


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def own(tiny_llama_folder: Path, request: pytest.FixtureRequest) -> Any:
    """A server of the test's own, to be stopped or broken."""
    flags = {"model": str(tiny_llama_folder), "dtype": "float32", "kv_bytes": 16 << 20, "max_model_len": 2048}
    server = LiveServer({**flags, **getattr(request, "param", {})})
    yield server
    server.stop()


def stream(server: LiveServer, max_tokens: int, into: list[Any]) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
        model = client.models.list().data[0].id
        chunks = client.completions.create(
            model=model, prompt="a", max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
        )
        for chunk in chunks:
            into.append(chunk.choices[0].finish_reason)


def wait_until_running(server: LiveServer) -> None:
    deadline = time.monotonic() + 20
    while server.metric("engram_num_requests_running") == 0:
        assert time.monotonic() < deadline, "nothing runs"


def test_sigterm_lets_running_answers_finish_and_takes_no_new_ones(own: LiveServer) -> None:
    reasons: list[Any] = []
    thread = threading.Thread(target=stream, args=(own, 1000, reasons))
    thread.start()
    wait_until_running(own)
    own.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 5
    while own.request("/ready").status != 503:
        assert time.monotonic() < deadline, "still ready after SIGTERM"
    assert own.request("/health").status == 200
    refused = own.request(COMPLETIONS, {"prompt": "a"})
    assert refused.status == 503 and refused.json["error"]["type"] == "ServiceUnavailableError"
    thread.join(60)
    assert reasons[-1] == "length" and len(reasons) > 500
    assert own.stop() == 0


@pytest.mark.parametrize("own", [{"drain_seconds": 0.3}], indirect=True)
def test_what_does_not_finish_in_time_is_aborted_cleanly(own: LiveServer) -> None:
    reasons: list[Any] = []
    thread = threading.Thread(target=stream, args=(own, 2000, reasons))
    thread.start()
    wait_until_running(own)
    begun = time.monotonic()
    assert own.stop() == 0
    assert time.monotonic() - begun < 10
    thread.join(10)
    assert reasons[-1] == "abort" and len(reasons) < 1900


def test_a_dead_engine_turns_health_and_requests_503(own: LiveServer) -> None:
    engine = engine_of(own.process.pid)
    failure: list[Any] = []

    def ask() -> None:
        failure.append(own.request(COMPLETIONS, {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until_running(own)
    os.kill(engine, signal.SIGKILL)
    thread.join(20)
    assert failure[0].status == 500 and failure[0].json["error"]["type"] == "InternalServerError"
    assert own.request("/health").status == 503
    assert own.request("/ready").status == 503
    assert own.request(COMPLETIONS, {"prompt": "a"}).status == 503


@pytest.mark.parametrize("own", [{"max_waiting": 2, "max_num_seqs": 1}], indirect=True)
def test_a_full_queue_is_429_at_once_with_a_time_to_come_back(own: LiveServer) -> None:
    results: list[Any] = []

    def ask() -> None:
        results.append(own.request(COMPLETIONS, {"prompt": "a", "max_tokens": 400, "ignore_eos": True}))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [reply for reply in results if reply.status != 200]
    assert 3 <= len(refused) <= 4  # one runs, two wait; the first may not have left the queue yet
    assert all(reply.status == 429 and reply.headers["retry-after"] == "1" for reply in refused)
    assert all(reply.json["error"]["type"] == "RateLimitError" for reply in refused)


def test_a_port_in_use_is_said_before_anything_is_loaded(live: LiveServer) -> None:
    with pytest.raises(SettingsError, match=f"{live.port}.*--port"):
        bind("127.0.0.1", live.port)


def test_the_application_imports_no_torch() -> None:
    code = "import sys, server.api.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
