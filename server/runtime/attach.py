"""Packs that come and go while the engine runs.

    attach   a thread opens, checks and sizes the pack ── steps go on ──▶ between two steps it joins
    detach   between two steps no new request sees it  ── running ones read it to their end ──▶ its tables are closed

Tables that come later are read where they lie, also by the host in the midst of a decode step on a GPU; their pages
count under --host-memory-limit like everybody's, and their rows are cached where the device cache has a pool of their
entry size.

What a running sequence sees never changes: its view names packs by identity, and each attachment has one of its own,
so that a pack attached again under its old name is another pack to the prefix cache and to every sequence. Packs whose
rows stand in for a part of the model stay for the engine's life. Knows engine and loading; nothing of who asked.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from server.cache.placement import TableNeed, check_limit
from server.cache.prefetcher import Prefetcher
from server.cache.staging import max_tokens
from server.errors import CapacityError, Conflict, EngramError, NotFound
from server.memory.attached import AttachedPack
from server.memory.device_memory import DeviceMemory
from server.memory.memories import Memories
from server.memory.stem import StemPack
from server.runtime.capacity import mapped_needs
from server.runtime.device_runner import DeviceRunner
from server.runtime.engine import Engine
from server.runtime.host import available_memory
from server.runtime.load import Loaded, fetch_bounds, open_packs, prepack_modules, watch
from server.runtime.messages import MemoryUpdated, UpdateMemory
from server.runtime.names import served_models
from server.settings import Settings

logger = logging.getLogger(__name__)

# Opening a pack is Python here and there. A step asks for the interpreter lock hundreds of times and would wait this
# long each time.
SWITCH_SECONDS = 0.0002


@dataclass(frozen=True, slots=True)
class Opened:
    """A pack ready to join; `memories` where it is the first."""

    pack: AttachedPack
    memories: Memories | None
    seconds: float


class MemoryChanges:
    """The engine's verb `update_memory`. `begin` and `settle` belong to the engine's thread, between steps."""

    def __init__(self, engine: Engine, settings: Settings, loaded: Loaded) -> None:
        self._engine, self._settings, self._loaded = engine, settings, loaded
        self._name = settings.served_model_name or loaded.source.name
        self._default = tuple(engine.packs)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="pack-loader")
        self._opening: deque[tuple[UpdateMemory, Future[Opened]]] = deque()
        self._leaving: list[AttachedPack | StemPack] = []
        self._serial = itertools.count(1)

    @property
    def busy(self) -> bool:
        """Whether `settle` may have something to do although no step was computed."""
        return bool(self._opening or self._leaving)

    def begin(self, update: UpdateMemory) -> list[MemoryUpdated]:
        """Starts a change; its answer comes now or from `settle`."""
        if update.path is None:
            return [self._answer(update, partial(self._detach, update.name))]
        self._opening.append((update, self._loader.submit(self._open, update.name, update.path)))
        return []

    def settle(self) -> list[MemoryUpdated]:
        """Lets in what has been opened and closes what nobody reads any more."""
        answers = []
        while self._opening and self._opening[0][1].done():
            update, opened = self._opening.popleft()
            answers.append(self._answer(update, partial(self._join, opened)))
        if self._leaving:
            read = {pack for s in self._engine.scheduler.sequences() for pack in s.view.packs}
            for pack in [pack for pack in self._leaving if pack.id not in read]:
                self._leaving.remove(pack)
                self._engine.runner.wait()  # for a step whose last sequence that reads the pack was aborted
                self._memories.remove(pack)
                self._renew()
                self._widen_budget()
                logger.info("memory %s is closed", pack.name)
        return answers

    def close(self) -> None:
        self._loader.shutdown(wait=False, cancel_futures=True)

    # ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _memories(self) -> Memories:
        memories = self._engine.runner.memories
        assert memories is not None
        return memories

    def _answer(self, update: UpdateMemory, change: Callable[[], float]) -> MemoryUpdated:
        """Makes the change, which returns the seconds that its pack took to open."""
        begun, seconds = time.perf_counter(), 0.0
        error: EngramError | None = None
        try:
            seconds = change()
        except EngramError as refused:
            error = refused
        except Exception as unexpected:
            logger.exception("memory %s could not be changed", update.name)
            error = EngramError(f"memory {update.name!r} could not be changed: {type(unexpected).__name__}")
        pause = time.perf_counter() - begun
        engine = self._engine
        models = served_models(self._name, tuple(engine.packs), self._default, engine.fixed)
        return MemoryUpdated(update.ticket, models, tuple(engine.packs), error, seconds, pause)

    def _open(self, name: str, path: str) -> Opened:
        """In the loader's thread: all that takes time. Raises PackError, CapacityError or Conflict."""
        begun = time.perf_counter()
        loaded = self._loaded
        settings = replace(self._settings, memory=(f"{name}={path}",))
        with quick_switches():
            pack = open_packs(settings, loaded.source, loaded.dtype, loaded.device)[0]
            prepack_modules(pack, loaded.dtype, loaded.device, loaded.kernels, loaded.rows)
        try:
            if isinstance(pack, StemPack):
                raise Conflict(f"{name!r} is a STEM pack, which is attached when the server starts: --memory")
            pack.fingerprint = f"{pack.fingerprint}#{next(self._serial)}"
            self._allocate(pack)
            if self._loaded.plan.room.host_limit:
                for mapped in pack.mapped:  # here already, since a file in the page cache takes its time to leave it
                    mapped.forget()
            first: Memories | None = None
            if self._engine.runner.memories is None:
                staging, prefetch = self._settings.staging, self._settings.prefetch == "on"
                bounds = fetch_bounds(self._settings)
                prefetcher = Prefetcher(loaded.dtype, loaded.device, staging, prefetch, None, bounds)
                first = Memories((), prefetcher, watch((), loaded.plan))
        except Exception:
            for table in pack.tables.values():
                table.close()
            raise
        return Opened(pack, first, time.perf_counter() - begun)

    def _budget(self, packs: Iterable[AttachedPack | StemPack]) -> int:
        lookups = [(table, pack.addresser.columns) for pack in packs for table in pack.tables.values()]
        return max_tokens(self._settings.staging, lookups, self._loaded.dtype)

    def _widen_budget(self) -> None:
        """Gives back the tokens of a step that only the rows of a pack which has left stood in the way of."""
        most, packs = self._settings.max_num_batched_tokens, self._memories.packs
        scheduler = self._engine.scheduler
        scheduler.budget = max(scheduler.budget, min(most, self._budget(packs)) if packs else most)

    def _allocate(self, pack: AttachedPack) -> None:
        """The pack's convolution inputs, one per token slot of the KV cache, which stands as it is."""
        slots = self._loaded.slots
        needed, device = slots * pack.conv_bytes_per_token, self._loaded.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        if needed > free:
            raise CapacityError(
                f"memory {pack.name!r} needs {needed} bytes for its convolution beside the KV cache's {slots} tokens "
                f"and {free} are free; start the server with a smaller --kv-bytes, or with this pack: --memory"
            )
        try:
            pack.allocate_conv(slots, device)
        except (RuntimeError, MemoryError) as error:
            raise CapacityError(f"no room for {needed} bytes of memory {pack.name!r}'s convolution") from error

    def _join(self, opening: Future[Opened]) -> float:
        opened = opening.result()
        engine, pack = self._engine, opened.pack
        needs = mapped_needs(pack, self._settings.max_num_batched_tokens)
        memories = engine.runner.memories
        try:
            self._check(pack, needs)
            budget = self._budget([*(memories.packs if memories is not None else ()), pack])
        except EngramError:
            for table in pack.tables.values():
                table.close()
            if opened.memories is not None:
                opened.memories.close()
            raise
        if memories is None:
            engine.runner.memories = opened.memories
        elif opened.memories is not None:  # another pack came first
            opened.memories.close()
        self._memories.add(pack, sum(need.step_bytes for need in needs))
        engine.runner.table.widen(self._memories.window)
        self._renew()
        engine.scheduler.budget = min(engine.scheduler.budget, budget)
        engine.packs[pack.name] = pack.fingerprint
        logger.info("memory %s is attached, opened in %.3f s", pack.name, opened.seconds)
        return opened.seconds

    def _renew(self) -> None:
        """Decode steps on a device read the packs that are there now. Where they cannot, the host reads for whoever
        sees one that they do not know."""
        runner, memories = self._engine.runner, self._memories
        if not isinstance(runner, DeviceRunner):
            return
        before, path = runner.steps.memory, self._loaded.device_path
        assert path is not None and (before is None or isinstance(before, DeviceMemory))
        try:
            memory = DeviceMemory(memories, self._settings.max_num_seqs, before=before)
            runner.renew(memory, memories.window)
            path.serve_fetches(memory)
        except (RuntimeError, MemoryError):
            logger.warning("decode steps do not read the memories that changed: no room on the device", exc_info=True)
            memories.direct = before.rows if before is not None else None
            if before is None:
                memories.prefetcher.unmirror()  # else what changes the cache would wait for a launch

    def _check(self, pack: AttachedPack, needs: list[TableNeed]) -> None:
        """Raises Conflict for a name that is taken, CapacityError where --host-memory-limit cannot be held with it."""
        engine, plan = self._engine, self._loaded.plan
        if pack.name in engine.packs:
            raise Conflict(f"a memory {pack.name!r} is attached already; choose another name, or remove that one first")
        tokens, memories = self._settings.max_num_batched_tokens, engine.runner.memories
        for other in memories.packs if memories is not None else ():
            needs = [*needs, *mapped_needs(other, tokens)]
        check_limit(needs, plan.in_ram, plan.room.host_limit)

    def _detach(self, name: str) -> float:
        engine = self._engine
        if name not in engine.packs:
            raise NotFound(f"no memory {name[:200]!r} is attached; there are {', '.join(engine.packs) or 'none'}")
        if name in engine.fixed:
            raise Conflict(f"memory {name!r} stands in for a part of the model and stays as long as the server runs")
        identity = name, engine.packs.pop(name)
        self._leaving += [pack for pack in self._memories.packs if pack.id == identity]
        return 0.0


@contextmanager
def quick_switches() -> Iterator[None]:
    """Within, a thread that waits for the interpreter lock gets it sooner."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
