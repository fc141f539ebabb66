"""The outermost layer of every request, as plain ASGI: a request id, a log line, the body's limits, the last catch.

Bodies are read whole before a route sees them, so that a limit can answer 413 and a route starts with all it needs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import body_of, error_body
from server.errors import BodyTooLarge, EngramError, SlowClient
from server.logs import place_of
from server.logs import request_id as logged_id

logger = logging.getLogger(__name__)

REQUEST_ID = b"x-request-id"
ACCEPTED_ID = re.compile(r"[\x21-\x7e]{1,128}")
PROBES = frozenset({"/health", "/ready", "/metrics"})
LONGEST_PATH = 200
WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})


class Edge:
    """Gives each request an id (the client's, if it sent a usable one) and answers 500 for what nobody caught."""

    def __init__(self, app: ASGIApp, *, log_prompts: bool = False) -> None:
        self.app, self._log_prompts = app, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = _given_id(scope) or uuid.uuid4().hex
        logged_id.set(request_id)
        scope.setdefault("state", {}).update(request_id=request_id, arrival=time.monotonic())
        header = (REQUEST_ID, request_id.encode())
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), header]
                engine_s = scope["state"].get("engine_s")
                if engine_s is not None:  # the engine's share of the time to a first token
                    headers.append((b"server-timing", b"engine;dur=%.2f" % (engine_s * 1e3)))
                message["headers"] = headers
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            self._log_failure(error)
            if status:
                return  # the answer has begun; the connection ends without its last chunk
            await _send_json(send_with_id, error_body(f"internal error; look for {request_id} in the log", 500))
        finally:
            self._log_access(scope, status)

    def _log_failure(self, error: Exception) -> None:
        """An unexpected error's message may quote what a client sent; the log holds prompts only if it may."""
        if self._log_prompts:
            logger.error("unexpected %s", type(error).__name__, exc_info=error)
        else:
            logger.error("unexpected %s at %s", type(error).__name__, place_of(error))

    def _log_access(self, scope: Scope, status: int) -> None:
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        if not logger.isEnabledFor(level):
            return
        state = scope["state"]
        line = {
            "method": scope["method"],
            "path": scope.get("raw_path", b"")[:LONGEST_PATH].decode("latin-1"),  # as sent: without line ends
            "status": status,
            "seconds": round(time.monotonic() - state["arrival"], 4),
            "caller": state["caller"].name if "caller" in state else "-",
        }
        logger.log(level, "%s", " ".join(map(str, line.values())), extra=line)


# A body above the limit is read on and dropped up to this multiple: clients read no answer before they have sent all.
PATIENCE = 4


class BodyLimit:
    """Reads the body and keeps at most `limit` bytes of it, 413 beyond; 408 if it takes longer than `seconds`."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in WITHOUT_BODY:
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if declared.isdigit() and int(declared) > PATIENCE * self.limit:
                raise _too_large(int(declared), self.limit)
            async with asyncio.timeout(self.seconds or None):
                body = await self._read(receive)
        except TimeoutError:
            slow = SlowClient(f"the body did not arrive within {self.seconds:g} s; raise it with --body-timeout")
            return await _send_json(send, body_of(slow), close=True)
        except EngramError as error:
            return await _send_json(send, body_of(error), close=True)
        if body is None:
            return  # the client left while sending
        replayed = False

        async def receive_again() -> MutableMapping[str, Any]:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_again, send)

    async def _read(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= self.limit:
                parts.append(part)
            else:
                parts.clear()
            more = message.get("more_body", False)
            if size > (PATIENCE * self.limit if more else self.limit):
                raise _too_large(size, self.limit)
            if not more:
                return b"".join(parts)


def _too_large(size: int, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size} bytes and the limit is {limit}; raise it with --max-body-bytes")


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == REQUEST_ID:
            text = value.decode("latin-1")
            return text if ACCEPTED_ID.fullmatch(text) else None
    return None


async def _send_json(send: Send, body: dict[str, Any], *, close: bool = False) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if close:  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": body["error"]["code"], "headers": headers})
    await send({"type": "http.response.body", "body": content})
