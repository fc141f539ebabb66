"""`POST /v1/completions`: prompts in, text out, at once or as server-sent events."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.answers import Answer
from server.api.generation import Delta
from server.api.logprobs import CompletionLogprobs, joined
from server.api.prompts import completion_prompts
from server.api.replies import ERRORS, Completion, JSONReply, streamed_or
from server.api.sampling import answer_length, check_logprobs, sampling_params
from server.api.schemas import CompletionRequest
from server.api.service import Service
from server.api.sse import begun, unless_gone
from server.runtime.messages import SamplingParams

# vLLM's clients read these as attributes, asked for or not.
NOT_ASKED_FOR = {"token_ids": None, "prompt_token_ids": None, "prompt_logprobs": None}


class CompletionAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    body: CompletionRequest

    def __init__(self, service: Service, request: Request, body: CompletionRequest) -> None:
        super().__init__(service, request, body)
        self._logprobs: dict[int, CompletionLogprobs] = {}

    @property
    def always_full(self) -> bool:
        return self.body.logprobs is not None or bool(self.body.return_token_ids) or self.running_usage

    def plain_choice(self, index: int) -> tuple[str, str]:
        return f'{{"index":{index},"text":', ',"logprobs":null,"finish_reason":null,"stop_reason":null}'

    def choice(self, delta: Delta, *, streamed: bool) -> dict[str, Any]:
        choice, body = delta.choice, self.body
        echoed = choice.prompt.text if body.echo and delta.first is not None else ""
        fields: dict[str, Any] = {
            "index": choice.index,
            "text": echoed + delta.text,
            "logprobs": self._logprobs_of(delta) if body.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **self.traced(delta),
        }
        if not streamed:
            fields |= NOT_ASKED_FOR
        if body.return_token_ids:
            fields["token_ids"] = list(delta.token_ids)
            if delta.first is not None:
                fields["prompt_token_ids"] = list(choice.prompt.token_ids)
        return fields

    def _logprobs_of(self, delta: Delta) -> dict[str, Any]:
        choice = delta.choice
        state = self._logprobs.get(choice.index)
        if state is None:
            state = self._logprobs[choice.index] = CompletionLogprobs(self.spelling)
        parts = []
        if self.body.echo and delta.first is not None:
            ids, entries = choice.prompt.token_ids, delta.first.prompt_logprobs or ()
            if not choice.prompt.text.startswith(self.service.pieces.text(ids[:1], skip_special=False)):
                parts.append(state.skip(ids[0]))
                ids, entries = ids[1:], entries[1:]
            parts.append(state.part(ids, entries))
        parts.append(state.part(delta.token_ids, delta.logprobs))
        return joined(parts)


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions", responses={**streamed_or(Completion), **ERRORS})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Completes each prompt, n times. With `stream`: one event per token and choice, then `[DONE]`."""
        answer = CompletionAnswer(service, request, body)
        prompts = await completion_prompts(service, body)
        params = [completion_params(service, body, len(prompt.token_ids)) for prompt in prompts]
        generation = answer.generation(prompts, params)
        if body.stream:
            return await begun(request, answer.events(generation))
        return JSONReply(await unless_gone(request, answer.whole(generation)))

    return router


def completion_params(service: Service, body: CompletionRequest, prompt_tokens: int) -> SamplingParams:
    """An answer length that nobody chose gives way to the context; one that a client chose must fit."""
    asked = body.max_tokens
    if asked is not None and "max_tokens" not in body.model_fields_set:
        asked = min(asked, service.context - prompt_tokens)
    logprobs = check_logprobs(body.logprobs, service.settings.max_logprobs, "logprobs")
    return sampling_params(
        body,
        max_tokens=answer_length(asked, prompt_tokens, service.context),
        logprobs=logprobs,
        prompt_logprobs=bool(body.echo) and logprobs is not None,
        vocab_size=service.vocab_size,
    )
