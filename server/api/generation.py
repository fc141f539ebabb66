"""One HTTP request's answers in the making: prompts submitted, tokens turned into text, stop strings, figures.

    prompts ─► Submit per prompt ─► client.generate ─► one list of Deltas per step ─► JSON or SSE (the routes)

Choice i of prompt p is number p · n + i in the answer. Closing `steps()` aborts whatever has not finished.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import cast

from server.api.auth import Caller
from server.api.limits import Ticket
from server.api.prompts import Prompt
from server.api.service import Service
from server.errors import EngramError, NotReady, QueueFull, RequestError, RequestTimeout
from server.memory.redirects import Places
from server.runtime.client import EngineClient
from server.runtime.detokeniser import Detokeniser
from server.runtime.messages import FREE, Cost, FinishReason, Gates, Logprobs, SamplingParams, Submit, TokenOutput

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Options:
    """What concerns the text of an answer, not its tokens."""

    stop: list[str]
    include_stop: bool
    skip_special: bool


@dataclass(slots=True, eq=False)
class Choice:
    """One answer. `stop_reason`: the stop string or stop token id that ended it."""

    index: int
    child: int
    prompt: Prompt
    request_id: str
    detokeniser: Detokeniser
    tokens: int = 0
    cached_tokens: int = 0
    first: float = 0.0  # when its first token and its latest came
    last: float = 0.0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    cost: Cost = FREE
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Delta:
    """What one step brought one choice. `first` is its first output, with what the engine says only once."""

    choice: Choice
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    first: TokenOutput | None
    gates: tuple[Gates, ...] = ()


class Generation:
    """The answers to all prompts of one request, n each. `redirects`: those of each prompt."""

    def __init__(
        self,
        service: Service,
        prompts: list[Prompt],
        params: list[SamplingParams],
        *,
        n: int,
        request_id: str,
        arrival: float,
        packs: tuple[str, ...],
        caller: Caller,
        salt: bytes,
        options: Options,
        redirects: list[Places],
    ) -> None:
        self._client, self._metrics = service.client, service.metrics
        self._admission, self._caller = service.admission, caller
        self._ticket: Ticket | None = None
        self.engine_s = 0.0  # what the engine took for the first token
        self._seconds = service.settings.request_timeout
        self._eos = frozenset(service.source.tokenizer.eos_token_ids)
        self.arrival, self._options = arrival, options
        self._submits: list[Submit] = []
        self._children: list[list[Choice]] = []
        for number, (prompt, own, places) in enumerate(zip(prompts, params, redirects, strict=True)):
            submit = Submit(
                f"{request_id}-{number}", prompt.token_ids, own, packs, salt, n, arrival, places, caller.name
            )
            self._submits.append(submit)
            self._children.append(
                [
                    Choice(
                        number * n + child,
                        child,
                        prompt,
                        submit.request_id,
                        Detokeniser(
                            service.pieces,
                            stop=options.stop,
                            include_stop=options.include_stop,
                            skip_special=options.skip_special,
                            min_tokens=own.min_tokens,
                        ),
                    )
                    for child in range(n)
                ]
            )
        self.choices = [choice for family in self._children for choice in family]
        self._open = len(self.choices)

    @property
    def finished(self) -> bool:
        return not self._open

    @property
    def prompt_tokens(self) -> int:
        return sum(len(family[0].prompt.token_ids) for family in self._children)

    @property
    def cached_tokens(self) -> int:
        return sum(family[0].cached_tokens for family in self._children)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    async def steps(self) -> AsyncGenerator[list[Delta], None]:
        """Per step, what it brought. Raises what was refused, by the queue's bounds or the engine, or failed."""
        with self._admission.admitted(self._caller, [len(s.token_ids) for s in self._submits]) as self._ticket:
            timer = self._expire_in_time()
            try:
                async with aclosing(self._outputs()) as outputs:
                    async for deltas in outputs:
                        yield deltas
            finally:
                if timer is not None:
                    timer.cancel()

    def _expire_in_time(self) -> asyncio.TimerHandle | None:
        if not self._seconds:
            return None
        left = self.arrival + self._seconds - time.monotonic()
        return asyncio.get_running_loop().call_later(max(left, 0.0), self._expire)

    def _expire(self) -> None:
        error = RequestTimeout(f"the answer took longer than {self._seconds:g} s; raise it with --request-timeout")
        for submit in self._submits:
            self._client.abort(submit.request_id, error=error)

    async def _outputs(self) -> AsyncGenerator[list[Delta], None]:
        try:
            async with aclosing(together(self._client, self._submits)) as outputs:
                async for step in outputs:
                    deltas = self._take(step)
                    if deltas:
                        yield deltas
        except (asyncio.CancelledError, GeneratorExit):
            self._close("abort")
            raise
        except (RequestError, NotReady) as error:
            if isinstance(error, QueueFull):
                self._metrics.refused["requests"] += 1
            raise  # nothing ran
        except Exception as error:
            logger.error("the request failed: %s", error if isinstance(error, EngramError) else type(error).__name__)
            self._close("error")
            raise

    def _take(self, step: list[tuple[int, TokenOutput]]) -> list[Delta]:
        now = time.monotonic()
        deltas = []
        for number, output in step:
            family = self._children[number]
            for choice in family if output.index < 0 else (family[output.index],):
                if choice.finish_reason is None:
                    deltas.append(self._delta(choice, output, now))
        return deltas

    def _delta(self, choice: Choice, output: TokenOutput, now: float) -> Delta:
        ids = output.token_ids
        first = self._observe(choice, output, now)
        if output.stop_token_id is not None and not self._options.include_stop:
            text = choice.detokeniser.push(ids[:-1])
        else:
            text = choice.detokeniser.push(ids)
        if choice.detokeniser.matched is not None:
            choice.stop_reason = choice.detokeniser.matched
            self._finish(choice, "stop", now)
            if output.finish_reason is None:
                self._client.abort(choice.request_id, choice.child)
        elif output.finish_reason is not None:
            text += choice.detokeniser.flush()
            if choice.detokeniser.matched is not None:
                choice.stop_reason = choice.detokeniser.matched
            elif output.stop_token_id is not None and output.stop_token_id not in self._eos:
                choice.stop_reason = output.stop_token_id
            self._finish(choice, output.finish_reason, now)
        return Delta(choice, text, ids, output.logprobs, first, output.gates)

    def _observe(self, choice: Choice, output: TokenOutput, now: float) -> TokenOutput | None:
        """Counts and times; returns the output if it is the choice's first."""
        metrics = self._metrics
        choice.tokens += len(output.token_ids)
        metrics.generation_tokens += len(output.token_ids)
        if output.cost is not None:
            choice.cost = output.cost
        if output.queued_s is None or output.prefill_s is None:
            if output.token_ids:
                metrics.between_tokens.observe(now - choice.last)
                choice.last = now
            return None  # a later output, or one that ended before its first token
        choice.queued_s, choice.prefill_s = output.queued_s, output.prefill_s
        if choice.child == 0:
            self.engine_s = output.engine_s
            if self._ticket is not None:
                self._ticket.started(len(choice.prompt.token_ids))
            choice.cached_tokens = output.cached_tokens
        if output.token_ids:  # none with max_tokens 0
            choice.first = choice.last = now
            if choice.child == 0:
                prompt = len(choice.prompt.token_ids)
                ttft = now - self.arrival
                metrics.started(prompt, output.cached_tokens, ttft, output.queued_s, output.prefill_s)
        return output

    def _finish(self, choice: Choice, reason: FinishReason, now: float) -> None:
        choice.finish_reason = reason
        self._open -= 1
        self._metrics.finished[reason] += 1
        self._metrics.end_to_end.observe(now - self.arrival)
        if choice.tokens:
            inference = choice.last - self.arrival - choice.queued_s
            self._metrics.ended(choice.tokens, inference, choice.last - choice.first)
        number = choice.index // len(self._children[0])
        family = self._children[number]
        if all(child.finish_reason is not None for child in family) and any(child.tokens for child in family):
            asked = self._submits[number].params.max_tokens
            self._metrics.completed(len(family), asked, max(child.tokens for child in family))

    def _close(self, reason: FinishReason) -> None:
        now = time.monotonic()
        for choice in self.choices:
            if choice.finish_reason is None:
                self._finish(choice, reason, now)


async def together(client: EngineClient, submits: list[Submit]) -> AsyncGenerator[list[tuple[int, TokenOutput]], None]:
    """The outputs of several submits with the number of each, all that are there at once. One task per submit."""
    if len(submits) == 1:
        async with aclosing(_stream(client, submits[0])) as stream:
            async for output in stream:
                yield [(0, output)]
        return
    arrived: asyncio.Queue[tuple[int, TokenOutput | Exception | None]] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(client, submit, i, arrived)) for i, submit in enumerate(submits)]
    running = len(pumps)
    try:
        while running:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            step: list[tuple[int, TokenOutput]] = []
            for number, item in items:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    step.append((number, item))
            if step:
                yield step
    finally:
        for pump in pumps:
            pump.cancel()
        for pump in pumps:
            with suppress(asyncio.CancelledError):
                await pump


async def _pump(
    client: EngineClient,
    submit: Submit,
    number: int,
    arrived: asyncio.Queue[tuple[int, TokenOutput | Exception | None]],
) -> None:
    end: Exception | None = None
    try:
        async with aclosing(_stream(client, submit)) as stream:
            async for output in stream:
                arrived.put_nowait((number, output))
    except Exception as error:
        end = error
    arrived.put_nowait((number, end))


def _stream(client: EngineClient, submit: Submit) -> AsyncGenerator[TokenOutput, None]:
    return cast("AsyncGenerator[TokenOutput, None]", client.generate(submit))
