"""uvicorn's HTTP/1.1 protocol with bounds on a request's head: its bytes, its header lines, its time to arrive.

The parser itself bounds nothing: a client could send one endless header, or one byte a minute, and hold memory or a
connection for as long as it likes. Bodies have their own bounds (`middleware.BodyLimit`).
"""

from __future__ import annotations

import asyncio
import json

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import error_body

MOST_HEAD_BYTES = 64 << 10
MOST_HEADERS = 128
HEAD_SECONDS = 30.0
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class HeadTooLarge(Exception):
    """More than a request's head may have."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `_head` counts the bytes of a head that is not complete yet; None between heads.

    `cycle` is uvicorn's latest request, `_answering` the one being answered: with pipelining they differ.
    """

    _head: int | None = None
    _too_large = False
    _answering: RequestResponseCycle | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._abandon()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None and not self.transport.is_closing():
            self._head += len(data)
            if self._head > MOST_HEAD_BYTES:
                self._refuse_head()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        if self.transport.is_closing():  # the answer before this one was the connection's last
            cycle.disconnected = True
        super()._start_asgi_task(cycle, app)

    def eof_received(self) -> None:
        """The connection closes with this; an answer under way has no reader, and writing it would raise."""
        self._abandon()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        if self._timer is None:
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MOST_HEADERS:
            self._too_large = True
            raise HeadTooLarge  # the parser ends with it, and `send_400_response` is called
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._head = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse_head()
        else:
            self._refuse(400, "what arrived is no valid HTTP/1.1 request")

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's head is above {MOST_HEAD_BYTES} bytes or {MOST_HEADERS} header lines")

    def _refuse(self, status: int, message: str) -> None:
        """Answers and closes; only closes where another answer is under way on this connection."""
        self._stop_timer()
        if self._answering is None or self._answering.response_complete:
            body = json.dumps(error_body(message, status)).encode()
            head = (
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head % (status, REASONS[status], len(body)) + body)
        self._abandon()
        self.transport.close()

    def _abandon(self) -> None:
        """Of requests under way, whose answers can be written no more: they end as when their client leaves."""
        for cycle in (self._answering, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._timer = None
        if self._head is None:
            self.transport.close()  # nothing was asked
        else:
            self._refuse(408, f"the request's head did not arrive within {HEAD_SECONDS:.0f} s")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
