"""`/v1/chat/completions` over real sockets, with OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from server.models.chat import render
from tests.api.live import LiveServer

MESSAGES: list[Any] = [
    {"role": "system", "content": "you are a helpful assistant"},
    {"role": "user", "content": "what is 1+1?"},
]


def chat(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    known = {"messages": MESSAGES, "max_completion_tokens": 10, "temperature": 0.0, **fields}
    return client.chat.completions.create(model=model, **known)


def prompt_tokens(smollm2: Any, messages: list[Any]) -> int:
    text = render(smollm2.chat_template, messages, special_tokens=smollm2.special_tokens)
    return len(smollm2.tokenizer.encode(text))


def test_a_message_comes_back_from_the_assistant(client: openai.OpenAI, model: str, smollm2: Any) -> None:
    answer = chat(client, model)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content and choice.logprobs is None
    assert answer.usage.prompt_tokens == prompt_tokens(smollm2, MESSAGES)
    assert answer.usage.completion_tokens == 10 and choice.finish_reason == "length"


def test_the_older_name_of_the_limit_works_too(client: openai.OpenAI, model: str) -> None:
    assert chat(client, model, max_completion_tokens=None, max_tokens=3).usage.completion_tokens == 3
    assert chat(client, model, max_completion_tokens=4, max_tokens=3).usage.completion_tokens == 4


def test_without_a_limit_the_answer_may_fill_the_context(client: openai.OpenAI, model: str) -> None:
    answer = chat(client, model, max_completion_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 256 and answer.choices[0].finish_reason == "length"


def test_streamed_equals_unstreamed_and_begins_with_the_role(client: openai.OpenAI, model: str) -> None:
    whole = chat(client, model, max_completion_tokens=40)
    chunks = list(chat(client, model, max_completion_tokens=40, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].choices[0].delta.content


def test_usage_grows_with_every_chunk_when_asked_for(client: openai.OpenAI, model: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in chat(client, model, stream=True, stream_options=options)]
    assert counts[-1] == counts[-2] == 10 and counts[1:-1] == list(range(1, 11))


def test_the_last_chunk_has_the_usage(client: openai.OpenAI, model: str) -> None:
    *chunks, last = chat(client, model, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 10
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("alternatives", [0, 5])
def test_logprobs_give_each_token_its_bytes_and_alternatives(
    client: openai.OpenAI, model: str, alternatives: int
) -> None:
    choice = chat(client, model, logprobs=True, top_logprobs=alternatives).choices[0]
    assert len(choice.logprobs.content) == 10
    assert all(len(token.top_logprobs) == alternatives for token in choice.logprobs.content)
    said = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert said.decode("utf-8", "replace") == choice.message.content
    for token in choice.logprobs.content[:1] if alternatives else []:
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].logprob == token.logprob
    chunks = list(chat(client, model, logprobs=True, top_logprobs=alternatives, stream=True))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == choice.logprobs.content


def test_logprobs_false_means_none(client: openai.OpenAI, model: str) -> None:
    assert chat(client, model, logprobs=False).choices[0].logprobs is None


def test_text_parts_are_joined(client: openai.OpenAI, model: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    joined = [{"role": "user", "content": "one\ntwo"}]
    answers = [chat(client, model, messages=messages) for messages in (parts, joined)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_n_choices_come_in_order(client: openai.OpenAI, model: str) -> None:
    answer = chat(client, model, n=3, temperature=1.0, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    texts = [""] * 3
    roles = 0
    for chunk in chat(client, model, n=3, temperature=1.0, seed=3, stream=True):
        delta = chunk.choices[0].delta
        texts[chunk.choices[0].index] += delta.content
        roles += delta.role == "assistant"
    assert texts == [choice.message.content for choice in answer.choices] and roles == 3


def test_the_final_message_can_be_continued(client: openai.OpenAI, model: str, smollm2: Any) -> None:
    saying = "An apple a day, keeps"
    messages = [*MESSAGES, {"role": "assistant", "content": saying}]
    extra: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    plain = chat(client, model, messages=messages, extra_body=extra)
    assert smollm2.tokenizer.decode(plain.prompt_token_ids).endswith(saying)
    assert saying not in plain.choices[0].message.content
    echoed = chat(client, model, messages=messages, extra_body={**extra, "echo": True})
    assert echoed.choices[0].message.content == saying + plain.choices[0].message.content
    streamed = chat(client, model, messages=messages, stream=True, extra_body={**extra, "echo": True})
    text = "".join(chunk.choices[0].delta.content for chunk in streamed)
    assert text == echoed.choices[0].message.content


def test_token_ids_are_returned_when_asked_for(client: openai.OpenAI, model: str, smollm2: Any) -> None:
    answer = chat(client, model, extra_body={"return_token_ids": True})
    assert len(answer.prompt_token_ids) == prompt_tokens(smollm2, MESSAGES)
    assert smollm2.tokenizer.decode(answer.choices[0].token_ids) == answer.choices[0].message.content
    first, *rest = chat(client, model, stream=True, extra_body={"return_token_ids": True})
    assert first.prompt_token_ids == answer.prompt_token_ids
    assert [i for chunk in rest for i in chunk.choices[0].token_ids] == answer.choices[0].token_ids


def test_a_stop_string_ends_the_message(client: openai.OpenAI, model: str) -> None:
    text = chat(client, model, max_completion_tokens=30).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    answer = chat(client, model, max_completion_tokens=30, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].stop_reason == stop


def test_the_template_runs_in_a_sandbox(live: LiveServer) -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    reply = live.request("/v1/chat/completions", {"messages": [{"role": "user", "content": attack}], "max_tokens": 1})
    assert reply.status == 200  # a message is text, not a template
    own = {"messages": MESSAGES, "chat_template": attack}
    assert live.request("/v1/chat/completions", own).status == 400
