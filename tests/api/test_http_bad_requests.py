"""What clients do wrong is answered in one line, with OpenAI's error body, the right status, and no harm done."""

from __future__ import annotations

import json
import random
from typing import Any

import openai
import pytest

from server.api.replies import ErrorBody
from tests.api.live import LiveServer, Reply

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def assert_refused(reply: Reply, status: int, *words: str) -> None:
    assert reply.status == status, reply.body
    error = ErrorBody.model_validate(reply.json).error
    assert error.code == status and "\n" not in error.message and "Traceback" not in error.message
    for word in words:
        assert word in error.message, error.message


def json_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"prompt": ""}, ["empty"]),
        ({"prompt": []}, ["empty"]),
        ({"prompt": [[]]}, ["empty"]),
        ({"prompt": ["a", ""]}, ["empty"]),
        ({"prompt": None}, ["prompt"]),
        ({"prompt": 5}, ["prompt"]),
        ({"prompt": [1, "a"]}, ["prompt"]),
        ({"prompt": [-1]}, ["out of vocabulary"]),
        ({"prompt": [999_999]}, ["out of vocabulary", "999999"]),
        ({"prompt": [1.5]}, ["prompt"]),
        ({"prompt": "word " * 300}, ["tokens", "256", "--max-model-len"]),
        ({"prompt": "x" * 900_000}, ["at least", "256", "--max-model-len"]),
        ({"prompt": "a", "max_tokens": -1}, ["max_tokens"]),
        ({"prompt": "a", "max_tokens": "5"}, ["max_tokens"]),
        ({"prompt": "a", "max_tokens": 1000}, ["1000", "256", "--max-model-len"]),
        ({"prompt": "a", "max_tokens": 10**30}, ["max_tokens"]),
        ({"prompt": "a", "min_tokens": 20}, ["min_tokens"]),
        ({"prompt": "a", "logprobs": 21}, ["21", "20", "--max-logprobs"]),
        ({"prompt": "a", "logprobs": True}, ["logprobs"]),
        ({"prompt": "a", "logprobs": -1}, ["logprobs"]),
        ({"prompt": "a", "temperature": -0.1}, ["temperature"]),
        ({"prompt": "a", "temperature": "hot"}, ["temperature"]),
        ({"prompt": "a", "top_p": 0}, ["top_p"]),
        ({"prompt": "a", "top_p": 1.1}, ["top_p"]),
        ({"prompt": "a", "top_k": -2}, ["top_k"]),
        ({"prompt": "a", "min_p": 2}, ["min_p"]),
        ({"prompt": "a", "presence_penalty": 3}, ["presence_penalty"]),
        ({"prompt": "a", "repetition_penalty": 0}, ["repetition_penalty"]),
        ({"prompt": "a", "n": 0}, ["n"]),
        ({"prompt": "a", "n": 129}, ["n"]),
        ({"prompt": "a", "seed": 1 << 70}, ["seed"]),
        ({"prompt": "a", "stop": ""}, ["stop"]),
        ({"prompt": "a", "stop": [1]}, ["stop"]),
        ({"prompt": "a", "stop_token_ids": [10**7]}, ["out of vocabulary"]),
        ({"prompt": "a", "logit_bias": {"999999": 1}}, ["out of vocabulary"]),
        ({"prompt": "a", "logit_bias": {"Paris": 1}}, ["logit_bias"]),
        ({"prompt": "a", "logit_bias": {"1": 101}}, ["logit_bias"]),
        ({"prompt": "a", "stream": "yes"}, ["stream"]),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, ["stream_options"]),
        ({"prompt": "a", "stream_options": {"include_usage": None}}, ["stream_options"]),
        ({"prompt": "a", "best_of": 2}, ["best_of"]),
        ({"prompt": "a", "suffix": "b"}, ["suffix"]),
        ({"prompt": "a", "prompt_logprobs": 1}, ["prompt_logprobs"]),
        ({"prompt": "a", "prompt_logprobs": -1}, ["prompt_logprobs"]),
        ({"prompt": "a", "truncate_prompt_tokens": 4}, ["truncate_prompt_tokens"]),
        ({"prompt": "a", "guided_json": {}, "guided_regex": "a"}, ["guided_regex"]),
        ({"prompt": "a", "response_format": {"type": "xml"}}, ["response_format"]),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, ["response_format", "schema"]),
        (
            {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            ["response_format"],
        ),
        ({"prompt": "a", "response_format": json_of({"type": "nonsense"})}, ["response_format", "nonsense"]),
        ({"prompt": "a", "response_format": json_of({"not": {}})}, ["response_format", "not"]),
        ({"prompt": "a", "response_format": json_of({"enum": ["x" * 70_000]})}, ["bytes", "65536"]),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, ["structured_outputs.regex"]),
        ({"prompt": "a", "structured_outputs": {"regex": ""}}, ["structured_outputs"]),
        ({"prompt": "a", "structured_outputs": {"choice": []}}, ["structured_outputs"]),
        ({"prompt": "a", "structured_outputs": {"choice": [1]}}, ["structured_outputs"]),
        ({"prompt": "a", "structured_outputs": {"json": "{"}}, ["structured_outputs.json"]),
        ({"prompt": "a", "structured_outputs": {"grammar": "root ::= b"}}, ["structured_outputs.grammar"]),
        ({"prompt": "a", "structured_outputs": {"structural_tag": "{}"}}, ["structural_tag"]),
        ({"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}}, ["regex", "choice", "give one"]),
        (
            {"prompt": "a", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            ["response_format", "structured_outputs.regex", "give one"],
        ),
        ({"prompt": "a", "memory": True}, ["memory"]),
        ({"prompt": "a", "memory": {"enabled": "no"}}, ["memory"]),
        ({"prompt": "a", "cache_salt": ""}, ["cache_salt"]),
        ({}, ["prompt"]),
        ([], ["JSON object"]),
        ("text", ["JSON object"]),
        (None, ["JSON object"]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_wrong_completion_is_refused(live: LiveServer, fields: Any, words: list[str]) -> None:
    assert_refused(live.request(COMPLETIONS, json.dumps(fields).encode()), 400, *words)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"messages": []}, ["messages"]),
        ({"messages": "hi"}, ["messages"]),
        ({"messages": [{"content": "hi"}]}, ["role"]),
        ({"messages": [{"role": 1, "content": "hi"}]}, ["role"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["messages"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, ["image_url", "text"]),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, ["tokens", "256", "--max-model-len"]),
        ({"messages": USER, "top_logprobs": 3}, ["top_logprobs", "logprobs"]),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, ["21", "--max-logprobs"]),
        ({"messages": USER, "logprobs": 2}, ["logprobs"]),
        ({"messages": USER, "max_completion_tokens": 999}, ["max_completion_tokens", "999", "256"]),
        ({"messages": USER, "max_tokens": -5}, ["max_tokens"]),
        ({"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]}, ["tools"]),
        ({"messages": USER, "tool_choice": "required"}, ["tool_choice"]),
        ({"messages": USER, "functions": [{"name": "f"}]}, ["functions"]),
        ({"messages": USER, "chat_template": "{{ 1 }}"}, ["chat_template"]),
        ({"messages": USER, "chat_template_kwargs": {"messages": []}}, ["chat_template_kwargs"]),
        ({"messages": USER, "modalities": ["audio"]}, ["modalities"]),
        ({"messages": USER, "continue_final_message": True, "add_generation_prompt": True}, ["add_generation_prompt"]),
        ({"messages": USER, "stream_options": {}}, ["stream_options"]),
        ({}, ["messages"]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_wrong_chat_is_refused(live: LiveServer, fields: Any, words: list[str]) -> None:
    assert_refused(live.request(CHAT, fields), 400, *words)


def test_streams_are_refused_with_a_status_too(live: LiveServer) -> None:
    for fields in ({"prompt": "a", "logprobs": 30}, {"prompt": ""}, {"prompt": "word " * 300}):
        assert_refused(live.request(COMPLETIONS, {**fields, "stream": True}), 400)


def test_an_unknown_model_is_404(live: LiveServer, client: openai.OpenAI, model: str) -> None:
    assert_refused(live.request(COMPLETIONS, {"model": "gpt-9", "prompt": "a"}), 404, "gpt-9", model)
    assert_refused(live.request(CHAT, {"model": "gpt-9", "messages": USER}), 404, "gpt-9")
    assert_refused(live.request("/tokenize", {"model": "gpt-9", "prompt": "a"}), 404, "gpt-9")
    assert_refused(live.request("/v1/models/gpt-9"), 404, "gpt-9")
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="a")


def test_the_client_raises_its_own_exception_for_a_bad_request(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="--max-logprobs") as caught:
        client.completions.create(model=model, prompt="a", logprobs=99)
    assert caught.value.param == "logprobs" and caught.value.type == "BadRequestError"


def test_unknown_fields_pass_and_are_counted(live: LiveServer) -> None:
    before = live.metric("engram_request_unknown_fields_total")
    reply = live.request(
        COMPLETIONS, {"prompt": "a", "max_tokens": 1, "user": "u", "frobnicate": 1, "min_characters": 2}
    )
    assert reply.status == 200
    assert live.metric("engram_request_unknown_fields_total") == before + 2


def test_empty_values_of_unsupported_fields_pass(live: LiveServer) -> None:
    fields = {"best_of": 1, "suffix": None, "tools": [], "response_format": {"type": "text"}, "prompt_logprobs": None}
    assert live.request(COMPLETIONS, {"prompt": "a", "max_tokens": 1, **fields}).status == 200


NO_JSON = [
    b"",
    b"{",
    b'{"prompt": "a"',
    b'{"prompt": "a"}}',
    b"\xff\xfe",
    b'{"prompt": "\xff"}',
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 100_000 + b"}",
    b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"x": ' + b'{"a":' * 100_000,
    b"null",
    b"\x00" * 100,
]
NO_VALUE = [
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "stop": "\\udfff"}',
    b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "\\ud800", "content": "a"}]}',
]


@pytest.mark.parametrize("body", NO_JSON, ids=lambda body: repr(body[:40]))
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_a_malformed_body_is_refused(live: LiveServer, path: str, body: bytes) -> None:
    assert_refused(live.request(path, body), 400)


@pytest.mark.parametrize("body", NO_VALUE, ids=repr)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_is_no_character_or_number_is_refused(live: LiveServer, path: str, body: bytes) -> None:
    assert_refused(live.request(path, body), 400)


def test_an_unspeakable_model_name_is_quoted_safely(live: LiveServer) -> None:
    assert_refused(live.request(COMPLETIONS, b'{"prompt": "a", "model": "\\ud83d"}'), 404, "ud83d")


def test_a_lone_surrogate_in_a_field_nobody_knows_does_no_harm(live: LiveServer) -> None:
    body = b'{"messages": [{"role": "user", "content": "a", "extra": "\\ud800"}], "x": "\\ud800", "max_tokens": 1}'
    assert live.request(CHAT, body).status in (200, 400)


def test_a_wrong_content_type_is_refused(live: LiveServer) -> None:
    body = json.dumps({"prompt": "a"}).encode()
    for content_type in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data"):
        reply = live.request(COMPLETIONS, body, headers={"Content-Type": content_type})
        assert_refused(reply, 400, "Content-Type: application/json")


def test_a_body_above_the_limit_is_413(live: LiveServer) -> None:
    limit = 1 << 20
    assert_refused(live.request(COMPLETIONS, b"x" * (limit + 1)), 413, str(limit), "--max-body-bytes")
    declared = POST + b"Content-Length: 999999999999\r\n\r\n"
    assert live.raw(declared).startswith(b"HTTP/1.1 413 ")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answer = live.raw(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"--max-body-bytes" in answer


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", COMPLETIONS, 405), ("DELETE", "/v1/models", 405), ("GET", "/nowhere", 404), ("PUT", "/metrics", 405)],
)
def test_wrong_routes_and_methods_have_the_same_error_body(
    live: LiveServer, method: str, path: str, status: int
) -> None:
    assert_refused(live.request(path, method=method), status)


def test_random_bytes_on_the_socket_leave_the_server_well(live: LiveServer) -> None:
    rng = random.Random(0)
    good = POST + b'Content-Length: 32\r\n\r\n{"prompt": "a", "max_tokens": 1}'
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            kind = rng.randrange(3)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randrange(1, 20)]
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
        answer = live.raw(bytes(data))
        assert answer[9:10] in (b"", b"1", b"2", b"4"), (data, answer)
    assert live.request("/health").status == 200
    assert live.settled()
