"""What both generating endpoints share: an answer's head, its usage, its events, and how errors end it.

A whole answer is a stream's chunks joined: the same `choice` renders both, so streamed and unstreamed cannot differ.
"""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, ClassVar

from fastapi import Request

from server.api.auth import caller_of
from server.api.errors import body_of
from server.api.generation import Choice, Delta, Generation, Options
from server.api.logprobs import Spelling
from server.api.prompts import Prompt
from server.api.schemas import SamplingFields, check_extra_fields
from server.api.service import Service
from server.api.sse import DONE, compact, event, quoted
from server.api.timings import Trace, timings_of
from server.errors import EngramError, RequestError
from server.memory.redirects import Places, Redirect, resolve
from server.runtime.messages import SamplingParams

logger = logging.getLogger(__name__)


class Answer(ABC):
    """The answer to one request. Raises RequestError, UnknownModelName or NotReady when made for a wrong one."""

    prefix: ClassVar[str]  # of ids
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, service: Service, request: Request, body: SamplingFields) -> None:
        self.service, self.body = service, body
        service.metrics.unknown_fields += check_extra_fields(body.model_extra)
        self.caller = caller_of(request)
        service.check_open(self.caller)
        model, self.packs = service.model(body.model, body.memory)
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options is only allowed with stream: true", param="stream_options")
        options = body.stream_options
        self.include_usage = (options is not None and bool(options.include_usage)) or bool(body.timings)
        self.running_usage = self.include_usage and bool(options and options.continuous_usage_stats)
        self.arrival: float = request.state.arrival
        self._state = request.state
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{request.state.request_id}",
            "created": int(time.time()),
            "model": model,
        }
        self.spelling = Spelling(service.pieces, as_ids=bool(body.return_tokens_as_token_ids))
        self._full = self.always_full or body.traced
        self._traces: dict[int, Trace] = {}
        self._before: dict[int, str] = {}
        self._after = self._plain_end()

    # ── what an endpoint's answer looks like ───────────────────────────────────────────────────────────────────────

    @abstractmethod
    def choice(self, delta: Delta, *, streamed: bool) -> dict[str, Any]:
        """An element of `choices`."""

    @abstractmethod
    def plain_choice(self, index: int) -> tuple[str, str]:
        """The JSON of a chunk's choice that brings nothing but text, before and after that text."""

    @property
    @abstractmethod
    def always_full(self) -> bool:
        """Whether every chunk has more to say than text."""

    def opening(self, delta: Delta) -> str:
        """Events that come before a choice's first chunk."""
        return ""

    def extra(self, generation: Generation) -> dict[str, Any]:
        """Further fields of a whole answer."""
        return {}

    # ── making it ──────────────────────────────────────────────────────────────────────────────────────────────────

    def generation(self, prompts: list[Prompt], params: list[SamplingParams]) -> Generation:
        body = self.body
        if self.service.settings.log_prompts:
            for prompt in prompts:
                logger.info("prompt: %r", prompt.text)
        redirects = self._redirects(prompts)
        return Generation(
            self.service,
            prompts,
            params,
            n=body.n or 1,
            request_id=uuid.uuid4().hex,  # the client's own id need not be unique
            arrival=self.arrival,
            packs=self.packs,
            caller=self.caller,
            salt=self.caller.prefix_salt(body.cache_salt),
            options=Options(
                stop=body.stops,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special=body.skip_special_tokens is not False,
            ),
            redirects=redirects,
        )

    def _redirects(self, prompts: list[Prompt]) -> list[Places]:
        """Each prompt's places, all redirects together; the answer's head lists them. Raises RequestError."""
        asked = self.body.memory.redirect if self.body.memory is not None else []
        kept = self.service.edits.redirects(self.caller.name, self.packs)
        if not asked and not kept:
            return [()] * len(prompts)
        named = [Redirect(each.source, each.target, each.mode, each.occurrence == "last") for each in asked]
        tokenizer, pieces = self.service.source.tokenizer, self.service.pieces
        pad = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else 0
        resolved = partial(resolve, piece=pieces.__getitem__, encode=tokenizer.encode, pad=pad)
        found = [resolved(named, prompt.token_ids) for prompt in prompts]
        if asked:
            self.head["memory"] = {
                "redirects": [
                    {"prompt": number, "from": each.source, "to": each.target, "positions": [at for at, _ in places]}
                    for number, of_prompt in enumerate(found)
                    for each, places in zip(named, of_prompt, strict=True)
                ]
            }
        for of_prompt, prompt in zip(found, prompts, strict=True):
            of_prompt += unasked(kept, prompt.token_ids, of_prompt, resolved)
        return [tuple(sorted(place for places in of_prompt for place in places)) for of_prompt in found]

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer when all its choices have ended."""
        collected: list[list[Delta]] = [[] for _ in generation.choices]
        async with aclosing(generation.steps()) as steps:
            async for deltas in steps:
                for delta in deltas:
                    collected[delta.choice.index].append(delta)
        self._state.engine_s = generation.engine_s
        choices = [self.choice(_joined(deltas), streamed=False) for deltas in collected]
        return {
            **self.head,
            "object": self.kind,
            "choices": choices,
            "usage": self.usage_of(generation),
            **self.extra(generation),
        }

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Server-sent events, one item per step. What fails after the first becomes an event and ends the stream."""
        begun = False
        try:
            async with aclosing(generation.steps()) as steps:
                async for deltas in steps:
                    text = "".join([self.chunk(delta) for delta in deltas])
                    if generation.finished:
                        text += self._end(generation)
                    if text:
                        self._state.engine_s = generation.engine_s
                        begun = True
                        yield text.encode()
        except EngramError as error:
            if not begun:
                raise
            yield (event(body_of(error)) + DONE).encode()

    def chunk(self, delta: Delta) -> str:
        """The events for what one step brought one choice; none while a character or stop string is unfinished."""
        choice = delta.choice
        if self._full or delta.first is not None or choice.finish_reason is not None:
            opening = self.opening(delta) if delta.first is not None else ""
            return opening + self.full_event([self.choice(delta, streamed=True)], choice)
        if not delta.text:
            return ""
        before = self._before.get(choice.index)
        if before is None:
            before = self._before[choice.index] = self._plain_start(choice.index)
        return before + quoted(delta.text) + self._after

    def full_event(
        self, choices: list[dict[str, Any]], choice: Choice, *, tokens: int | None = None, **more: Any
    ) -> str:
        """An event with everything that belongs to it; usage is the choice's own so far, of `tokens` if given."""
        chunk = {**self.head, "object": self.chunk_kind, "choices": choices, **more}
        if self.running_usage:
            chunk["usage"] = usage(
                len(choice.prompt.token_ids), choice.tokens if tokens is None else tokens, choice.cached_tokens
            )
        elif self.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def traced(self, delta: Delta) -> dict[str, Any]:
        """A choice's further fields if its memories are traced."""
        if not self.body.traced:
            return {}
        trace = self._traces.get(delta.choice.index)
        if trace is None:
            trace = self._traces[delta.choice.index] = Trace(delta.choice, self.spelling)
        return {"memory_trace": trace.part(delta)}

    def usage_of(self, generation: Generation) -> dict[str, Any]:
        whole = usage(generation.prompt_tokens, generation.completion_tokens, generation.cached_tokens)
        return {**whole, "timings": timings_of(generation)} if self.body.timings else whole

    def _plain_start(self, index: int) -> str:
        head = compact({**self.head, "object": self.chunk_kind})
        return f'data: {head[:-1]},"choices":[{self.plain_choice(index)[0]}'

    def _plain_end(self) -> str:
        return self.plain_choice(0)[1] + ('],"usage":null}\n\n' if self.include_usage else "]}\n\n")

    def _end(self, generation: Generation) -> str:
        if not self.include_usage:
            return DONE
        return event({**self.head, "object": self.chunk_kind, "choices": [], "usage": self.usage_of(generation)}) + DONE


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _joined(deltas: list[Delta]) -> Delta:
    return Delta(
        deltas[0].choice,
        "".join(delta.text for delta in deltas),
        tuple(i for delta in deltas for i in delta.token_ids),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        deltas[0].first,
        tuple(entry for delta in deltas for entry in delta.gates),
    )


def unasked(
    kept: list[Redirect],
    prompt: tuple[int, ...],
    asked: list[Places],
    resolved: Callable[[list[Redirect], tuple[int, ...]], list[Places]],
) -> list[Places]:
    """The places of a tenant's kept redirects, where the prompt names them and nothing before claims the place."""
    claimed = {at for places in asked for at, _ in places}
    found = []
    for redirect in kept:
        with suppress(RequestError):  # not in this prompt
            places = resolved([redirect], prompt)[0]
            if claimed.isdisjoint(at for at, _ in places):
                claimed |= {at for at, _ in places}
                found.append(places)
    return found
