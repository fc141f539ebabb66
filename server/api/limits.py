"""How much may be asked for at once: the queue, in requests and in prompt tokens, and each key's own share.

The API process counts, so that a refusal costs no trip to the engine and comes at once however long a step takes:

    open prompts      admitted and not yet ended     at most --max-num-seqs + --max-waiting
    waiting tokens    of prompts without a first     at most --max-waiting-tokens
                      token yet
    a key's requests  admitted and not yet ended     at most --max-concurrency-per-key

Knows callers and counts; nothing of the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.auth import Caller
from server.api.errors import response_of
from server.api.metrics import RequestMetrics
from server.errors import QueueFull, RequestError
from server.settings import Settings


class Admission:
    """`open`, `waiting_tokens`, `of_caller`: what is admitted now; all zero when nobody asks."""

    def __init__(self, settings: Settings, metrics: RequestMetrics) -> None:
        self._most = settings.max_num_seqs + settings.max_waiting
        self._most_tokens = settings.max_waiting_tokens
        self._most_per_key = settings.max_concurrency_per_key
        self._running, self._metrics = settings.max_num_seqs, metrics
        self.open = self.waiting_tokens = 0
        self.of_caller: Counter[str] = Counter()

    def check(self, caller: Caller) -> None:
        """Raises QueueFull if not even one prompt would be admitted: before anything is tokenised."""
        self._check(caller, 1, 0)

    @contextmanager
    def admitted(self, caller: Caller, prompt_tokens: Sequence[int]) -> Iterator[Ticket]:
        """Holds a place for a request's prompts, of these many tokens each, until the block ends.

        Raises QueueFull, or RequestError for more than there will ever be room for.
        """
        prompts, tokens = len(prompt_tokens), sum(prompt_tokens)
        if prompts > self._most:
            raise RequestError(
                f"the request has {prompts} prompts and {self._most} can run and wait together; send fewer at once, or "
                f"raise --max-waiting",
                param="prompt",
            )
        if tokens > self._most_tokens:
            raise RequestError(
                f"the request's prompts have {tokens} tokens together and {self._most_tokens} may wait; send fewer at "
                f"once, or raise --max-waiting-tokens",
                param="prompt",
            )
        self._check(caller, prompts, tokens)
        ticket = Ticket(self, tokens)
        self.open += prompts
        self.waiting_tokens += tokens
        self.of_caller[caller.name] += 1
        try:
            yield ticket
        finally:
            ticket.started(ticket.waiting)
            self.open -= prompts
            self.of_caller[caller.name] -= 1
            if not self.of_caller[caller.name]:
                del self.of_caller[caller.name]

    def _check(self, caller: Caller, prompts: int, tokens: int) -> None:
        if self._most_per_key and self.of_caller[caller.name] >= self._most_per_key:
            self._refuse(
                "concurrency",
                f"this key has {self._most_per_key} requests running or waiting, as many as "
                f"--max-concurrency-per-key allows",
            )
        if self.open + prompts > self._most:
            waiting = self.open - self._running
            self._refuse("requests", f"{waiting} requests are waiting, as many as --max-waiting allows")
        if self.waiting_tokens + tokens > self._most_tokens:
            self._refuse(
                "tokens", f"{self.waiting_tokens} prompt tokens are waiting and --max-waiting-tokens allows no more"
            )

    def _refuse(self, reason: str, message: str) -> None:
        self._metrics.refused[reason] += 1
        raise QueueFull(message)


class Gate:
    """Refuses what generates while there is no room for it: before its body is read, let alone understood.

    Under overload most requests end here, and what they cost is taken from those that are served.
    """

    def __init__(self, app: ASGIApp, admission: Admission, paths: frozenset[str]) -> None:
        self.app, self._admission, self._paths = app, admission, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in self._paths and scope["method"] == "POST":
            try:
                self._admission.check(scope["state"]["caller"])
            except QueueFull as error:
                return await response_of(error)(scope, receive, send)
        await self.app(scope, receive, send)


class Ticket:
    """One request's place. `waiting`: its prompt tokens that still count as waiting."""

    def __init__(self, admission: Admission, waiting: int) -> None:
        self._admission, self.waiting = admission, waiting

    def started(self, tokens: int) -> None:
        """A prompt of `tokens` tokens has its first token and waits no more."""
        self.waiting -= tokens
        self._admission.waiting_tokens -= tokens
