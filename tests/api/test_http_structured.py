"""Structured outputs over real sockets: whole, streamed, several at once, and beside everything else a client asks."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
import pytest

from tests.api.live import LiveServer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]


def chat(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    known = {"messages": MESSAGES, "max_tokens": 120, "temperature": 1.0, "seed": 3, **fields}
    return client.chat.completions.create(model=model, **known)


def test_chats_follow_a_schema_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    answer = chat(client, model, response_format=FORMAT, n=3)
    texts = [choice.message.content for choice in answer.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"} and len(set(texts)) == 3
    streamed = [""] * 3
    for chunk in chat(client, model, response_format=FORMAT, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_the_client_parses_into_its_own_classes(client: openai.OpenAI, model: str) -> None:
    import pydantic

    class Colour(pydantic.BaseModel):
        red: bool
        name: str = pydantic.Field(max_length=5)

    fields: Any = {"messages": MESSAGES, "max_tokens": 60, "temperature": 0.0}
    parsed = client.chat.completions.parse(model=model, response_format=Colour, **fields)
    assert isinstance(parsed.choices[0].message.parsed, Colour)


SHAPES = [
    ({"structured_outputs": {"regex": r"\d{2}-[a-c]"}}, r"\d{2}-[a-c]"),
    ({"structured_outputs": {"choice": ["red wine", "gr\u00fcn"]}}, "red wine|gr\u00fcn"),
    ({"structured_outputs": {"grammar": 'root ::= "x" | "y" "z"'}}, "x|yz"),
    ({"structured_outputs": {"json": {"const": 5}}}, "5"),
    ({"structured_outputs": {"json": '{"const": 5}'}}, "5"),
    ({"structured_outputs": {"json": True, "whitespace_pattern": "[ ]"}}, None),
    ({"structured_outputs": {"json_object": True}}, None),
    ({"response_format": {"type": "json_object"}}, None),
]


@pytest.mark.parametrize("fields, expression", SHAPES, ids=str)
def test_completions_take_every_shape(live: LiveServer, fields: dict[str, Any], expression: str | None) -> None:
    """A random model seldom ends an open object: it is cut, and says so."""
    reply = live.request("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 30, "seed": 1, **fields})
    assert reply.status == 200, reply.body
    for choice in reply.json["choices"]:
        if expression is not None:
            assert re.fullmatch(expression, choice["text"]) and choice["finish_reason"] == "stop"
        elif choice["finish_reason"] == "stop":
            json.loads(choice["text"])
        else:
            assert choice["finish_reason"] == "length"


def test_everything_else_works_beside(live: LiveServer) -> None:
    shape = {"structured_outputs": {"regex": "[ab]{6}"}}
    fields = {"prompt": "a", "max_tokens": 20, "seed": 1, "return_token_ids": True, **shape}
    free = live.request("/v1/completions", {**fields, "logprobs": 2, "echo": True}).json["choices"][0]
    assert re.fullmatch("a[ab]{6}", free["text"]) and len(free["logprobs"]["tokens"]) == len(free["token_ids"]) + 1
    cut = live.request("/v1/completions", {**fields, "max_tokens": 2}).json["choices"][0]
    assert cut["finish_reason"] == "length" and re.fullmatch("[ab]+", cut["text"])
    stopped = live.request("/v1/completions", {**fields, "stop": ["b"]}).json["choices"][0]
    assert "b" not in stopped["text"]
    scored = live.request("/v1/completions", {**fields, "max_tokens": 0, "echo": True, "logprobs": 0})
    assert scored.status == 200 and scored.json["choices"][0]["text"] == "a"


def test_a_stream_is_refused_with_a_status_too(live: LiveServer) -> None:
    fields = {"prompt": "a", "stream": True, "structured_outputs": {"regex": "["}}
    assert live.request("/v1/completions", fields).status == 400
    assert live.settled()
