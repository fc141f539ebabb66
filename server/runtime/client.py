"""EngineClient: the API process's side of the pipe. Asyncio, torch-free.

Starts the engine process, hands out token streams, sends aborts. One read per step serves all streams; a writer
thread keeps a full pipe from blocking the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from server.errors import EngramError, NotReady, StepFailed
from server.memory.edits import Edited
from server.runtime.messages import (
    Abort,
    Drain,
    EngineStats,
    Failed,
    FinishReason,
    MemoryUpdated,
    Ready,
    StepOutputs,
    Submit,
    TokenOutput,
    UpdateEdits,
    UpdateMemory,
)
from server.settings import Settings

logger = logging.getLogger(__name__)

ENDS = {
    -signal.SIGBUS: "SIGBUS: a mapped table file was cut or its disk failed; --read pread survives that",
    -signal.SIGKILL: "SIGKILL, most likely for want of memory",
    -signal.SIGSEGV: "SIGSEGV",
}
START_TIMEOUT = 1800.0  # a hub download or a huge checkpoint may take its time; a dead process is noticed at once


class EngineClient:
    """`ready`: what the engine reported; `stats`: its latest figures; `step_listeners`: called once per step."""

    def __init__(self, pipe: Connection, worker: Any, ready: Ready) -> None:
        self._pipe, self._worker, self.ready = pipe, worker, ready
        self.stats = EngineStats()
        self.step_listeners: list[Callable[[StepOutputs], None]] = []
        self.alive, self.draining = True, False
        self.ended = ""  # how the engine's process ended, where that is worth saying
        self._tickets = itertools.count()
        self._streams: dict[str, asyncio.Queue[TokenOutput]] = {}
        self._updates: dict[int, asyncio.Future[MemoryUpdated]] = {}
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pipe.fileno(), self._receive)
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._writer.start()

    @classmethod
    async def start(cls, settings: Settings) -> EngineClient:
        """Spawns the engine and waits until it is loaded. Raises the EngramError it failed with."""
        ours, theirs = multiprocessing.Pipe()
        worker = _start_worker(settings, theirs)
        message = await asyncio.to_thread(_first_message, ours, worker)
        if isinstance(message, Failed):
            worker.join(10)
            raise message.error
        return cls(ours, worker, message)

    @property
    def pid(self) -> int | None:
        """The engine's process, None where it runs in a thread of this one."""
        return getattr(self._worker, "pid", None)

    async def generate(self, submit: Submit) -> AsyncIterator[TokenOutput]:
        """Streams the tokens of all n children, interleaved, until each has finished.

        Closing the iterator aborts what is left. Raises RequestError, QueueFull, NotReady or StepFailed.
        """
        if not self.alive:
            raise NotReady("the engine is gone; restart the server")
        if self.draining:
            raise NotReady("the server is draining and takes no new requests")
        stream: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self._streams[submit.request_id] = stream
        finished: set[int] = set()
        try:
            self._outbox.put(replace(submit, sent=time.monotonic()))
            while len(finished) < submit.n:
                output = await stream.get()
                if output.finish_reason is not None:
                    finished |= set(range(submit.n)) if output.index < 0 else {output.index}
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            del self._streams[submit.request_id]
            if len(finished) < submit.n:
                self.abort(submit.request_id)

    def abort(self, request_id: str, index: int | None = None, *, error: EngramError | None = None) -> None:
        """Ends a request, or one of its children, wherever it is; its stream ends with "abort", or raises `error`."""
        if self.alive:
            self._outbox.put(Abort(((request_id, index),)))
        stream = self._streams.get(request_id)
        if stream is not None:
            reason: FinishReason = "abort" if error is None else "error"
            child = -1 if index is None else index
            stream.put_nowait(TokenOutput(request_id, child, (), finish_reason=reason, error=error))

    async def update_memory(self, name: str, path: str | None) -> MemoryUpdated:
        """Attaches the pack at `path`, or with None lets the memory go; `ready` then names what is served.

        Raises what the engine refused it with, or NotReady if it is gone.
        """
        if not self.alive:
            raise NotReady("the engine is gone; restart the server")
        ticket = next(self._tickets)
        answer = self._updates[ticket] = self._loop.create_future()
        self._outbox.put(UpdateMemory(ticket, name, path))
        updated: MemoryUpdated = await asyncio.shield(answer)  # whoever asked may leave; the change is made
        if updated.error is not None:
            raise updated.error
        return updated

    def update_edits(self, scope: str, rows: Edited) -> None:
        """What requests of a tenant ("": of everyone) see that are sent from now on."""
        if self.alive:
            self._outbox.put(UpdateEdits(scope, rows))

    async def drain(self, seconds: float) -> None:
        """Takes no new requests, waits for the running ones at most `seconds`, then ends the engine."""
        self.draining = True
        self._outbox.put(Drain(seconds))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds + 5.0)

    async def close(self) -> None:
        """Ends the engine process; what runs is lost."""
        self._outbox.put(None)
        await asyncio.to_thread(self._worker.join, 10)
        if self._worker.is_alive() and hasattr(self._worker, "kill"):
            self._worker.kill()
        self._end()
        await asyncio.to_thread(self._writer.join, 5)
        self._pipe.close()

    def _receive(self) -> None:
        try:
            while self._pipe.poll():
                message = self._pipe.recv()
                if isinstance(message, MemoryUpdated):
                    self._memory_updated(message)
                else:
                    self._take(message)
        except (EOFError, OSError):
            self._end()

    def _take(self, step: StepOutputs) -> None:
        stats = step.stats
        if not stats.counted:
            last = self.stats
            stats = replace(stats, memory=last.memory, resident=last.resident, notes=last.notes, counted=True)
        self.stats = stats
        # First tokens first: whoever waits for one waits longest, and each output is a chunk to be written.
        for output in sorted(step.outputs, key=_later):
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)
        for listener in self.step_listeners:
            listener(step)

    def _memory_updated(self, updated: MemoryUpdated) -> None:
        self.ready = replace(self.ready, models=updated.models, packs=updated.packs)
        self._updates.pop(updated.ticket).set_result(updated)

    def _end(self) -> None:
        """The engine is gone: every open stream is told so."""
        if not self.alive:
            return
        self.alive = False
        self.ended = _how_it_ended(self._worker)
        if self.ended:
            logger.error("the engine ended: %s", self.ended)
        self._loop.remove_reader(self._pipe.fileno())
        self._outbox.put(None)
        gone = StepFailed(f"the engine ended while computing this request{self.ended and f' ({self.ended})'}")
        for request_id, stream in self._streams.items():
            stream.put_nowait(TokenOutput(request_id, -1, (), finish_reason="error", error=gone))
        for ticket, answer in self._updates.items():
            error = NotReady("the engine ended before the memory was changed")
            answer.set_result(MemoryUpdated(ticket, self.ready.models, self.ready.packs, error))
        self._updates.clear()
        self._ended.set()

    def _write(self) -> None:
        while True:
            message = self._outbox.get()
            try:
                self._pipe.send(message)
            except (OSError, ValueError):
                return
            if message is None:
                return


def _how_it_ended(worker: Any) -> str:
    """What a signal that ended the engine's process means; "" for an orderly end, or a thread."""
    if getattr(worker, "exitcode", 0) is None:
        worker.join(1)
    code = getattr(worker, "exitcode", None)
    return ENDS.get(code, "") if code is not None else ""


def _later(output: TokenOutput) -> bool:
    return output.queued_s is None


def _start_worker(settings: Settings, pipe: Connection) -> Any:
    """A spawned process, or with --in-process a thread. The engine's modules load there, not here."""
    if settings.in_process:
        from server.runtime.process import engine_main

        worker: Any = threading.Thread(target=engine_main, args=(settings, pipe), name="engine", daemon=True)
        worker.start()
        return worker
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=_run, args=(settings, pipe), name="engine", daemon=True)
    worker.start()
    pipe.close()
    return worker


def _run(settings: Settings, pipe: Connection) -> None:
    from server.runtime.process import engine_main

    engine_main(settings, pipe)


def _first_message(pipe: Connection, worker: Any) -> Ready | Failed:
    if not pipe.poll(START_TIMEOUT):
        return Failed(NotReady(f"the engine did not load within {START_TIMEOUT:.0f} s"))
    try:
        message: Ready | Failed = pipe.recv()
    except EOFError:
        worker.join(5)
        code = getattr(worker, "exitcode", None)
        cause = "killed, most likely for want of memory" if code == -9 else f"exit code {code}"
        return Failed(EngramError(f"the engine process ended while loading ({cause})"))
    return message
