"""Prefetcher: fetches a step's rows on a worker thread while the layers before their reader compute.

    engine    begin ─ embed ─ block 0 ─ wait(1) ─ block 1 ─ … ─ block 14 ─ wait(15) ─ …
    worker       └─ layer 1: gather, decode ─ layer 15: gather, decode ─ idle

One worker, first in first out: lookups take turns in layer order and a layer waits for its own rows, nothing else.
With prefetch=False the caller's thread fetches inside `wait`, so that on a CPU the whole fetch counts as stall.

Times, in seconds: fetch = issued to ready, stall = really waited, by the layer's own clock (on CUDA its stream's);
overlap = 1 - Σ stall / Σ fetch.
Shapes: T tokens, C rows per token, D values per row, O n-gram orders, U distinct rows. Knows ids, never tokens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import NoReturn

import torch
from torch import Tensor

from server.cache.counters import LayerCounters
from server.cache.hot_rows import HotRows, Source
from server.cache.lookup import Fetch, Lookup, UniqueRows
from server.cache.pinned_table import PinnedTable
from server.cache.row_reader import RowReader
from server.cache.row_table import Table
from server.cache.staging import HALVES, Staging, step_bytes
from server.cache.stream_stall import StreamStall
from server.cache.tally import Tally
from server.errors import CapacityError, NotReady, StepFailed
from server.metrics import MEMORY_FETCH

__all__ = ["Fetch", "LayerCounters", "Lookup", "Prefetcher", "UniqueRows"]

logger = logging.getLogger(__name__)

MAX_HINTS = 64

Job = Callable[[], object]


class Prefetcher:
    """`dtype`, `device`: the model's. `staging_bytes` bounds the buffers (`staging.max_tokens` says what that allows).
    `hot`: the device cache; None: every row is read from its table.

    `begin`, `hint`, `wait`, `settle`, `cache`, `read_in_place` and `forget` belong to one thread, the engine's;
    `close`, `counters` and `between_fetches` may be called from any.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        staging_bytes: int,
        prefetch: bool = True,
        hot: HotRows | None = None,
        fetch_bounds: tuple[float, ...] = MEMORY_FETCH.buckets,
    ) -> None:
        self.staging, self.hot = Staging(staging_bytes, dtype, device), hot
        self._reader = RowReader(self.staging, hot)
        self._step = 0
        self._oldest = 0  # rows of steps before this one are being overwritten
        self._hints: list[Fetch] = []
        self.uncached: dict[str, str] = {}  # table → why its rows cannot be cached
        self._fetch_bounds = fetch_bounds
        self._tallies: dict[tuple[str, int], Tally] = {}
        self._waited: deque[tuple[Fetch, float | StreamStall]] = deque()  # and how long, not added up yet
        self._lock, self._counting = threading.Lock(), threading.Lock()  # closing against queueing; adding up
        self._closed = False
        self._queue: SimpleQueue[list[Fetch] | Job | None] = SimpleQueue()
        self._jobs: SimpleQueue[Job] = SimpleQueue()  # for `settle`
        self._settled = 0
        self._worker = threading.Thread(target=self._work, name="prefetcher", daemon=True) if prefetch else None
        if self._worker is not None:
            self._worker.start()

    @property
    def ahead(self) -> bool:
        """Whether rows are fetched before a layer waits for them; hints are dropped otherwise."""
        return self._worker is not None

    def begin(self, lookups: Sequence[Lookup]) -> list[Fetch]:
        """Queues a step's lookups, in layer order, and returns at once; hinted ones are joined.

        Rows of the step before the last are overwritten from now on. Raises CapacityError if the step's rows do not fit
        into half the staging, NotReady after `close`.
        """
        if self._worker is None and self._mirrored is None:
            self._do_jobs()
        issued = time.perf_counter()
        self._step += 1
        self._oldest = self._step - HALVES + 1
        half = self.staging.step_begins(self._step)
        hints, self._hints = self._hints, []
        fetches = self._fetches(lookups, hints, self._step, issued)
        if fetches is None:  # the hints take the room: do without them
            half.restart()
            fetches = self._fetches(lookups, [], self._step, issued) or self._refuse(lookups)
        for hint in hints:
            hint.dropped = hint not in fetches
        self._put([fetch for fetch in fetches if fetch not in hints] if hints else fetches)
        self._count()
        return fetches

    def hint(self, lookups: Sequence[Lookup]) -> None:
        """Starts fetching what the next `begin` will probably ask for; that step's rows go where those of the step
        before the last begun are, so that one must be over.

        A hint that finds no room, or that the next `begin` does not ask for, is dropped.
        """
        if self._worker is None:
            return
        issued, step = time.perf_counter(), self._step + 1
        new: list[Fetch] = []
        for lookup in lookups[: MAX_HINTS - len(self._hints)]:
            new += self._fetches([lookup], [], step, issued) or []
        if new:
            self._oldest = self._step
            self._hints += new
            self._put(new)

    def wait(self, fetch: Fetch) -> Tensor:
        """Blocks until `fetch` is ready and counts it: its rows, [T · C, D] or [U, D]. See `Fetch.wait`."""
        if fetch.step < self._oldest:
            raise StepFailed(f"rows of step {fetch.step} were asked for in step {self._step}: they are overwritten")
        before, device = time.perf_counter(), self.staging.device
        stall: float | StreamStall = 0.0
        if device.type == "cuda":
            stall = StreamStall(device)
        if self._worker is None and fetch.pending.locked():
            fetch.issued = before
            self._serve(fetch)
        with fetch.pending:
            waited = time.perf_counter() - before
        if fetch.error is not None:
            raise fetch.error
        if fetch.copied is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(fetch.copied)
            if fetch.inverse is not None:  # made on the side stream, which would use its memory again
                fetch.inverse.record_stream(stream)
        if isinstance(stall, StreamStall):
            stall.end(device)
        else:
            stall = waited
        if not fetch.counted:
            fetch.counted = True
            self._waited.append((fetch, stall))
        assert fetch.rows is not None  # only dropped hints have none, and nobody holds those
        return fetch.rows

    def counters(self) -> tuple[LayerCounters, ...]:
        self._count()
        return tuple([tally.snapshot(self.hot) for tally in list(self._tallies.values())])

    def between_fetches(self, job: Job) -> None:
        """Has `job` done by the thread that fetches, after what is queued, or by `settle`; dropped after `close`."""
        with self._lock:
            if not self._closed:
                (self._queue if self._mirrored is None else self._jobs).put(job)

    def settle(self, observe: Callable[[HotRows], None] | None = None) -> None:
        """With a mirrored cache, between two steps on the current stream: does one job and lets `observe` tell what
        the device looked up; then the hottest enter now and then. Nothing while a fetch reads the cache; never waits
        for one.
        """
        hot = self._mirrored
        if hot is None:
            return
        with hot.changing() as mine:
            if not mine:
                return
            self._settled += 1
            with suppress(Empty):
                self._do(self._jobs.get_nowait())
            if observe is not None:
                observe(hot)
            self._learn(self._settled)

    def unmirror(self) -> None:
        """No decode step on the device came of a mirrored cache: what changes it is the fetching thread's again."""
        hot = self._mirrored
        if hot is not None:
            hot.unmirror()
            with self._lock, suppress(Empty):
                while True:
                    self._queue.put(self._jobs.get_nowait())

    def cache(self, sources: Sequence[Source]) -> None:
        """Has the rows of these sources cached from now on, if there is a cache; the log says where they cannot be."""
        hot = self.hot
        if hot is not None and sources:
            self._between_or_now(partial(self._add_sources, hot, tuple(sources)))

    def read_in_place(self, tables: Sequence[tuple[PinnedTable, int, tuple[int, ...]]]) -> None:
        """From the next fetch on the device reads the rows of these tables itself; of each the table, its rows a token
        and its orders. Reads one row of each at once. Raises what that raises, such as a kernel that fails to compile;
        nothing changes then."""
        for table, columns, orders in tables:
            self._reader.try_in_place(table, columns, orders)
        self._reader.in_place = frozenset(table for table, _, _ in tables)

    def forget(self, tables: Sequence[Table]) -> None:
        """Nothing is left of these tables' rows, here and in the cache, once what is queued now is over."""
        for hint in self._hints:
            hint.dropped = hint.dropped or any(hint.lookup.table is table for table in tables)
        self._hints = [hint for hint in self._hints if not hint.dropped]
        self._reader.in_place -= set(tables)
        self._count()
        if self.hot is not None:
            for table in tables:
                self.uncached = {name: note for name, note in self.uncached.items() if name != table.name}
                self._between_or_now(partial(self.hot.remove, table))

    def _add_sources(self, hot: HotRows, sources: Sequence[Source]) -> None:
        for source in sources:
            refused = hot.add(source)
            if refused is not None:
                note = f"table {source.table.name} is read without the device cache: {refused}"
                self.uncached = {**self.uncached, source.table.name: note}
                logger.warning("%s", note)

    def _between_or_now(self, job: Job) -> None:
        """Without a worker the caller is the thread that fetches."""
        if self._worker is None and self._mirrored is None:
            self._do(job)
        else:
            self.between_fetches(job)

    def fetch_counts(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """(table, layer) → fetches by duration: one count per bound of `fetch_bounds`, in seconds, and one beyond."""
        self._count()
        return {key: tuple(tally.durations) for key, tally in list(self._tallies.items())}

    def close(self) -> None:
        """Ends the worker; fetches not yet served fail with NotReady. May be called twice, and from any thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if self._worker is not None:
            self._worker.join()

    def _fetches(
        self, lookups: Sequence[Lookup], hints: Sequence[Fetch], step: int, issued: float
    ) -> list[Fetch] | None:
        """For every lookup the hint that asked for the same rows, or a new fetch; None if those find no room."""
        half, itemsize = self.staging.half(step), self.staging.dtype.itemsize
        fetches = []
        for lookup in lookups:
            fetch = next((hint for hint in hints if hint.lookup.same_rows(lookup)), None) if hints else None
            if fetch is None:
                begin = half.reserve(lookup.row_ids.size * lookup.table.dim * itemsize)
                if begin is None:
                    return None
                fetch = Fetch(self, lookup, begin, step, issued)
            fetches.append(fetch)
        return fetches

    def _refuse(self, lookups: Sequence[Lookup]) -> NoReturn:
        needed = step_bytes((lookup.row_ids.size * lookup.table.dim for lookup in lookups), self.staging.dtype)
        raise CapacityError(
            f"the rows of a step of {len(lookups[0].row_ids)} tokens need {needed} bytes of staging; "
            f"--staging gives {HALVES * self.staging.half_bytes}: raise it or lower --max-num-batched-tokens"
        )

    def _put(self, fetches: list[Fetch]) -> None:
        with self._lock:
            if self._closed:
                raise NotReady("the prefetcher is closed; the engine is stopping")
            if self._worker is not None and fetches:
                self._queue.put(fetches)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if callable(work):
                self._do_in_turn(work)
            else:
                self._serve_all(work)
            del work  # while idle, nobody's table is held on to

    def _serve_all(self, fetches: Sequence[Fetch]) -> None:
        for fetch in fetches:
            self._serve(fetch)
        hot = self._reader.hot  # asked once: where it fails in `settle`, it is gone the next time
        if fetches and hot is not None:
            with hot.turn:
                if not hot.mirrored:
                    self._learn(fetches[-1].step)

    @property
    def _mirrored(self) -> HotRows | None:
        """The cache, if what changes it belongs to `settle`."""
        hot = self._reader.hot
        return hot if hot is not None and hot.mirrored else None

    def _do_jobs(self) -> None:
        """Without a worker: what it would do between fetches."""
        self._learn(self._step)
        while True:
            try:
                job = self._queue.get_nowait()
            except Empty:
                return
            if callable(job):
                self._do(job)

    def _do_in_turn(self, job: Job) -> None:
        """On the worker: a job, or leaves it to `settle` if the cache has been mirrored since it was queued."""
        hot = self._reader.hot
        with hot.turn if hot is not None else nullcontext():
            if hot is None or not hot.mirrored:
                self._do(job)
                return
        self._jobs.put(job)

    def _do(self, job: Job) -> None:
        try:
            job()
        except Exception:
            logger.exception("work between fetches failed")

    def _learn(self, step: int) -> None:
        if self._reader.hot is None:
            return
        try:
            self._reader.hot.learn_if_due(step)
        except Exception:  # rows can be had without a cache, and not without this thread
            logger.exception("the device cache failed and is not used any more")
            self._reader.hot = None

    def _serve(self, fetch: Fetch) -> None:
        """Reads the fetch's rows, or keeps the error for `wait`."""
        try:
            if self._closed:
                raise NotReady("the prefetcher was closed before these rows were read")
            if not fetch.dropped:
                self._reader.fill(fetch)
        except Exception as error:
            fetch.error = error
        fetch.done_at = time.perf_counter()
        fetch.pending.release()

    def _count(self) -> None:
        """Adds up what was waited for, a whole step's at once: between layers each addition would find its code and its
        numbers gone from the processor's caches."""
        with self._counting:
            while self._waited:
                fetch, stall = self._waited[0]
                seconds = stall.seconds() if isinstance(stall, StreamStall) else stall
                if seconds is None:  # the stream is not past it
                    break
                self._waited.popleft()
                self._tally(fetch.lookup).add(fetch, seconds)

    def _tally(self, lookup: Lookup) -> Tally:
        key, kind = (lookup.table.name, lookup.layer), (lookup.table.row_bytes, lookup.orders)
        tally = self._tallies.get(key)
        if tally is None or (tally.row_bytes, tally.orders) != kind:  # the name may be another pack's by now
            tally = self._tallies[key] = Tally(*key, *kind, self._fetch_bounds)
        return tally
