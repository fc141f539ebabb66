"""What clients get, as models for the API's own documentation, and the responses that carry it.

The hot paths build plain dictionaries; a test holds that those are what these models say.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from server.api.sse import compact


class JSONReply(Response):
    """JSON of a dictionary that is known to be plain."""

    media_type = "application/json"

    def __init__(self, value: Any, status_code: int = 200) -> None:
        super().__init__(compact(value).encode(), status_code)


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(Reply):
    error: ErrorDetail


class CachedTokens(Reply):
    cached_tokens: int


class Timings(Reply):
    """Milliseconds; `rows` the memories' rows that its tokens addressed, `hits` those no table was read for."""

    queue_ms: float | None
    prefill_ms: float | None
    ttft_ms: float | None
    inter_token_ms: float | None
    total_ms: float
    stall_ms: float
    rows: int
    hits: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    timings: Timings | None = None


class NGram(Reply):
    text: str
    token_ids: list[int]


class GateEntry(Reply):
    """`gate`: mean over the layer's branches, 0 to 1. `ngram`: the longest one that ends at the token."""

    memory: str
    layer: int
    gate: float
    ngram: NGram


class TraceEntry(Reply):
    position: int
    token_id: int
    token: str
    memory: list[GateEntry]


class MemoryTrace(Reply):
    prompt: list[TraceEntry]
    tokens: list[TraceEntry]


class RedirectedPlaces(Reply):
    """Where a redirect took effect: positions among the prompt's tokens, from 0."""

    prompt: int
    source: str = Field(alias="from")
    target: str = Field(alias="to")
    positions: list[int]


class MemoryReport(Reply):
    redirects: list[RedirectedPlaces]


class CompletionLogprobLists(Reply):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


FinishReason = Literal["stop", "length", "abort"]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobLists | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: None = None
    memory_trace: MemoryTrace | None = None


class Completion(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    memory: MemoryReport | None = None


class ChatToken(Reply):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenWithAlternatives(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(Reply):
    content: list[ChatTokenWithAlternatives]


class AssistantMessage(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    memory_trace: MemoryTrace | None = None


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: None = None
    memory: MemoryReport | None = None


class Model(Reply):
    """`memory`: the packs that answers under this name read."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    memory: list[str]


class Models(Reply):
    object: Literal["list"]
    data: list[Model]


class Status(Reply):
    status: str


class Readiness(Status):
    """`notes`: what does not work as asked for although everything is served."""

    notes: list[str] = []


class Version(Reply):
    version: str


class Tokens(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Reply):
    prompt: str


class TokenizerInfo(Reply):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_template: str | None


def _failures() -> dict[int | str, dict[str, Any]]:
    said: dict[int | str, str] = {
        400: "The request is wrong; the message says how",
        401: "No API key, or an unknown one",
        404: "This server has no such model",
        408: "The request did not arrive within --body-timeout",
        413: "The body is above --max-body-bytes",
        429: "Too many requests wait; try again after Retry-After seconds",
        500: "The engine failed while computing this request",
        503: "Not ready: draining, or the engine is gone",
        504: "The answer took longer than --request-timeout",
        "default": "Any other failure",
    }
    return {status: {"model": ErrorBody, "description": text} for status, text in said.items()}


ERRORS = _failures()


def streamed_or(model: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """A 200 that is JSON, or with `stream` server-sent events."""
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}
