"""Events on the wire: valid whatever the text, alive while silent, closed when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from server.api import sse
from server.api.sse import ClientGone, begun, compact, quoted

Message = dict[str, Any]


class Connection:
    """The server's side of one ASGI connection; the client leaves when `leave` is called."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._gone = asyncio.Event()

    def leave(self) -> None:
        self._gone.set()

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "headers": []}, self.receive, self.send)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Chunks with pauses, and whether it was closed."""

    def __init__(self, *items: bytes | float) -> None:
        self.items, self.ended = items, False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            for item in self.items:
                if isinstance(item, bytes):
                    yield item
                else:
                    await asyncio.sleep(item)
        finally:
            self.ended = True


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_as_one_line_of_json(text: str) -> None:
    assert json.loads(quoted(text)) == text and "\n" not in quoted(text)
    assert json.loads(compact({"text": text})) == {"text": text}


def test_no_number_that_json_lacks_is_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        compact(float("-inf"))


def test_chunks_arrive_one_by_one_and_the_stream_ends() -> None:
    async def run() -> Connection:
        connection, source = Connection(), Source(b"a", b"b", b"c")
        stream = await begun(connection.request, source.chunks())
        await stream(connection.request.scope, connection.receive, connection.send)
        assert source.ended
        return connection

    sent = asyncio.run(run()).sent
    assert [message.get("body") for message in sent] == [None, b"a", b"b", b"c", b""]
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8" and b"content-length" not in headers


def test_a_client_that_leaves_before_the_first_chunk_closes_the_source() -> None:
    async def run() -> Source:
        connection, source = Connection(), Source(60.0, b"late")
        asyncio.get_running_loop().call_later(0.01, connection.leave)
        with pytest.raises(ClientGone):
            await begun(connection.request, source.chunks())
        return source

    assert asyncio.run(run()).ended


def test_a_client_that_leaves_in_the_middle_closes_the_source() -> None:
    async def run() -> tuple[Connection, Source]:
        connection, source = Connection(), Source(b"a", 60.0, b"late")
        stream = await begun(connection.request, source.chunks())
        asyncio.get_running_loop().call_later(0.01, connection.leave)
        await stream(connection.request.scope, connection.receive, connection.send)
        return connection, source

    connection, source = asyncio.run(run())
    assert connection.body == b"a" and source.ended


def test_a_failure_before_the_first_chunk_is_raised_and_not_streamed() -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        raise KeyError("first")
        yield b""

    async def run() -> None:
        with pytest.raises(KeyError):
            await begun(Connection().request, failing())

    asyncio.run(run())


def test_a_silent_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)

    async def run() -> list[Message]:
        connection, source = Connection(), Source(b"a", 0.09, b"b")
        stream = await begun(connection.request, source.chunks())
        await stream(connection.request.scope, connection.receive, connection.send)
        await asyncio.sleep(0.05)  # nothing may follow the end
        return connection.sent

    bodies = [message.get("body") for message in asyncio.run(run())]
    assert bodies[:3] == [None, b"a", sse.KEEP_ALIVE] and bodies[-2:] == [b"b", b""]
    assert set(bodies[2:-2]) == {sse.KEEP_ALIVE}


def test_a_busy_stream_has_no_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.2)

    async def run() -> bytes:
        connection, source = Connection(), Source(*[b"a", 0.02] * 25)
        stream = await begun(connection.request, source.chunks())
        await stream(connection.request.scope, connection.receive, connection.send)
        return connection.body

    assert asyncio.run(run()) == b"a" * 25
