"""Log lines: every one carries its request's id, none a prompt, and as JSON each is an object."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path

import pytest

from server import logs
from server.api.middleware import Edge
from tests.api.live import LiveServer

SECRET = "xylophone-under-the-bed"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_requests_are_logged_with_their_id_and_without_their_text(tiny_llama_folder: Path, log: Path) -> None:
    flags = {"model": str(tiny_llama_folder), "kv_bytes": 16 << 20, "max_model_len": 256}
    server = LiveServer({**flags, "log_format": "json", "log_level": "debug"}, log=log)
    try:
        for body in (
            {"prompt": SECRET, "max_tokens": 2},
            {"prompt": SECRET, "temperature": "x"},
            {"model": SECRET, "prompt": "a"},
        ):
            server.request("/v1/completions", body, headers={"X-Request-Id": "mine-7"})
        server.request("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}], "stream": True})
        server.request("/v1/completions?key=%0a%1b", b"{" + SECRET.encode(), headers={"X-Request-Id": "mine-8"})
    finally:
        assert server.stop() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert SECRET not in log.read_text()
    mine = [line for line in lines if line["request_id"] == "mine-7"]
    assert [line["status"] for line in mine] == [200, 400, 404]
    assert all(line["path"] == "/v1/completions" and line["caller"] == "anonymous" for line in mine)
    assert {"time", "level", "process", "logger", "message"} <= set(lines[0])


def test_prompts_are_logged_when_asked_for(tiny_llama_folder: Path, log: Path) -> None:
    flags = {"model": str(tiny_llama_folder), "kv_bytes": 16 << 20, "max_model_len": 256, "in_process": True}
    server = LiveServer({**flags, "log_prompts": True}, log=log)
    server.request("/v1/completions", {"prompt": SECRET, "max_tokens": 1}, headers={"X-Request-Id": "mine-9"})
    assert server.stop() == 0
    assert any("[mine-9]" in line and SECRET in line for line in log.read_text().splitlines())


def formatted(formatter: logging.Formatter, message: str, **extra: object) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(logs.add_request_id)
    handler.setFormatter(formatter)
    record = logging.makeLogRecord({"msg": message, "name": "n", "levelname": "INFO", "levelno": 20, **extra})
    handler.handle(record)
    return stream.getvalue()


def test_a_json_line_is_one_line_whatever_it_says() -> None:
    token = logs.request_id.set("id-1")
    try:
        line = formatted(logs.JsonLines("api"), "two\nlines \ud800", seconds=0.5)
    finally:
        logs.request_id.reset(token)
    assert line.count("\n") == 1
    told = json.loads(line)
    assert told["message"] == "two\nlines \ud800" and told["seconds"] == 0.5 and told["request_id"] == "id-1"


def test_a_text_line_names_the_request() -> None:
    assert " INFO api [-] hello" in formatted(logs.TextLines("api"), "hello")


def test_an_unexpected_errors_message_stays_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: object, receive: object, send: object) -> None:
        raise RuntimeError(SECRET)

    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    for log_prompts in (False, True):
        caplog.clear()
        scope = {"type": "http", "method": "GET", "path": "/x", "raw_path": b"/x", "headers": []}
        asyncio.run(Edge(broken, log_prompts=log_prompts)(scope, None, send))
        assert "unexpected RuntimeError" in caplog.text
        assert (SECRET in caplog.text) is log_prompts
    assert sent[0]["status"] == 500 and SECRET.encode() not in sent[1]["body"]
