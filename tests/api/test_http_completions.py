"""`/v1/completions` over real sockets, with OpenAI's own client: the semantics that vLLM's tests assert."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest

from server.models.tokenizer import Tokenizer
from tests.api.live import LiveServer

PROMPT = "The memory of the model"


@pytest.fixture(scope="module")
def tokenizer(smollm2: Any) -> Tokenizer:
    tokenizer: Tokenizer = smollm2.tokenizer  # the tiny model's own
    return tokenizer


def complete(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    known = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0.0, **fields}
    return client.completions.create(model=model, **known)


def test_a_completion_has_text_usage_and_a_reason_to_end(client: openai.OpenAI, model: str) -> None:
    answer = complete(client, model, max_tokens=5)
    assert answer.id.startswith("cmpl-") and answer.model == model
    assert [choice.index for choice in answer.choices] == [0]
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].text
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_sixteen_tokens_are_the_default(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage and answer.usage.completion_tokens == 16


def test_token_ids_answer_as_their_text_does(client: openai.OpenAI, model: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    by_text, by_ids = complete(client, model), complete(client, model, prompt=ids)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_ids.usage.prompt_tokens == len(ids)


def test_a_repeated_prompt_is_served_from_the_cache(client: openai.OpenAI, model: str) -> None:
    prompt = "cached " * 70
    first = complete(client, model, prompt=prompt)
    again = complete(client, model, prompt=prompt)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 64 <= again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens
    assert first.choices[0].text == again.choices[0].text


def test_prompts_come_back_in_order_n_choices_each(client: openai.OpenAI, model: str, tokenizer: Tokenizer) -> None:
    texts = ["one", "two and", "three"]
    alone = [complete(client, model, prompt=text).choices[0].text for text in texts]
    for prompts in (texts, [tokenizer.encode(text) for text in texts]):
        answer = complete(client, model, prompt=prompts, n=2)
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]
        assert answer.usage.completion_tokens == 48


def test_streamed_text_equals_unstreamed_text(client: openai.OpenAI, model: str) -> None:
    """Random weights emit bytes at random: characters split over tokens come often."""
    for prompt in (PROMPT, "안녕", "🇰🇷"):
        whole = complete(client, model, prompt=prompt, max_tokens=40)
        chunks = list(complete(client, model, prompt=prompt, max_tokens=40, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
        assert all(chunk.usage is None for chunk in chunks)
        assert len({chunk.id for chunk in chunks}) == 1


def test_streams_of_many_choices_are_the_unstreamed_ones(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"prompt": ["a", "b"], "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 12}
    whole = complete(client, model, **fields)
    texts = [""] * 4
    ended = 0
    for chunk in complete(client, model, stream=True, **fields):
        assert len(chunk.choices) == 1
        texts[chunk.choices[0].index] += chunk.choices[0].text
        ended += chunk.choices[0].finish_reason is not None
    assert texts == [choice.text for choice in whole.choices]
    assert ended == 4


def test_the_last_chunk_has_the_usage_when_asked_for(client: openai.OpenAI, model: str) -> None:
    *chunks, last = complete(client, model, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == [] and last.usage == complete(client, model).usage.model_copy(
        update={"prompt_tokens_details": last.usage.prompt_tokens_details}
    )


def test_every_chunk_has_the_usage_so_far_when_asked_for(client: openai.OpenAI, model: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, model, stream=True, stream_options=options, extra_body={"ignore_eos": True}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert all(c.usage.total_tokens == c.usage.prompt_tokens + c.usage.completion_tokens for c in chunks)


def test_usage_is_not_sent_unless_included(client: openai.OpenAI, model: str) -> None:
    for options in ({}, {"include_usage": False}, {"include_usage": False, "continuous_usage_stats": True}):
        assert all(c.usage is None for c in complete(client, model, stream=True, stream_options=options))


@pytest.mark.parametrize("alternatives", [0, 1, 5])
def test_logprobs_are_parallel_lists_with_the_chosen_token_in_each(
    client: openai.OpenAI, model: str, alternatives: int
) -> None:
    answer = complete(client, model, logprobs=alternatives, extra_body={"return_tokens_as_token_ids": True})
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 8
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert max(alternatives, 1) <= len(top) <= alternatives + 1
        assert top[token] == logprob == max(top.values())  # greedy
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6  # rounding of 32-bit log-probabilities


def test_no_logprobs_unless_asked_for(client: openai.OpenAI, model: str) -> None:
    assert complete(client, model).choices[0].logprobs is None


def test_streamed_logprobs_joined_are_the_unstreamed_ones(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"logprobs": 2, "echo": True, "max_tokens": 30}
    whole = complete(client, model, **fields).choices[0].logprobs
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, model, stream=True, **fields)]
    for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        assert [value for part in streamed for value in getattr(part, name)] == getattr(whole, name)


def test_offsets_point_into_the_text(client: openai.OpenAI, model: str) -> None:
    choice = complete(client, model, prompt="naïve 안녕", logprobs=0, echo=True, max_tokens=20).choices[0]
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset:].startswith(token)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("alternatives", [0, 1])
def test_echo_scores_the_prompt(
    client: openai.OpenAI, model: str, tokenizer: Tokenizer, as_ids: bool, alternatives: int
) -> None:
    ids = tokenizer.encode(PROMPT)
    answer = complete(client, model, prompt=ids if as_ids else PROMPT, echo=True, logprobs=alternatives, max_tokens=5)
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT) and len(choice.text) > len(PROMPT)
    assert len(choice.logprobs.tokens) == len(ids) + 5
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    for logprob, top in zip(choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], strict=True):
        assert logprob in top.values() and max(alternatives, 1) <= len(top) <= alternatives + 1


def test_echo_without_generation_scores_only(client: openai.OpenAI, model: str, tokenizer: Tokenizer) -> None:
    answer = complete(client, model, echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == PROMPT and answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.tokens) == len(tokenizer.encode(PROMPT)) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0
    longer = complete(client, model, echo=True, logprobs=1, max_tokens=3)
    scored = answer.choices[0].logprobs.token_logprobs[1:]
    assert longer.choices[0].logprobs.token_logprobs[1 : len(scored) + 1] == scored


def test_echo_alone_repeats_the_prompt(client: openai.OpenAI, model: str) -> None:
    alone = complete(client, model).choices[0].text
    assert complete(client, model, echo=True).choices[0].text == PROMPT + alone
    streamed = complete(client, model, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + alone


def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI, model: str) -> None:
    text = complete(client, model, max_tokens=40).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    expected = text[: text.index(stop)]
    stopped = complete(client, model, max_tokens=40, stop=stop)
    assert stopped.choices[0].text == expected
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].stop_reason == stop
    assert stopped.usage.completion_tokens < 40
    included = complete(client, model, max_tokens=40, stop=[stop], extra_body={"include_stop_str_in_output": True})
    assert included.choices[0].text == expected + stop
    streamed = list(complete(client, model, max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_stopping_one_choice_leaves_the_others_running(client: openai.OpenAI, live: LiveServer, model: str) -> None:
    texts = [c.text for c in complete(client, model, prompt=["a", "b"], max_tokens=30).choices]
    stop = next(texts[0][i : i + 2] for i in range(len(texts[0])) if texts[0][i : i + 2] not in texts[1])
    answer = complete(client, model, prompt=["a", "b"], max_tokens=30, stop=stop)
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert answer.choices[1].text == texts[1]
    assert live.settled()


def test_a_stop_token_ends_the_answer_and_is_not_shown(client: openai.OpenAI, model: str) -> None:
    ids = complete(client, model, extra_body={"return_token_ids": True}).choices[0].token_ids
    stop = ids[4]
    answer = complete(client, model, extra_body={"stop_token_ids": [stop], "return_token_ids": True}).choices[0]
    assert answer.finish_reason == "stop" and answer.stop_reason == stop
    assert answer.token_ids == ids[: ids.index(stop) + 1]
    shown = complete(client, model, extra_body={"stop_token_ids": [stop], "include_stop_str_in_output": True})
    assert shown.choices[0].text.startswith(answer.text) and len(shown.choices[0].text) > len(answer.text)


def test_min_tokens_put_off_every_stop(client: openai.OpenAI, model: str) -> None:
    first = complete(client, model, extra_body={"return_token_ids": True}).choices[0]
    extra = {"stop_token_ids": [first.token_ids[0]], "min_tokens": 4}
    assert complete(client, model, extra_body=extra).usage.completion_tokens >= 4
    assert complete(client, model, stop=first.text[0], extra_body={"min_tokens": 4}).usage.completion_tokens >= 4


def test_token_ids_are_returned_when_asked_for(client: openai.OpenAI, model: str, tokenizer: Tokenizer) -> None:
    extra = {"return_token_ids": True}
    choice = complete(client, model, extra_body=extra).choices[0]
    assert choice.prompt_token_ids == tokenizer.encode(PROMPT) and len(choice.token_ids) == 8
    assert tokenizer.decode(choice.token_ids) == choice.text
    chunks = list(complete(client, model, stream=True, extra_body=extra))
    assert [i for chunk in chunks for i in chunk.choices[0].token_ids] == choice.token_ids
    prompts = [getattr(chunk.choices[0], "prompt_token_ids", None) for chunk in chunks]
    assert prompts == [choice.prompt_token_ids, *[None] * (len(chunks) - 1)]


def test_a_seed_repeats_an_answer(client: openai.OpenAI, model: str) -> None:
    texts = {complete(client, model, temperature=1.0, seed=7).choices[0].text for _ in range(3)}
    others = {complete(client, model, temperature=1.0, seed=seed).choices[0].text for seed in range(3)}
    assert len(texts) == 1 and len(others) == 3
    assert len({c.text for c in complete(client, model, temperature=1.0, seed=7, n=3).choices}) == 3


def test_a_bias_forces_a_token(client: openai.OpenAI, model: str, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode(" Paris")
    answer = complete(client, model, max_tokens=3, logit_bias={str(token): 100})
    assert answer.choices[0].text == " Paris Paris Paris"


def test_top_k_of_one_is_greedy(client: openai.OpenAI, model: str) -> None:
    greedy = complete(client, model).choices[0].text
    assert complete(client, model, temperature=2.0, extra_body={"top_k": 1}).choices[0].text == greedy
    assert complete(client, model, temperature=2.0, extra_body={"min_p": 1.0}).choices[0].text == greedy


def test_a_presence_penalty_forbids_repetition(client: openai.OpenAI, model: str, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode(" Paris")
    biased = {"logit_bias": {str(token): 20}, "max_tokens": 6}
    free = complete(client, model, **biased).choices[0].text
    penalised = complete(client, model, **biased, frequency_penalty=2.0, extra_body={"repetition_penalty": 50.0})
    assert penalised.choices[0].text.count("Paris") < free.count("Paris")


def test_memory_can_be_switched_off_where_there_is_none(client: openai.OpenAI, model: str) -> None:
    plain = complete(client, model).choices[0].text
    for enabled in (True, False):
        assert complete(client, model, extra_body={"memory": {"enabled": enabled}}).choices[0].text == plain


def test_a_salt_keeps_prefixes_apart(client: openai.OpenAI, model: str) -> None:
    prompt = "salted " * 50
    complete(client, model, prompt=prompt, extra_body={"cache_salt": "a"})
    same = complete(client, model, prompt=prompt, extra_body={"cache_salt": "a"})
    other = complete(client, model, prompt=prompt, extra_body={"cache_salt": "b"})
    assert same.usage.prompt_tokens_details.cached_tokens > 0 == other.usage.prompt_tokens_details.cached_tokens


def test_an_answer_may_fill_the_context(client: openai.OpenAI, model: str) -> None:
    prompt = [5] * 250
    answer = client.completions.create(model=model, prompt=prompt, extra_body={"ignore_eos": True})
    assert answer.usage and answer.usage.completion_tokens == 6  # 16 by default, but only 6 fit
    assert answer.choices[0].finish_reason == "length"


def test_more_requests_than_sequences_are_all_answered_alike(live: LiveServer, model: str) -> None:
    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as client:
            calls = [
                client.completions.create(model=model, prompt=f"Number {i % 8}", max_tokens=12, temperature=0)
                for i in range(40)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    texts = asyncio.run(many())
    assert all(texts[i] == texts[i % 8] for i in range(40))
    assert live.settled()


def test_async_streams_run_side_by_side(live: LiveServer, model: str) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.completions.create(model=model, prompt=f"{i}", max_tokens=20, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i % 4) for i in range(16)))

    texts = asyncio.run(many())
    assert all(texts[i] == texts[i % 4] for i in range(16))
