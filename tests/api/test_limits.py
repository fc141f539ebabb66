"""Bounds: the queue in requests and tokens, a key's share, time for a request's head, body and answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.auth import Caller
from server.api.limits import Admission
from server.api.metrics import RequestMetrics
from server.errors import QueueFull, RequestError
from server.settings import Settings
from tests.api.live import LiveServer, Reply

COMPLETIONS = "/v1/completions"
ALICE, BOB = Caller("alice", b"a"), Caller("bob", b"b")


def admission(**flags: Any) -> Admission:
    return Admission(
        Settings(**{"max_num_seqs": 2, "max_waiting": 2, "max_waiting_tokens": 100, **flags}), RequestMetrics()
    )


def test_more_prompts_than_can_run_and_wait_are_refused() -> None:
    queue = admission()
    with queue.admitted(ALICE, [1, 1]), queue.admitted(BOB, [1]):
        with pytest.raises(QueueFull, match="--max-waiting"), queue.admitted(BOB, [1, 1]):
            pass
        with queue.admitted(BOB, [1]), pytest.raises(QueueFull):
            queue.check(ALICE)
    queue.check(ALICE)
    with pytest.raises(RequestError, match="5 prompts and 4 can run and wait"), queue.admitted(ALICE, [1] * 5):
        pass


def test_tokens_wait_until_their_prompt_has_started() -> None:
    queue = admission()
    with queue.admitted(ALICE, [60]) as first:
        with pytest.raises(QueueFull, match="60 prompt tokens are waiting"), queue.admitted(BOB, [50]):
            pass
        first.started(60)
        with queue.admitted(BOB, [100]):
            assert queue.waiting_tokens == 100
    with pytest.raises(RequestError, match="101 tokens together"), queue.admitted(ALICE, [51, 50]):
        pass


def test_a_key_has_its_own_bound() -> None:
    queue = admission(max_concurrency_per_key=1)
    with queue.admitted(ALICE, [1]):
        with pytest.raises(QueueFull, match="--max-concurrency-per-key"):
            queue.check(ALICE)
        queue.check(BOB)
    queue.check(ALICE)


@given(
    st.lists(st.tuples(st.sampled_from([ALICE, BOB]), st.lists(st.integers(1, 40), min_size=1, max_size=4)), max_size=8)
)
def test_whatever_was_asked_all_counts_return_to_zero(asked: list[tuple[Caller, list[int]]]) -> None:
    queue = admission(max_concurrency_per_key=2)
    held = []
    for caller, prompts in asked:
        block = queue.admitted(caller, prompts)
        try:
            ticket = block.__enter__()
        except QueueFull:
            continue
        except RequestError:
            continue
        held.append(block)
        assert queue.open <= 4 and queue.waiting_tokens <= 100
        ticket.started(prompts[0])
    for block in held:
        block.__exit__(None, None, None)
    assert (queue.open, queue.waiting_tokens, dict(queue.of_caller)) == (0, 0, {})


# ── over HTTP ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def narrow(tiny_llama_folder: Path) -> Iterator[LiveServer]:
    """Two requests per key, little time for bodies and answers."""
    flags = {"model": str(tiny_llama_folder), "dtype": "float32", "kv_bytes": 64 << 20, "max_model_len": 2048}
    flags |= {"api_key": ["k1", "k2"], "max_concurrency_per_key": 2, "max_waiting_tokens": 1000}
    server = LiveServer({**flags, "body_timeout": 0.5, "request_timeout": 1.0, "max_body_bytes": 1 << 20})
    yield server
    assert server.stop() == 0


def ask(server: LiveServer, key: str = "k1", **fields: Any) -> Reply:
    body = {"prompt": "a", "max_tokens": 1, **fields}
    return server.request(COMPLETIONS, body, headers={"Authorization": f"Bearer {key}"})


def test_one_keys_crowd_leaves_room_for_another_key(narrow: LiveServer) -> None:
    replies: list[Reply] = []
    fields = {"max_tokens": 300, "ignore_eos": True}
    threads = [threading.Thread(target=lambda: replies.append(ask(narrow, **fields))) for _ in range(5)]
    for thread in threads:
        thread.start()
    other = ask(narrow, "k2")
    for thread in threads:
        thread.join()
    refused = [reply for reply in replies if reply.status == 429]
    assert other.status == 200 and len(refused) == 3
    assert all(
        reply.headers["retry-after"] and "concurrency-per-key" in reply.json["error"]["message"] for reply in refused
    )


def test_an_answer_that_takes_too_long_ends_with_504(narrow: LiveServer) -> None:
    for stream in (False, True):
        reply = ask(narrow, max_tokens=2040, ignore_eos=True, n=8, stream=stream)
        if stream:
            events = reply.body.decode().split("\n\n")
            assert reply.status == 200 and events[-2] == "data: [DONE]"
            error = json.loads(events[-3].removeprefix("data: "))["error"]
        else:
            assert reply.status == 504
            error = reply.json["error"]
        assert error["code"] == 504 and "--request-timeout" in error["message"]
    assert ask(narrow).status == 200


def test_more_tokens_than_may_wait_are_refused(narrow: LiveServer) -> None:
    reply = ask(narrow, prompt=[[1] * 600, [1] * 600])
    assert reply.status == 400 and "--max-waiting-tokens" in reply.json["error"]["message"]


def slowly(server: LiveServer, *parts: bytes, pause: float) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        return connection.recv(65536)


def test_a_body_that_does_not_arrive_is_408(narrow: LiveServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Api-Key: k1\r\nContent-Length: 100\r\n\r\n"
    answer = slowly(narrow, head, b'{"prompt": ', pause=0.3)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"--body-timeout" in answer


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"X-%d: y\r\n" % i for i in range(1000)),
        b"X-Endless: " + b"y" * 200_000,
    ],
    ids=["many headers", "one endless header"],
)
def test_a_head_above_the_limit_is_431(narrow: LiveServer, head: bytes) -> None:
    answer = slowly(narrow, b"GET /health HTTP/1.1\r\nHost: a\r\n" + head, pause=0.1)
    assert answer.startswith(b"HTTP/1.1 431 ") and b'"code": 431' in answer


def test_no_valid_http_is_answered_in_json(narrow: LiveServer) -> None:
    assert b'"type": "BadRequestError"' in slowly(narrow, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", pause=0)


def test_chunked_bodies_are_counted_too(narrow: LiveServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Api-Key: k1\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"40000\r\n" + b" " * 0x40000 + b"\r\n"
    assert slowly(narrow, head + chunk * 5 + b"0\r\n\r\n", pause=0.1).startswith(b"HTTP/1.1 413 ")


def test_nonsense_behind_a_request_ends_that_request_quietly(tiny_llama_folder: Path, tmp_path: Path) -> None:
    flags = {"model": str(tiny_llama_folder), "kv_bytes": 16 << 20, "max_model_len": 256, "in_process": True}
    server = LiveServer(flags, log=tmp_path / "log")
    body = b'{"prompt": "a", "max_tokens": 100, "ignore_eos": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for _ in range(20):
        assert slowly(server, head % len(body) + body + b"\x00nonsense\r\n\r\n", pause=0) == b""
        server.raw(head % 5 + b"wrong")  # and says at once that it will send no more
        server.raw((head % len(body) + body) * 2 + b"\x00nonsense\r\n\r\n")
        server.raw(head % 99_999_999 + (head % len(body) + body) * 2)
    assert server.settled()
    assert server.stop() == 0
    assert "unexpected" not in (tmp_path / "log").read_text()
