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
    return await _race(work, _gone(request.receive))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _race(work: Coroutine[Any, Any, T], gone: Coroutine[Any, Any, None]) -> T:
    task, watcher = asyncio.create_task(work), asyncio.create_task(gone)
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, watcher):
            if not each.done():
                each.cancel()
                await asyncio.wait((each,))


class EventStream(Response):
    """Sends `first`, then what `rest` yields, until it ends or the client leaves; `rest` is closed either way."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest = first, rest
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _race(self._send_all(send), self._watch(receive, send))
        except ClientGone:
            pass
        finally:
            await self._rest.aclose()

    async def _send_all(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        self._last_sent = now()
        async for chunk in self._rest:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._last_sent = now()
        await send({"type": "http.response.body", "body": b""})

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Until the client leaves; a comment whenever the stream was silent for long."""
        loop = asyncio.get_running_loop()
        gone = asyncio.create_task(_gone(receive))
        try:
            while not gone.done():
                await asyncio.wait((gone,), timeout=KEEP_ALIVE_SECONDS)
                if not gone.done() and loop.time() - self._last_sent >= KEEP_ALIVE_SECONDS:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        finally:
            gone.cancel()


async def begun(request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
    """A response whose first chunk is there already, so that whatever fails before it has a status of its own."""
    try:
        first = await unless_gone(request, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events)


async def _first(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)
