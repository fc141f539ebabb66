"""A server whose model has an Engram memory: with it, without it, traced, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api import replies
from tests.api.live import LiveServer
from tests.memory.conftest import fresh_pack, make_pack, pack_a  # noqa: F401 - fixtures

PROMPT = "The capital of Spain is far away."


@pytest.fixture(scope="module")
def server(tiny_llama_folder: Path, pack_a: Path) -> Iterator[LiveServer]:  # noqa: F811
    flags = {"model": str(tiny_llama_folder), "dtype": "float32", "max_model_len": 256, "kv_bytes": 16 << 20}
    live = LiveServer({**flags, "memory": [f"a={pack_a}"]})
    yield live
    assert live.stop() == 0


def ask(server: LiveServer, **more: Any) -> Any:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    reply = server.request("/v1/completions", {**body, **more})
    assert reply.status == 200, reply.body
    return reply


def events(reply: Any) -> list[Any]:
    import json

    lines = [line.removeprefix("data: ") for line in reply.body.decode().split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_requests_choose_whether_to_remember(server: LiveServer) -> None:
    on, explicitly, off = (
        ask(server, **more).json["choices"][0]["text"]
        for more in ({}, {"memory": {"enabled": True}}, {"memory": {"enabled": False}})
    )
    assert on == explicitly != off
    models = server.request("/v1/models").json["data"]
    assert [model["memory"] for model in models] == [["a"], []]  # the second name goes without, always
    assert ask(server, model=models[1]["id"]).json["choices"][0]["text"] == off


def test_a_trace_tells_every_token_its_gates_and_n_grams(server: LiveServer, smollm2: Any) -> None:
    answer = ask(server, memory={"trace": True}).json
    replies.Completion.model_validate(answer)
    (choice,) = answer["choices"]
    trace, prompt, said = choice["memory_trace"], choice["prompt_token_ids"], choice["token_ids"]
    assert [entry["token_id"] for entry in trace["prompt"]] == prompt
    assert [entry["token_id"] for entry in trace["tokens"]] == said[:-1]  # the last one is never read
    ids = prompt + said
    assert [entry["position"] for entry in trace["prompt"] + trace["tokens"]] == list(range(len(ids) - 1))
    assert "".join(entry["token"] for entry in trace["prompt"]) == PROMPT
    for entry in trace["prompt"] + trace["tokens"]:
        assert [(gate["memory"], gate["layer"]) for gate in entry["memory"]] == [("a", 1), ("a", 3)]
        for gate in entry["memory"]:
            end = entry["position"] + 1
            assert 0 < gate["gate"] < 1 and gate["ngram"]["token_ids"] == ids[max(0, end - 3) : end]
            assert gate["ngram"]["text"] == smollm2.tokenizer.decode(gate["ngram"]["token_ids"])


def test_traces_stream_with_their_tokens(server: LiveServer) -> None:
    whole = ask(server, memory={"trace": True}, n=2).json["choices"]
    parts: list[dict[str, list[Any]]] = [{"prompt": [], "tokens": []} for _ in range(2)]
    for chunk in events(ask(server, memory={"trace": True}, n=2, stream=True)):
        for choice in chunk["choices"]:
            for name, entries in choice["memory_trace"].items():
                parts[choice["index"]][name] += entries
    assert parts == [choice["memory_trace"] for choice in whole]


def test_chats_are_traced_too_and_what_reads_no_memory_has_no_entries(server: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "memory": {"trace": True}}
    answer = server.request("/v1/chat/completions", body).json
    replies.ChatCompletion.model_validate(answer)
    assert answer["choices"][0]["memory_trace"]["prompt"]
    without = ask(server, memory={"trace": True, "enabled": False}).json["choices"][0]
    assert without["memory_trace"] == {"prompt": [], "tokens": []}
    assert "memory_trace" not in ask(server).json["choices"][0]


def test_timings_come_when_asked_for(server: LiveServer, make_pack: Callable[..., Path]) -> None:  # noqa: F811
    answer = ask(server, timings=True, n=2).json
    replies.Completion.model_validate(answer)
    timings, prompt = answer["usage"]["timings"], answer["usage"]["prompt_tokens"]
    assert timings["rows"] >= (prompt + 2 * 5) * 8 * 2 and 0 <= timings["hits"] <= timings["rows"]
    assert timings["queue_ms"] >= 0 and 0 < timings["prefill_ms"] <= timings["ttft_ms"] < timings["total_ms"]
    assert 0 < timings["inter_token_ms"] < timings["total_ms"] and 0 <= timings["stall_ms"] <= timings["total_ms"]
    chunks = events(ask(server, timings=True, stream=True))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["timings"]["rows"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert "timings" not in ask(server).json["usage"]
    bare = ask(server, timings=True, memory={"enabled": False}).json["usage"]["timings"]
    assert (bare["rows"], bare["hits"], bare["stall_ms"]) == (0, 0, 0)


def test_an_answer_that_a_stop_string_ends_has_timings_too(server: LiveServer) -> None:
    text = ask(server, max_tokens=20).json["choices"][0]["text"]
    cut = ask(server, max_tokens=20, stop=[text[3:5]], timings=True).json
    assert cut["choices"][0]["finish_reason"] == "stop" and cut["usage"]["timings"]["rows"] > 0
