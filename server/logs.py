"""Log lines: one form for both processes, for people (text) or for machines (JSON), each with its request's id.

`request_id` is a context variable: the API's edge sets it, and whatever is logged while a request is answered carries
it. The engine's lines have none; what it fails with is logged again by the request it failed.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime

from server.settings import Settings

request_id: ContextVar[str] = ContextVar("request_id", default="-")

# What a LogRecord has by itself; the rest came with `extra=`.
OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id"}


def configure(settings: Settings, process: str) -> None:
    """All of this process's log lines to stderr in the chosen form. `process`: "api" or "engine"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(add_request_id)
    handler.setFormatter(JsonLines(process) if settings.log_format == "json" else TextLines(process))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for name in ("httpx", "asyncio", "multipart"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))


def add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


def place_of(error: BaseException) -> str:
    """Where an unexpected error came from, in one line, without its message: that may quote what a client sent."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames))


class TextLines(logging.Formatter):
    """`2026-11-26 12:00:00,123 INFO api [id] message`"""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} [%(request_id)s] %(message)s")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, process, logger, request_id, message, and what came with `extra=`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in OWN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
