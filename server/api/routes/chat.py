"""`POST /v1/chat/completions`: a conversation in, the assistant's message out, at once or as server-sent events."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.answers import Answer
from server.api.generation import Delta, Generation
from server.api.logprobs import chat_entries
from server.api.prompts import chat_prompt
from server.api.replies import ERRORS, ChatCompletion, JSONReply, streamed_or
from server.api.sampling import answer_length, check_logprobs, sampling_params
from server.api.schemas import ChatRequest
from server.api.service import Service
from server.api.sse import begun, unless_gone
from server.errors import RequestError
from server.runtime.messages import SamplingParams


class ChatAnswer(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatRequest

    @property
    def always_full(self) -> bool:
        return bool(self.body.logprobs) or bool(self.body.return_token_ids) or self.running_usage

    def plain_choice(self, index: int) -> tuple[str, str]:
        return f'{{"index":{index},"delta":{{"content":', '},"logprobs":null,"finish_reason":null,"stop_reason":null}'

    def opening(self, delta: Delta) -> str:
        """The role, and the last message if the answer is to begin with it."""
        begin = delta.choice.prompt.text if self.body.echo else ""
        choice = {
            "index": delta.choice.index,
            "delta": {"role": "assistant", "content": begin},
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
        ids = {"prompt_token_ids": list(delta.choice.prompt.token_ids)} if self.body.return_token_ids else {}
        return self.full_event([choice], delta.choice, tokens=0, **ids)

    def choice(self, delta: Delta, *, streamed: bool) -> dict[str, Any]:
        choice = delta.choice
        begin = choice.prompt.text if self.body.echo and not streamed else ""
        message: dict[str, Any] = {"content": begin + delta.text}
        if not streamed:
            message = {"role": "assistant", **message, "refusal": None}
        fields: dict[str, Any] = {
            "index": choice.index,
            "delta" if streamed else "message": message,
            "logprobs": {"content": chat_entries(self.spelling, delta.logprobs)} if self.body.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **self.traced(delta),
        }
        if self.body.return_token_ids:
            fields["token_ids"] = list(delta.token_ids)
        elif not streamed:
            fields["token_ids"] = None
        return fields

    def extra(self, generation: Generation) -> dict[str, Any]:
        ids = list(generation.choices[0].prompt.token_ids) if self.body.return_token_ids else None
        return {"prompt_token_ids": ids, "prompt_logprobs": None}


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generation"])

    @router.post("/v1/chat/completions", responses={**streamed_or(ChatCompletion), **ERRORS})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation, n times. With `stream`: the role, one event per token, then `[DONE]`."""
        answer = ChatAnswer(service, request, body)
        prompt = await chat_prompt(service, body)
        generation = answer.generation([prompt], [chat_params(service, body, len(prompt.token_ids))])
        if body.stream:
            return await begun(request, answer.events(generation))
        return JSONReply(await unless_gone(request, answer.whole(generation)))

    return router


def chat_params(service: Service, body: ChatRequest, prompt_tokens: int) -> SamplingParams:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs is only allowed with logprobs: true", param="top_logprobs")
    alternatives = check_logprobs(body.top_logprobs or 0, service.settings.max_logprobs, "top_logprobs")
    newer = body.max_completion_tokens is not None
    return sampling_params(
        body,
        max_tokens=answer_length(
            body.max_completion_tokens if newer else body.max_tokens,
            prompt_tokens,
            service.context,
            param="max_completion_tokens" if newer else "max_tokens",
        ),
        logprobs=alternatives if body.logprobs else None,
        prompt_logprobs=False,
        vocab_size=service.vocab_size,
    )
