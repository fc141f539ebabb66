"""Every field of a request, line by line: what it does, that null means its default, and that refusals are refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest

from server.api.schemas import HARMLESS, UNSUPPORTED, ChatRequest, CompletionRequest, SamplingFields
from tests.api.live import LiveServer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
ASKING: dict[str, Any] = {
    "suffix": " end", "use_beam_search": True, "prompt_embeds": ["AAAA"], "truncate_prompt_tokens": 5,
    "allowed_token_ids": [5], "bad_words": ["bad"], "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": [{"name": "f"}], "function_call": "auto", "audio": {"voice": "a"}, "prediction": {"content": "a"},
    "web_search_options": {"a": 1}, "chat_template": "{{ 1 }}", "documents": [{"text": "a"}], "logprob_token_ids": [1],
    "guided_json": {"type": "object"}, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "root ::= a",
    "prompt_logprobs": 0, "best_of": 2, "tool_choice": "required", "modalities": ["audio"], "length_penalty": 0.5,
}  # fmt: skip


def ask(live: LiveServer, path: str = COMPLETIONS, **fields: Any) -> Any:
    start = {"prompt": "The memory"} if path == COMPLETIONS else {"messages": USER}
    reply = live.request(path, {**start, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields})
    assert reply.status == 200, reply.body
    return reply.json


def text_of(live: LiveServer, **fields: Any) -> str:
    return str(ask(live, **fields)["choices"][0]["text"])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_we_know_and_do_not_serve_is_refused_by_name(live: LiveServer, path: str, name: str) -> None:
    start = {"prompt": "a"} if path == COMPLETIONS else {"messages": USER}
    reply = live.request(path, {**start, name: ASKING[name]})
    assert reply.status == 400 and reply.json["error"]["param"] == name and name in reply.json["error"]["message"]


@pytest.mark.parametrize("path, model", [(COMPLETIONS, CompletionRequest), (CHAT, ChatRequest)])
def test_null_is_every_fields_default(live: LiveServer, path: str, model: type[SamplingFields]) -> None:
    """And so is null for what is refused with a value, or has no influence."""
    nothing = dict.fromkeys({*model.model_fields, *UNSUPPORTED, *HARMLESS} - {"prompt", "messages"})
    given = {"temperature": 0, "max_tokens": 8, "seed": 3}
    before = live.metric("engram_request_unknown_fields_total")
    assert ask(live, path, ignore_eos=None)["choices"] == ask(live, path, **{**nothing, **given})["choices"]
    assert live.metric("engram_request_unknown_fields_total") == before


def test_what_clients_send_about_themselves_changes_nothing(live: LiveServer) -> None:
    before = live.metric("engram_request_unknown_fields_total")
    told = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"}
    told |= {"request_id": "r", "session_id": "s", "priority": 3, "parallel_tool_calls": True, "prompt_cache_key": "k"}
    assert text_of(live, **told) == text_of(live)
    assert live.metric("engram_request_unknown_fields_total") == before
    assert text_of(live, vllm_xargs={"a": 1}, reasoning_effort="low") == text_of(live)
    assert live.metric("engram_request_unknown_fields_total") == before + 2


def test_whole_answers_name_what_was_not_asked_for(client: openai.OpenAI, model: str) -> None:
    """vLLM's clients read these attributes without looking whether they are there."""
    completion: Any = client.completions.create(model=model, prompt="a", max_tokens=1)
    choice = completion.choices[0]
    assert choice.token_ids is None and choice.prompt_token_ids is None and choice.prompt_logprobs is None
    chat: Any = client.chat.completions.create(model=model, messages=USER, max_tokens=1)  # type: ignore[arg-type]
    assert chat.prompt_logprobs is None and chat.prompt_token_ids is None and chat.choices[0].token_ids is None


def test_many_equal_greedy_choices_are_equal(live: LiveServer) -> None:
    answer = ask(live, n=5)
    assert [choice["index"] for choice in answer["choices"]] == list(range(5))
    assert len({choice["text"] for choice in answer["choices"]}) == 1


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ignoring_the_end_of_text_goes_on_to_the_limit(live: LiveServer, temperature: float) -> None:
    end = live.request("/tokenize", {"prompt": "<|im_end|>"}).json["tokens"][0]
    fields = {"logit_bias": {str(end): 100}, "max_tokens": 6, "temperature": temperature, "return_token_ids": True}
    (stopped,) = ask(live, **fields, ignore_eos=False)["choices"]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] is None and stopped["text"] == ""
    assert stopped["token_ids"] == [end]
    (ignored,) = ask(live, **fields)["choices"]
    assert ignored["finish_reason"] == "length" and ignored["token_ids"] == [end] * 6
    shown = text_of(live, **fields, skip_special_tokens=False)
    assert ignored["text"] == "" and shown == "<|im_end|>" * 6


def test_a_stop_token_is_shown_only_if_included(live: LiveServer) -> None:
    (free,) = ask(live, return_token_ids=True)["choices"]
    stop = free["token_ids"][3]
    first = free["token_ids"].index(stop)
    (hidden,) = ask(live, stop_token_ids=[stop], return_token_ids=True)["choices"]
    (shown,) = ask(live, stop_token_ids=[stop], return_token_ids=True, include_stop_str_in_output=True)["choices"]
    assert hidden["finish_reason"] == shown["finish_reason"] == "stop" and hidden["stop_reason"] == stop
    assert hidden["token_ids"] == shown["token_ids"] == free["token_ids"][: first + 1]
    assert free["text"].startswith(hidden["text"]) and len(shown["text"]) > len(hidden["text"])


@pytest.mark.parametrize("bias", [100, -100])
def test_a_bias_makes_a_token_certain_or_impossible(live: LiveServer, bias: int) -> None:
    (free,) = ask(live, return_token_ids=True)["choices"]
    token = free["token_ids"][0]
    (biased,) = ask(live, logit_bias={str(token): bias}, return_token_ids=True)["choices"]
    assert (biased["token_ids"] == [token] * 8) if bias > 0 else (token not in biased["token_ids"])


def test_penalties_change_what_would_be_repeated(live: LiveServer) -> None:
    """A bias makes one token repeat; each penalty alone drives it out, and a repetition penalty below 1 keeps it."""
    token = live.request("/tokenize", {"prompt": " Paris"}).json["tokens"][0]

    def repeated(**fields: Any) -> int:
        bias = {"logit_bias": {str(token): 16.0}, "max_tokens": 12, "return_token_ids": True, **fields}
        return list(ask(live, **bias)["choices"][0]["token_ids"]).count(token)

    free = repeated()
    assert free > 6
    assert repeated(frequency_penalty=2.0) < free
    assert repeated(repetition_penalty=5.0) < free
    assert repeated(presence_penalty=2.0) <= free
    assert repeated(presence_penalty=-2.0) >= free


def test_logprobs_up_to_the_servers_limit(live: LiveServer) -> None:
    (choice,) = ask(live, logprobs=20, max_tokens=2)["choices"]
    assert all(20 <= len(top) <= 21 for top in choice["logprobs"]["top_logprobs"])
    for top in choice["logprobs"]["top_logprobs"]:
        assert list(top.values()) == sorted(top.values(), reverse=True) and sum(map(math.exp, top.values())) < 1 + 1e-5


def test_an_echo_without_an_answer_is_the_prompt(live: LiveServer) -> None:
    for prompts in (["one", "two and"], [[5, 6, 7], [8]]):
        answer = ask(live, prompt=prompts, echo=True, max_tokens=0, n=2)
        texts = [choice["text"] for choice in answer["choices"]]
        spelt = [
            p if isinstance(p, str) else live.request("/detokenize", {"tokens": p}).json["prompt"] for p in prompts
        ]
        assert texts == [text for text in spelt for _ in range(2)]
        assert answer["usage"]["completion_tokens"] == 0
    assert text_of(live, max_tokens=0) == ""


def test_a_mixed_list_of_prompts_is_no_prompt(live: LiveServer) -> None:
    for prompt in (["a", [1]], [1, [2]], [["a"]], [[1], "a"]):
        assert live.request(COMPLETIONS, {"prompt": prompt}).status == 400


@pytest.mark.parametrize("fields", [{}, {"prompt": None}, {"prompt": []}, {"prompt_embeds": []}], ids=str)
def test_no_prompt_is_said_in_vllms_words(live: LiveServer, fields: dict[str, Any]) -> None:
    reply = live.request(COMPLETIONS, fields)
    assert reply.status == 400
    assert "Either prompt or prompt_embeds must be provided and non-empty." in reply.json["error"]["message"]


def test_every_wrong_bias_is_named(live: LiveServer) -> None:
    reply = live.request(CHAT, {"messages": USER, "logit_bias": {"bad1": 50.0, "7": 1, "bad2": 20.0}})
    assert reply.status == 400 and "bad1" in reply.json["error"]["message"] and "bad2" in reply.json["error"]["message"]
    vocabulary = live.request("/tokenizer_info").json["vocab_size"]
    for fields in ({"logit_bias": {str(vocabulary + 1): 1.0}}, {"stop_token_ids": [vocabulary + 1]}):
        message = live.request(CHAT, {"messages": USER, **fields}).json["error"]["message"]
        assert str(vocabulary + 1) in message and str(vocabulary) in message.replace(str(vocabulary + 1), "")


def test_a_seed_beyond_64_bits_is_refused_by_its_bound(live: LiveServer) -> None:
    for seed, bound in ((1 << 63, "less_than_equal"), (-(1 << 63) - 1, "greater_than_equal")):
        reply = live.request(CHAT, {"messages": USER, "seed": seed})
        assert reply.status == 400 and bound in reply.json["error"]["message"]
    for seed in ((1 << 63) - 1, -(1 << 63)):
        assert ask(live, seed=seed, temperature=1)["choices"][0]["text"] == text_of(live, seed=seed, temperature=1)


def test_running_usage_begins_at_nothing_and_grows_with_every_chunk(live: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"messages": USER, "max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": options}
    body = live.request(CHAT, fields).body.decode()
    chunks = [json.loads(line[6:]) for line in body.split("\n\n") if line.startswith("data: {")]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 4, 5, 5]


def test_conversations_are_tokenised_with_tools_and_continuations(live: LiveServer, smollm2: Any) -> None:
    from server.models.chat import render

    talk = [*USER, {"role": "assistant", "content": "Sure,"}]
    ids = live.request("/tokenize", {"messages": talk, "add_generation_prompt": False, "continue_final_message": True})
    assert smollm2.tokenizer.decode(ids.json["tokens"], skip_special_tokens=False).endswith("Sure,")
    both = {"messages": talk, "add_generation_prompt": True, "continue_final_message": True}
    assert live.request("/tokenize", both).status == 400
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    expected = render(smollm2.chat_template, USER, tools=tools, special_tokens=smollm2.special_tokens)
    told = live.request("/tokenize", {"messages": USER, "tools": tools}).json
    assert told["tokens"] == smollm2.tokenizer.encode(expected) and told["token_strs"] is None


def test_every_route_documents_every_status_it_can_answer(live: LiveServer) -> None:
    paths = live.request("/openapi.json").json["paths"]
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        assert {"200", "400", "404", "413", "429", "500", "503"} <= set(paths[path]["post"]["responses"])
    for path, operations in paths.items():
        for operation in operations.values():
            responses = operation["responses"]
            assert any(status in responses for status in ("200", "201", "202", "204")), path
            for status, response in responses.items():
                if status in ("200", "201", "202") or not response.get("content"):
                    continue
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (path, status)
