"""Chat templates rendered in a process of their own, with bounds on time and memory.

A template is a program that came with a model. The sandbox (`chat.py`) keeps it from what is not its business; it may
still loop for ever or double a text until the machine has no memory. So it runs where it can be ended:

    render ──▶ pipe ──▶ child: sandbox, at most MEMORY more than at its start ──▶ text, or why not
                 └── no answer within SECONDS: the child is ended, and the next request gets a new one

One child, one conversation at a time. Knows templates, no HTTP.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
import signal
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from server.errors import EngramError, RequestError
from server.models.chat import render

SECONDS = 5.0
MEMORY = 512 << 20
LONGEST_TEXT = 64 << 20
START_SECONDS = 60.0


class Renderer:
    """Renders conversations with one template. Safe to call from several threads, which take turns."""

    def __init__(self, template: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._template, self._seconds, self._memory = template, seconds, memory
        self._lock = threading.Lock()
        self._child: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._greeted = False

    def start(self) -> None:
        """Starts the child, if there is none. Returns before it is ready."""
        with self._lock:
            self._start()

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """`chat.render` in the child. Raises RequestError, also for a template that takes too much time or memory."""
        try:
            request = json.dumps([messages, options]).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the chat template cannot be given these messages: {error}", param="messages") from None
        with self._lock:
            pipe = self._start()
            try:
                if not self._ready(pipe):
                    raise EngramError(f"the process for chat templates did not start within {START_SECONDS:.0f} s")
                pipe.send_bytes(request)
                if not pipe.poll(self._seconds):
                    self._stop()
                    raise RequestError(
                        f"the chat template took longer than {self._seconds:g} s for these messages", param="messages"
                    )
                answer: str | EngramError = pipe.recv()
            except (EOFError, OSError):
                self._stop()
                raise RequestError("the chat template ended its process on these messages", param="messages") from None
        if isinstance(answer, EngramError):
            raise answer
        return answer

    def close(self) -> None:
        with self._lock:
            self._stop()

    # ── inside, with the lock held ─────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._child = context.Process(target=_child_main, args=(theirs, self._template, self._memory), daemon=True)
            self._child.start()
            theirs.close()
            self._greeted = False
        return self._pipe

    def _ready(self, pipe: Connection) -> bool:
        if not self._greeted and pipe.poll(START_SECONDS):
            pipe.recv()
            self._greeted = True
        return self._greeted

    def _stop(self) -> None:
        if self._child is not None and self._pipe is not None:
            self._child.kill()
            self._child.join(5)
            self._pipe.close()
            self._child = self._pipe = None


def _child_main(pipe: Connection, template: str, memory: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the API process ends this one
    limit = _address_space() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(EOFError, OSError):  # the API process is gone
        _rendered(template, [{}], {})  # compiled before anyone waits for it
        pipe.send(None)
        while True:
            messages, options = json.loads(pipe.recv_bytes())
            pipe.send(_rendered(template, messages, options))


def _rendered(template: str, messages: Sequence[Mapping[str, Any]], options: dict[str, Any]) -> str | EngramError:
    try:
        text = render(template, messages, **options)
    except EngramError as error:
        return error
    except Exception as error:  # while it was compiled: MemoryError, or whatever its constants amount to
        return RequestError(f"the chat template cannot be used: {type(error).__name__}", param="messages")
    if len(text) > LONGEST_TEXT:
        return RequestError(f"the chat template made a text of {len(text)} characters", param="messages")
    return text


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
