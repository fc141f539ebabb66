"""HotRows: the rows most asked for, kept in device memory. It never changes a value, only where it is read.

    keys[T, O] ─ find ─→ hit:  the n-gram's heads, one run of bytes on the device
                       └ miss: left to the table; remembered, and every few steps the hottest of them enter

An entry is one n-gram's heads together: one hash drives them, so they are hot together. For token-id tables it is one
row. Tags compare exactly on (table, layer, order, key), where the key is the hash before the modulus; a reloaded table
gets a new generation of tags, so that nothing cached before answers for it. There is one pool per entry size.

Shapes: T tokens, O orders, C = O · heads rows a token, N = T · O entries, R bytes a row, E = heads · R. Knows ids and
keys, never tokens. `find`, `assemble` and `learn` belong to one thread, the prefetcher's; the rest may be called from
any.

Once `mirrored`, lookups on the device read tags and rows too, and whatever changes those (`learn`, `adopt`, `reload`)
belongs to the thread and stream that launch them, between two launches and within `changing`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.cache.cuda_memory import send
from server.cache.hot_pool import HotPool, Newcomers, mixed
from server.cache.hot_sources import Source, SourceKey, shares
from server.cache.row_table import Ids, Table
from server.cache.row_types import Bytes
from server.cache.sketch import Counts, Hashes
from server.errors import TableError

if TYPE_CHECKING:
    from kernels.row_lookup import HotTags

__all__ = ["Found", "HotRows", "Occupancy", "Source", "SourceKey"]

EVERY = 16  # steps between two admission passes
MANY = 1 << 14  # entries remembered that start a pass at once, as a long prefill does
MOST = 512  # entries a source may bring in per pass
SPARE_LINES = 64  # orders of sources that come later
NOT_HERE = -2  # an owner of nothing


class Occupancy(NamedTuple):
    """Of a table's pool: the rows it has room for, shared with tables of the same entry size, and the bytes in use by
    this one."""

    capacity: int
    nbytes: int


@dataclass(slots=True, eq=False)
class Found:
    """The answer to one lookup: slots[N] of its entries, -1 for those that `misses` lists beside `hits`."""

    source: Source
    pool: HotPool
    owners: Ids
    keys: Ids
    hashes: Hashes
    slots: Ids
    hits: Ids
    misses: Ids

    def hits_by_order(self) -> list[int]:
        orders = len(self.source.orders)
        return [len(self.hits)] if orders == 1 else np.bincount(self.hits % orders, minlength=orders).tolist()


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A lookup to learn from: what was found, and the rows and askers of its entries, [N, heads] and [N]."""

    found: Found
    row_ids: Ids
    askers: Ids | None


class HotRows:
    """`nbytes` of device memory for `sources`, each with a (table name, layer) of its own.

    Raises CapacityError, with the value that would do, if one set of every pool does not fit.
    """

    def __init__(
        self, nbytes: int, sources: Sequence[Source], device: torch.device, *, every: int = EVERY, most: int = MOST
    ) -> None:
        self.sources = {source.key: source for source in sources}
        self.every, self.most = every, most
        self.pools = {size: HotPool(size, share, device) for size, share in shares(nbytes, sources).items()}
        starts = np.cumsum([0] + [len(source.orders) for source in sources]).tolist()
        ranges = [slice(first, end) for first, end in pairwise(starts)]
        self._lines = dict(zip(self.sources, ranges, strict=True))  # a number for each (source, order)
        self._line_count = starts[-1] + SPARE_LINES
        self._free = list(range(starts[-1], self._line_count))
        self.generation, self._newest = dict.fromkeys(self.sources, 0), 0
        self._owners = {key: self._owners_of(key) for key in self.sources}
        self._admissions = np.zeros(self._line_count, np.int64)
        self._evictions = np.zeros(self._line_count, np.int64)
        self._held = np.zeros(self._line_count, np.int64)
        self._seen: dict[SourceKey, list[Seen]] = {}
        self._remembered, self._learned_at = 0, 0
        self._lock = threading.Lock()  # the tags, against reload and hot lists
        self.device, self.mirrored = device, False
        self.turn = threading.Lock()  # held from finding entries to reading them, and while they change
        self._read: torch.cuda.Event | None = None  # the end of the last read on the prefetcher's stream
        self._changed: torch.cuda.Event | None = None  # the end of the last change
        self._device_owners: dict[SourceKey, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Of entries, on the device."""
        return sum(pool.nbytes for pool in self.pools.values())

    @property
    def host_bytes(self) -> int:
        """Of tags, counts and sketches, in host memory."""
        return sum(pool.host_bytes for pool in self.pools.values())

    # ── a step's lookups ───────────────────────────────────────────────────────────────────────────────────────────

    def find(self, table: Table, layer: int, keys: Ids) -> Found | None:
        """Looks keys[T, O] up. None for tables that are not cached here."""
        source = self.sources.get((table.name, layer))
        if source is None or source.table is not table:
            return None
        pool = self.pools[source.entry_bytes]
        owners = np.broadcast_to(self._owners[source.key], keys.shape).reshape(-1)
        flat = np.ascontiguousarray(keys).reshape(-1)
        hashes = mixed(owners, flat)
        with self._lock:
            slots = pool.find(owners, flat, hashes)
        hit = slots >= 0
        return Found(source, pool, owners, flat, hashes, slots, np.flatnonzero(hit), np.flatnonzero(~hit))

    def assemble(self, found: Found, missed: Bytes, out: Bytes) -> None:
        """On CPU: entries → out[N, E], hits from the cache and missed[M, E] from where the table was read to."""
        if not len(found.misses):
            found.pool.read(found.slots, slice(None), out)
            return
        words = out.view(np.int64) if out.shape[1] % 8 == 0 else out
        words[found.misses] = missed.view(words.dtype)
        if len(found.hits):
            found.pool.read(found.slots[found.hits], found.hits, out)

    def assemble_on_device(self, found: Found, missed: Tensor) -> Tensor:
        """uint8[N, E] on the device, on the current stream; missed[M, E] is there already."""
        if self._changed is not None:
            torch.cuda.current_stream(self.device).wait_event(self._changed)
        raw = torch.empty(len(found.slots), found.pool.entry_bytes, dtype=torch.uint8, device=missed.device)
        raw.index_copy_(0, torch.from_numpy(found.misses).to(missed.device), missed)
        hits = torch.from_numpy(found.hits).to(missed.device)
        raw.index_copy_(0, hits, found.pool.read_on_device(found.slots[found.hits]))
        if self.mirrored:
            self._read = torch.cuda.current_stream(self.device).record_event()
        return raw

    def remember(self, found: Found, row_ids: Ids, askers: Ids | None) -> None:
        """Keeps a lookup for the next `learn`: its row_ids[N · heads], and which request each token is of, [T]."""
        orders = len(found.source.orders)
        by_entry = None if askers is None else np.repeat(askers, orders)
        seen = Seen(found, row_ids.reshape(-1, found.source.heads), by_entry)
        self._seen.setdefault(found.source.key, []).append(seen)
        self._remembered += len(found.slots)

    def learn_if_due(self, step: int) -> None:
        """`learn`, if so many steps have passed or so much is remembered."""
        if self._remembered and (step - self._learned_at >= self.every or self._remembered >= MANY):
            self._learned_at = step
            self.learn()

    def learn(self) -> None:
        """One admission pass: counts what was hit and missed, and lets the hottest in."""
        seen, self._seen, self._remembered = self._seen, {}, 0
        for key, lookups in seen.items():
            self._learn_source(self.sources[key], lookups)

    def _learn_source(self, source: Source, seen: Sequence[Seen]) -> None:
        pool = seen[0].found.pool
        asked = all(lookup.askers is not None for lookup in seen)
        hits = np.concatenate([lookup.found.slots[lookup.found.hits] for lookup in seen])
        who = np.concatenate([_at(lookup.askers, lookup.found.hits) for lookup in seen]) if asked else None
        missed = [(lookup, lookup.found.misses) for lookup in seen if len(lookup.found.misses)]
        with self._lock:
            pool.age(sum(len(lookup.found.slots) for lookup in seen))
            pool.hit(hits, who)
        if not missed:
            return
        hashes = np.concatenate([lookup.found.hashes[places] for lookup, places in missed])
        distinct, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        owners = np.concatenate([lookup.found.owners[places] for lookup, places in missed])[first]
        keys = np.concatenate([lookup.found.keys[places] for lookup, places in missed])[first]
        with self._lock:
            newcomers = pool.choose(distinct, counts, self.most)
        if not len(newcomers.places):
            return
        row_ids = np.concatenate([lookup.row_ids[places] for lookup, places in missed])[first]
        self._enter(source, newcomers, owners, keys, row_ids)

    def _enter(self, source: Source, newcomers: Newcomers, owners: Ids, keys: Ids, row_ids: Ids) -> None:
        """Reads the newcomers' rows and puts them in; all arrays by entry, of which newcomers.places enter."""
        chosen = newcomers.places
        if not len(chosen):
            return
        rows = np.empty((len(chosen) * source.heads, source.table.row_bytes), np.uint8)
        try:
            source.table.gather(np.ascontiguousarray(row_ids[chosen]).reshape(-1), rows)
        except TableError:
            return  # the table remembers its fault, and the next request that needs it is told
        pool = self.pools[source.entry_bytes]
        entries = rows.reshape(len(chosen), source.entry_bytes)
        with self._lock:
            left = pool.enter(newcomers, owners[chosen], keys[chosen], entries)
            entered = np.bincount(owners[chosen] % self._line_count, minlength=self._line_count)
            evicted = np.bincount(left % self._line_count, minlength=self._line_count)
            self._admissions += entered
            self._evictions += evicted
            self._held += entered - evicted

    # ── lookups on the device ──────────────────────────────────────────────────────────────────────────────────────

    def mirror(self) -> None:
        """Keeps the tags on the device too, from now on; once more for sources that came later."""
        with self.turn, torch.inference_mode(False):
            self.mirrored = True
            for pool in self.pools.values():
                pool.mirror()
            for key, owners in self._owners.items():
                if key not in self._device_owners:
                    self._device_owners[key] = torch.from_numpy(owners).to(self.device, copy=True)

    def unmirror(self) -> None:
        """Nothing on the device reads the tags after all: changes are made as without `mirror`."""
        with self.turn:
            self.mirrored = False
            for pool in self.pools.values():
                pool.tags = None
            self._device_owners.clear()

    def on_device(self, key: SourceKey) -> tuple[HotTags, Tensor]:
        """Of a mirrored cache: the tags of the source's pool and its owners [O], rewritten in place for good."""
        tags = self.pools[self.sources[key].entry_bytes].tags
        assert tags is not None
        return tags.hot, self._device_owners[key]

    @contextmanager
    def changing(self) -> Iterator[bool]:
        """Of a mirrored cache: within, entries may change, after the reads issued so far and before any later one.
        False, and nothing may, while the prefetcher is between finding entries and reading them. Never waits."""
        if not self.turn.acquire(blocking=False):
            yield False
            return
        try:
            cuda = self.device.type == "cuda"
            if cuda and self._read is not None:
                torch.cuda.current_stream(self.device).wait_event(self._read)
            yield True
            if cuda:
                self._changed = torch.cuda.current_stream(self.device).record_event()
        finally:
            self.turn.release()

    # ── hot lists and reload ───────────────────────────────────────────────────────────────────────────────────────

    def adopt(self, source: Source, order: int, keys: Ids, heat: Counts, row_ids: Ids) -> int:
        """Lets entries of a hot list in: distinct keys[M] of the order-th order, asked for heat[M] times, their
        rows[M, heads]. Returns how many entered; those that are here already, or colder than what is, do not.

        Belongs to the thread of `find`.
        """
        known = self.sources.get(source.key)
        if known is None or known.table is not source.table:  # removed meanwhile; another may have its name
            return 0
        pool = self.pools[source.entry_bytes]
        owners = np.full(len(keys), self._owners[source.key][order])
        hashes = mixed(owners, keys)
        with self._lock:
            new = np.flatnonzero(pool.find(owners, keys, hashes) < 0)
            newcomers = pool.choose(hashes[new], heat[new], len(new))
        self._enter(source, newcomers, owners[new], keys[new], row_ids[new])
        with self._lock:
            slots = pool.find(owners, keys, hashes)
            pool.mark_shared(slots[slots >= 0])
        return len(newcomers.places)

    def hot_list(self, source: Source) -> list[tuple[Ids, Counts]]:
        """Per order, the keys that several distinct requests asked for and how often, aged."""
        pool = self.pools[source.entry_bytes]
        with self._lock:
            owners = self._owners.get(source.key, np.full(len(source.orders), NOT_HERE))
            return [pool.shared(owner) for owner in owners.tolist()]

    def reload(self, table: Table) -> None:
        """Forgets all rows of this table: its file is about to be another."""
        for key, source in self.sources.items():
            if source.table is table:
                with self._lock:
                    for owner in self._owners[key].tolist():
                        self.pools[source.entry_bytes].drop(owner)
                    self._held[self._lines[key]] = 0
                    self.generation[key] += 1
                    self._newest = max(self._newest, self.generation[key])
                    self._owners[key] = self._owners_of(key)
                    if key in self._device_owners:  # not one that was added after `mirror`
                        self._device_owners[key].copy_(send(self._owners[key], self.device), non_blocking=True)

    def add(self, source: Source) -> str | None:
        """Caches this source too, in the pool of its entry size; why not, where it cannot. The thread of `find`."""
        if source.entry_bytes not in self.pools:
            return f"--device-cache has no pool for entries of {source.entry_bytes} bytes"
        count = len(source.orders)
        lines = next((line for line in self._free if {*range(line, line + count)} <= {*self._free}), None)
        if lines is None or source.key in self.sources:
            return f"the device cache holds as many tables as it can name, {len(self.sources)}"
        with self._lock:
            self._free = [line for line in self._free if not lines <= line < lines + count]
            self._lines[source.key] = slice(lines, lines + count)
            for sums in (self._admissions, self._evictions, self._held):
                sums[self._lines[source.key]] = 0
            self._newest += 1  # of the lines' owners before, tags may still be remembered
            self.sources[source.key], self.generation[source.key] = source, self._newest
            self._owners[source.key] = self._owners_of(source.key)
        return None

    def remove(self, table: Table) -> None:
        """Forgets all rows of this table and the table itself. The thread of `find`."""
        self.reload(table)
        with self._lock:
            for key in [key for key, source in self.sources.items() if source.table is table]:
                self._seen.pop(key, None)
                lines = self._lines.pop(key)
                self._free = sorted([*self._free, *range(lines.start, lines.stop)])
                self._device_owners.pop(key, None)
                del self.sources[key], self._owners[key], self.generation[key]

    def figures(self, key: SourceKey) -> tuple[Occupancy, list[tuple[int, int]]] | None:
        """What the source holds and what moved, by order; None if it is not cached here."""
        with self._lock:
            return (self.occupancy(key), self.moves(key)) if key in self.sources else None

    def moves(self, key: SourceKey) -> list[tuple[int, int]]:
        """Per order, the rows that entered and the rows that left so far."""
        lines, heads = self._lines[key], self.sources[key].heads
        pairs = zip(self._admissions[lines].tolist(), self._evictions[lines].tolist(), strict=True)
        return [(entered * heads, left * heads) for entered, left in pairs]

    def occupancy(self, key: SourceKey) -> Occupancy:
        source = self.sources[key]
        held = int(self._held[self._lines[key]].sum())
        return Occupancy(self.pools[source.entry_bytes].capacity * source.heads, held * source.entry_bytes)

    def _owners_of(self, key: SourceKey) -> Ids:
        """[O] the owners of this generation: never used before, since tags of an older one may still be remembered."""
        first = self._lines[key].start + self.generation[key] * self._line_count
        return np.arange(first, first + len(self.sources[key].orders))


def _at(askers: Ids | None, places: Ids) -> Ids:
    assert askers is not None
    return askers[places]
