"""Server-sent events, cheap: one event per token and choice, one write per step and stream, no task per token.

Everything of a chunk but its text is the same throughout a stream, so it is serialised once; the text goes through the
C encoder of `json` alone. The response is plain ASGI. Whoever waits for the engine races with the client leaving.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from json.encoder import encode_basestring
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
# Proxies close connections that are silent for a minute or so.
KEEP_ALIVE_SECONDS = 15.0

quoted: Callable[[str], str] = encode_basestring  # a text as a JSON string, UTF-8 left as it is


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def event(value: Any) -> str:
    return f"data: {compact(value)}\n\n"


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first. Raises ClientGone then."""
    gone = asyncio.create_task(_gone(request.receive))
    try:
        return await _race(work, gone)
    finally:
        gone.cancel()


async def begun(request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
    """A response whose first chunk is there already, so that whatever fails before it has a status of its own."""
    gone = asyncio.create_task(_gone(request.receive))
    try:
        first = await _race(_first(events), gone)
    except BaseException:
        gone.cancel()
        await events.aclose()
        raise
    return EventStream(first, events, gone)


class EventStream(Response):
    """Sends `first`, then what `rest` yields, until it ends or `gone` is done; `rest` is closed either way."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], gone: asyncio.Task[None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._gone = first, rest, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        silence = Silence(send)
        try:
            await _race(self._send_all(send, silence), self._gone)
        except ClientGone:
            pass
        finally:
            silence.end()
            self._gone.cancel()
            await self._rest.aclose()

    async def _send_all(self, send: Send, silence: Silence) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for chunk in self._rest:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            silence.broken = True
        silence.end()
        await send({"type": "http.response.body", "body": b""})


class Silence:
    """Sends a comment whenever a whole interval passed without a chunk: one timer, nothing per token."""

    def __init__(self, send: Send) -> None:
        self._send, self.broken = send, False
        self._task: asyncio.Task[None] | None = None
        self._timer = self._wait()

    def _wait(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._check)

    def _check(self) -> None:
        if not self.broken and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._comment())
        self.broken = False
        self._timer = self._wait()

    async def _comment(self) -> None:
        await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

    def end(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)


async def _race(work: Coroutine[Any, Any, T], gone: asyncio.Task[None]) -> T:
    """Raises ClientGone if `gone` is done first; `work` has ended either way."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
