"""Prefetcher: fetches a step's rows on a worker thread while the layers before their reader compute.

    engine    begin ─ embed ─ block 0 ─ wait(1) ─ block 1 ─ … ─ block 14 ─ wait(15) ─ …
    worker       └─ layer 1: gather, decode ─ layer 15: gather, decode ─ idle

One worker, first in first out: lookups take turns in layer order and a layer waits for its own rows, nothing else.
With prefetch=False the caller's thread fetches inside `wait`, so that the whole fetch counts as stall.

Times, in seconds: fetch = issued to ready, stall = really waited; overlap = 1 - Σ stall / Σ fetch.
Shapes: T tokens, C rows per token, D values per row, O n-gram orders, U distinct rows. Knows ids, never tokens.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from server.cache.row_table import Ids, Table
from server.cache.staging import HALVES, Staging, step_bytes
from server.errors import CapacityError, NotReady, StepFailed
from server.metrics import MEMORY_FETCH

DECODE_VALUES = 32768  # values per torch call: a larger call would start a second team of compute threads
MAX_HINTS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Rows row_ids[T, C] of `table`, for `layer`. The arrays must not be changed afterwards.

    `keys`[T, O] names the n-grams behind the rows, for caches. `dedup`: read each distinct row once.
    """

    table: Table
    layer: int
    row_ids: Ids
    keys: Ids | None = None
    dedup: bool = False

    def same_rows(self, other: Lookup) -> bool:
        return self is other or (
            self.table is other.table
            and self.layer == other.layer
            and self.dedup == other.dedup
            and np.array_equal(self.row_ids, other.row_ids)
        )


@dataclass(frozen=True, slots=True)
class UniqueRows:
    """rows[U, D], and inverse[T, C]: which of them each token's columns read."""

    rows: Tensor
    inverse: Tensor


@dataclass(frozen=True, slots=True)
class LayerCounters:
    """Running totals of one (table, layer): rows and bytes read from the table, seconds fetching, seconds waited,
    bytes sent to a device.

    A fetch counts once it has been waited for.
    """

    table: str
    layer: int
    rows: int = 0
    bytes: int = 0
    fetch_s: float = 0.0
    stall_s: float = 0.0
    device_bytes: int = 0


class Fetch:
    """One lookup under way. Its rows may be read until the `hint` or `begin` that follows the next step's `begin`."""

    __slots__ = (
        "begin", "copied", "counted", "done_at", "dropped", "error", "inverse", "issued", "lookup", "pending",
        "prefetcher", "rows", "rows_read", "step",
    )  # fmt: skip

    def __init__(self, prefetcher: Prefetcher, lookup: Lookup, begin: int, step: int, issued: float) -> None:
        self.prefetcher, self.lookup, self.begin, self.step = prefetcher, lookup, begin, step
        self.issued = self.done_at = issued
        self.pending = threading.Lock()  # held until the rows are there; much cheaper to make than an Event
        self.pending.acquire()
        self.error: Exception | None = None
        self.dropped = self.counted = False
        self.rows: Tensor | None = None  # [T · C, D], or [U, D]
        self.rows_read = 0
        self.inverse: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """Blocks until the rows are there: [T, C · D] in the model's dtype and on its device.

        Raises what the table raised (TableError), NotReady if the prefetcher was closed first, StepFailed if the rows
        are overwritten already.
        """
        rows = self.prefetcher.wait(self)
        tokens, columns = self.lookup.row_ids.shape
        if self.inverse is not None:
            rows = rows.index_select(0, self.inverse.view(-1))
        return rows.view(tokens, columns * self.lookup.table.dim)

    def wait_unique(self) -> UniqueRows:
        """As `wait`, for a lookup with `dedup`: the distinct rows and the way back to tokens."""
        rows = self.prefetcher.wait(self)
        if self.inverse is None:
            raise ValueError("wait_unique() is for lookups with dedup=True")
        return UniqueRows(rows, self.inverse)


class Prefetcher:
    """`dtype`, `device`: the model's. `staging_bytes` bounds the buffers (`staging.max_tokens` says what that allows).

    `begin`, `hint` and `wait` belong to one thread, the engine's; `close` and `counters` may be called from any.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        staging_bytes: int,
        prefetch: bool = True,
        fetch_bounds: tuple[float, ...] = MEMORY_FETCH.buckets,
    ) -> None:
        self.staging = Staging(staging_bytes, dtype, device)
        self._step = 0
        self._oldest = 0  # rows of steps before this one are being overwritten
        self._hints: list[Fetch] = []
        self._counters: dict[tuple[str, int], LayerCounters] = {}
        self._fetch_bounds = fetch_bounds
        self._fetch_counts: dict[tuple[str, int], list[int]] = {}
        self._raw = np.empty(0, np.uint8)  # row bytes between gather and decode
        self._lock = threading.Lock()  # closing against queueing
        self._closed = False
        self._queue: SimpleQueue[list[Fetch] | None] = SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="prefetcher", daemon=True) if prefetch else None
        if self._worker is not None:
            self._worker.start()

    def begin(self, lookups: Sequence[Lookup]) -> list[Fetch]:
        """Queues a step's lookups, in layer order, and returns at once; hinted ones are joined.

        Rows of the step before the last are overwritten from now on. Raises CapacityError if the step's rows do not fit
        into half the staging, NotReady after `close`.
        """
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
        before = time.perf_counter()
        if self._worker is None and fetch.pending.locked():
            fetch.issued = before
            self._serve(fetch)
        with fetch.pending:
            stall = time.perf_counter() - before
        if fetch.error is not None:
            raise fetch.error
        if fetch.copied is not None:
            torch.cuda.current_stream(self.staging.device).wait_event(fetch.copied)
        if not fetch.counted:
            fetch.counted = True
            self._count(fetch, stall)
        assert fetch.rows is not None  # only dropped hints have none, and nobody holds those
        return fetch.rows

    def counters(self) -> tuple[LayerCounters, ...]:
        return tuple(self._counters.values())

    def fetch_counts(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """(table, layer) → fetches by duration: one count per bound of `fetch_bounds`, in seconds, and one beyond."""
        return {key: tuple(counts) for key, counts in self._fetch_counts.items()}

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
        while (fetches := self._queue.get()) is not None:
            for fetch in fetches:
                self._serve(fetch)

    def _serve(self, fetch: Fetch) -> None:
        """Reads the fetch's rows, or keeps the error for `wait`."""
        try:
            if self._closed:
                raise NotReady("the prefetcher was closed before these rows were read")
            if not fetch.dropped:
                self._fill(fetch)
        except Exception as error:
            fetch.error = error
        fetch.done_at = time.perf_counter()
        fetch.pending.release()

    def _fill(self, fetch: Fetch) -> None:
        lookup = fetch.lookup
        ids = np.ascontiguousarray(lookup.row_ids.reshape(-1))
        if lookup.dedup:
            ids, inverse = np.unique(ids, return_inverse=True)
            fetch.inverse = torch.from_numpy(inverse.reshape(lookup.row_ids.shape)).to(self.staging.device)
        fetch.rows_read = len(ids)
        half = self.staging.half(fetch.step)
        host, fetch.rows = self.staging.buffers(half, fetch.begin, len(ids), lookup.table.dim)
        self._read(lookup.table, ids, host)
        fetch.copied = self.staging.send(half, host, fetch.rows)

    def _read(self, table: Table, ids: Ids, out: Tensor) -> None:
        """Rows ids[N] → out[N, D]: one gather, straight into `out` if nothing is to be decoded."""
        if table.row_type.is_stored_as(out.dtype) and table.row_bytes == table.dim * out.itemsize:
            table.gather(ids, out.view(torch.uint8).numpy())
            return
        nbytes = len(ids) * table.row_bytes
        if nbytes > len(self._raw):
            self._raw = np.empty(nbytes, np.uint8)
        raw = self._raw[:nbytes].reshape(len(ids), table.row_bytes)
        table.gather(ids, raw)
        piece = max(1, DECODE_VALUES // table.dim)
        for at in range(0, len(ids), piece):
            table.row_type.decode(torch.from_numpy(raw[at : at + piece]), out[at : at + piece])

    def _count(self, fetch: Fetch, stall: float) -> None:
        table, layer = fetch.lookup.table, fetch.lookup.layer
        key = table.name, layer
        sums = self._counters.get(key) or LayerCounters(*key)
        seconds = fetch.done_at - fetch.issued
        sent = fetch.rows_read * table.dim * self.staging.dtype.itemsize if fetch.copied is not None else 0
        self._counters[key] = LayerCounters(
            table.name,
            layer,
            sums.rows + fetch.rows_read,
            sums.bytes + fetch.rows_read * table.row_bytes,
            sums.fetch_s + seconds,
            sums.stall_s + stall,
            sums.device_bytes + sent,
        )
        counts = self._fetch_counts.setdefault(key, [0] * (len(self._fetch_bounds) + 1))
        counts[bisect_left(self._fetch_bounds, seconds)] += 1
