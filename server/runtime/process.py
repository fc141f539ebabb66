"""The engine's own process: load, say Ready, then read messages and step until told to stop.

    pipe in   Submit, Abort, UpdateMemory, UpdateEdits, Drain, None (stop)     read without waiting while there is work
    pipe out  Ready | Failed, then StepOutputs, MemoryUpdated     one per step; an idle engine sleeps on the pipe

Between steps, when nothing is left to do, the books are checked: a leak is logged with its name, not found weeks later.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from server.errors import EngramError, PackError
from server.logs import configure
from server.memory.compression import compression_map
from server.memory.device_memory import DeviceMemory
from server.memory.memories import Memories
from server.runtime.attach import MemoryChanges
from server.runtime.blocks import BlockPool
from server.runtime.device_path import DevicePath
from server.runtime.device_runner import DeviceRunner
from server.runtime.engine import Engine
from server.runtime.grammar import Grammars
from server.runtime.load import Loaded, load
from server.runtime.messages import (
    Abort,
    Drain,
    Failed,
    Ready,
    StepOutputs,
    Submit,
    TokenOutput,
    UpdateEdits,
    UpdateMemory,
)
from server.runtime.names import served_models
from server.runtime.overlap import OverlappedEngine
from server.runtime.report import describe
from server.runtime.runner import Runner, Sizes
from server.settings import Settings

logger = logging.getLogger(__name__)

# How long an idle engine sleeps before it looks at its tables' files, and at a pack being opened.
IDLE_SECONDS, OPENING_SECONDS = 2.0, 0.01


def build_engine(settings: Settings, loaded: Loaded) -> Engine:
    """The engine over a loaded model; one step ahead of itself where decode steps stay on the device."""
    runner = build_runner(settings, loaded)
    kind: type[Engine] = OverlappedEngine if isinstance(runner, DeviceRunner) else Engine
    pool = BlockPool(loaded.kv.blocks, settings.block_size, prefix_cache=settings.prefix_cache == "on")
    return kind(
        runner,
        pool,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=loaded.token_budget,
        max_model_len=loaded.max_len,
        vocab_size=loaded.source.config.vocab_size,
        eos_ids=loaded.source.config.eos_token_ids,
        max_waiting=settings.max_waiting,
        packs={pack.name: pack.fingerprint for pack in loaded.memories.packs} if loaded.memories else None,
        fixed=loaded.fixed,
        redirectable=loaded.redirectable,
        grammars=Grammars(
            lambda: loaded.source.tokenizer, loaded.source.config.vocab_size, loaded.source.config.eos_token_ids
        ),
    )


def build_runner(settings: Settings, loaded: Loaded) -> Runner:
    """The runner for the loaded model's device; decode steps are captured here."""
    sizes = Sizes(max_num_seqs=settings.max_num_seqs, max_len=loaded.max_len, block_size=settings.block_size)
    path, steps = loaded.device_path, None
    if path is not None:
        window = loaded.memories.window if loaded.memories is not None else 1
        graphs = settings.cuda_graphs == "on"
        memory = device_memory(path, loaded.memories, settings) if path.paged and loaded.memories else None
        steps = path.build(loaded.model, loaded.attention, memory, **sizes, window=window, graphs=graphs)
        if memory is not None and steps is not None:
            path.serve_fetches(memory)
        elif memory is not None:
            memory.give_up()
    arguments = loaded.model, loaded.attention, loaded.memories
    if steps is None:
        return Runner(*arguments, **sizes, device=loaded.device)
    return DeviceRunner(steps, *arguments, **sizes, device=loaded.device)


def device_memory(path: DevicePath, memories: Memories, settings: Settings) -> DeviceMemory | None:
    """What decode steps read; None where it has no room, and the host reads for whoever sees a memory."""
    most = settings.max_num_seqs
    try:
        return DeviceMemory(memories, most)
    except torch.cuda.OutOfMemoryError:
        memories.direct = None
        memories.prefetcher.unmirror()
        path.note(
            f"memories are read on the host, step by step: what decode steps of {most} sequences need to read them "
            f"does not fit into what is free on the device; set --max-num-seqs {max(most // 2, 1)} or lower --kv-bytes"
        )
        return None


def ready_message(settings: Settings, loaded: Loaded) -> Ready:
    name = settings.served_model_name or loaded.source.name
    packs = tuple(pack.name for pack in loaded.memories.packs) if loaded.memories else ()
    return Ready(
        models=served_models(name, packs, packs, loaded.fixed),
        max_model_len=loaded.max_len,
        vocab_size=loaded.source.config.vocab_size,
        report=tuple(describe(loaded, settings)),
        name=name,
        packs=packs,
        fixed=loaded.fixed,
    )


class EngineLoop:
    """Messages in, steps, messages out, over one end of a pipe."""

    def __init__(self, engine: Engine, pipe: Connection, changes: MemoryChanges) -> None:
        self.engine, self.pipe, self.changes = engine, pipe, changes
        self.told: tuple[str | None, tuple[str, ...]] = None, ()  # faults and notes
        self.deadline: float | None = None
        self.stopped = False

    def run(self) -> None:
        """Until told to stop, drained, or the other side is gone."""
        try:
            while not self.stopped:
                self._receive()
                if not self.stopped and not self.engine.idle:
                    self.pipe.send(self.engine.step())
                self._send_all(self.changes.settle())
                self._drain()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            logger.info("the API process is gone; the engine ends")

    def _receive(self) -> None:
        timeout = 0.0
        if self.engine.idle:
            self.engine.scheduler.check()
            timeout = 0.0 if self.deadline is not None else OPENING_SECONDS if self.changes.busy else IDLE_SECONDS
            self._watch_tables()
        while not self.stopped and self.pipe.poll(timeout):
            self._handle(self.pipe.recv())
            timeout = 0.0

    def _handle(self, message: Any) -> None:
        match message:
            case Submit():
                try:
                    self.engine.submit(message)
                except EngramError as error:
                    self._send_outputs([refusal(message, error)])
            case Abort(targets):
                for request_id, index in targets:
                    self.engine.abort(request_id, index)
                if self.engine.idle:
                    self._send_outputs([])
            case UpdateMemory():
                self._send_all(self.changes.begin(message))
            case UpdateEdits(scope, rows):
                self.engine.update_edits(scope, rows)
            case Drain(seconds):
                self.engine.draining = True
                self.deadline = time.monotonic() + seconds
            case None:
                self.stopped = True

    def _drain(self) -> None:
        if self.deadline is None:
            return
        if self.engine.idle:
            self.stopped = True
        elif time.monotonic() > self.deadline:
            left = self.engine.scheduler.sequences()
            for sequence in left:
                self.engine.abort(sequence.request_id, sequence.index)
            self._send_outputs([TokenOutput(s.request_id, s.index, (), finish_reason="abort") for s in left])

    def _watch_tables(self) -> None:
        """Without steps nobody reads tables; what happens to their files is told all the same."""
        memories = self.engine.runner.memories
        if memories is None:
            return
        memories.check_files()
        stats = self.engine.stats()
        if (stats.table_fault, stats.notes) != self.told:
            self.told = stats.table_fault, stats.notes
            self.pipe.send(StepOutputs((), stats))

    def _send_all(self, messages: Sequence[object]) -> None:
        for message in messages:
            self.pipe.send(message)

    def _send_outputs(self, outputs: list[TokenOutput]) -> None:
        self.pipe.send(StepOutputs(tuple(outputs), self.engine.stats()))


def refusal(request: Submit, error: EngramError) -> TokenOutput:
    """All children of a refused request end with the error; the API answers with its status."""
    return TokenOutput(request.request_id, -1, (), finish_reason="error", error=error)


def engine_main(settings: Settings, pipe: Connection) -> None:
    """Entry point of the spawned process. Never raises: what goes wrong while loading is sent as Failed."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the API process decides when to stop
        configure(settings, "engine")
    try:
        loaded = load(settings)
        engine = build_engine(settings, loaded)
        if settings.packs_dir:
            with contextlib.suppress(PackError):  # of a tokenizer that no hashed memory fits
                compression_map(loaded.source.tokenizer.backend)  # a second of Python, now rather than beside steps
        if engine.grammars is not None:
            engine.grammars.prepare()
        message: Ready | Failed = ready_message(settings, loaded)
    except EngramError as error:
        message = Failed(error)
    except Exception as error:
        logger.exception("the engine could not start")
        message = Failed(EngramError(f"the engine could not start: {type(error).__name__}: {error}"))
    pipe.send(message)
    if isinstance(message, Ready):
        changes = MemoryChanges(engine, settings, loaded)
        EngineLoop(engine, pipe, changes).run()
        changes.close()
        memories = engine.runner.memories  # made with the first pack, at start or live
        if memories is not None:
            memories.close()
    pipe.close()
