"""Rows on the device: which packs it can read by itself, their lookups in a step, and what the host learns of them.

    begin     per pack one hash ─ per layer one lookup, earliest layer first
    between   counters and keys ─ copied, a step late ─→ host: counts, and what the cache's policy learns from

A pack is served where the device reads all its tables itself. Shapes: T tokens, K packs, O orders, C rows a token, D
values a row. Knows packs and tables; nothing of views or hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from server.batch import Bools, DecodeBatch, Ints
from server.cache.counters import LayerCounters
from server.cache.device_table import DeviceTable
from server.cache.direct import DirectTable, Observed, with_direct
from server.cache.hot_rows import HotRows
from server.cache.pinned_table import PinnedTable
from server.cache.prefetcher import Prefetcher
from server.cache.tally import Tally
from server.cache.transport import transport
from server.memory.attached import AttachedPack
from server.memory.device_address import DeviceAddresses
from server.memory.stem import StemPack

Pack = AttachedPack | StemPack
Identity = tuple[str, str]


# N-grams a step, on average, that the cache's policy learns from: all of them in small batches, whole steps now and
# then in large ones. Looking one up on the host takes about 0.4 µs there, and the counts that decide only compare.
LEARNED = 256
MOST_PENDING = 16  # steps whose keys wait to be learned from while the prefetcher reads the cache; older ones go


class Step(NamedTuple):
    """What the host knows of a step whose keys are being copied: its tokens, dummies included; which of the real ones,
    the first, see which pack; who asked; whether the cache is to learn from it."""

    tokens: int
    sees: Bools
    askers: Ints | None
    learned: bool


@dataclass(frozen=True, slots=True)
class Served:
    """A pack that the device reads: its place among the attached, addresses and tables by layer; where its keys are
    among the observed words, None where no cache stands in front of its tables."""

    index: int
    pack: Pack
    addresses: DeviceAddresses
    tables: dict[int, DirectTable]
    keys: slice | None


class DeviceRows:
    """Of `packs`, in attachment order, for steps of up to `max_tokens`; model's dtype and device are the prefetcher's.

    The prefetcher's cache, if it is in front of a table that is read here, is mirrored on the device, and what changes
    it then belongs to `between`.
    """

    def __init__(self, packs: Sequence[Pack], prefetcher: Prefetcher, max_tokens: int) -> None:
        staging, hot = prefetcher.staging, prefetcher.hot
        self._prefetcher, self.device, self._dtype, self._max = prefetcher, staging.device, staging.dtype, max_tokens
        self.transports = {t.name: transport(t, self.device) for pack in packs for t in pack.tables.values()}
        chosen = [(index, pack) for index, pack in enumerate(packs) if self._reads(pack)]
        if hot is not None and any(cached(pack, hot) for _, pack in chosen):
            hot.mirror()
        lines = sum(len(pack.addresser.orders) * len(pack.tables) for _, pack in chosen)
        words = [DeviceAddresses.words(pack.addresser, max_tokens) for _, pack in chosen]
        self.observed: Observed[Step] = Observed(2 * lines + sum(words), self.device)
        self._lines, self._counted = lines, np.zeros((lines, 2), np.int64)
        self._pending: list[tuple[Ints, Step]] = []
        self._expected = Step(0, np.zeros((len(packs), 0), bool), None, False)
        self._due = 0  # n-grams to learn from
        self._addressed: dict[Identity, dict[int, tuple[Tensor, Tensor]]] = {}
        self.served: dict[Identity, Served] = {}
        line, begin = 0, 2 * lines
        for (index, pack), size in zip(chosen, words, strict=True):
            tables = {}
            for layer in sorted(pack.tables):
                tables[layer] = self._direct(pack, layer, line)
                line += len(pack.addresser.orders)
            place, begin = slice(begin, begin + size), begin + size
            addresses = DeviceAddresses(pack.addresser, max_tokens, self.observed.words[place])
            keys = place if hot is not None and cached(pack, hot) else None
            self.served[pack.id] = Served(index, pack, addresses, tables, keys)

    def go_on_from(self, before: DeviceRows) -> None:
        """Counts of the tables that both read are taken over. Nothing may be under way on the device."""
        known = {direct.key: direct for served in before.served.values() for direct in served.tables.values()}
        for served in self.served.values():
            for direct in served.tables.values():
                if direct.key in known:
                    direct.counters.copy_(known[direct.key].counters)
        self._counted = self.observed.words[: 2 * self._lines].view(self._lines, 2).cpu().numpy().copy()

    def serve_fetches(self) -> None:
        """Rows that the host asks for, as prefills do, the device reads itself too, where they lie in RAM. Raises what
        reading one raises; the host gathers them then."""
        in_ram = [
            (direct.table, served.pack.addresser.columns, direct.orders)
            for served in self.served.values()
            for direct in served.tables.values()
            if isinstance(direct.table, PinnedTable)
        ]
        self._prefetcher.read_in_place(in_ram)

    def can_read(self, identity: Identity) -> bool:
        """Whether the pack is served, and none of its tables has failed."""
        served = self.served.get(identity)
        return served is not None and all(direct.table.fault is None for direct in served.tables.values())

    def in_layer_order(self) -> list[tuple[int, Pack, int]]:
        """(place of the pack, pack, layer) of every lookup of a step, as the layers will ask."""
        found = [
            (layer, isinstance(served.pack, StemPack), served.index, served.pack)
            for served in self.served.values()
            for layer in served.tables
        ]
        return [(index, pack, layer) for layer, _, index, pack in sorted(found, key=lambda each: each[:3])]

    # ── within a launch ────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, pack: Pack, layer: int, batch: DecodeBatch, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The pack's rows [T, C · D] and their ids [T, C], until the next step; rows of tokens that do not see the pack
        are left as they were. Its addresses are made with its first layer's rows. On the current stream; may be
        captured.
        """
        served = self.served[pack.id]
        if layer == min(served.tables):
            self._addressed[pack.id] = served.addresses.of(batch)
        row_ids, keys = self._addressed[pack.id][layer]
        return served.tables[layer].lookup(row_ids, keys, seen), row_ids

    # ── between launches ───────────────────────────────────────────────────────────────────────────────────────────

    def expect(self, sees: Bools, askers: Ints | None) -> None:
        """Before a launch: sees[K, T] and askers[T] of its real tokens."""
        self._expected = Step(0, sees, askers, False)

    def between(self, tokens: int) -> None:
        """After the launch of a step of so many tokens, on its stream: begins to copy what it did, takes what has
        arrived, and now and then lets rows into the cache. Does not wait."""
        self.observed.push(self._expected._replace(tokens=tokens, learned=self._is_learned(self._expected.sees)))
        self._take()
        self._prefetcher.settle(self._learn)

    def counted(self, fetched: Sequence[LayerCounters]) -> tuple[LayerCounters, ...]:
        """`fetched`, and what was looked up here in the same tables and in those in RAM that nothing was fetched from:
        as far as it is known, the last step or two may be missing."""
        self._take()
        tables = [direct for served in self.served.values() for direct in served.tables.values()]
        known, hot = {(counters.table, counters.layer) for counters in fetched}, self._prefetcher.hot
        fresh = [
            Tally(*direct.key, direct.table.row_bytes, direct.orders).snapshot(hot)
            for direct in tables
            if direct.key not in known and not isinstance(direct.table, DeviceTable)
        ]
        ends = np.cumsum([len(direct.orders) for direct in tables])
        return with_direct([*fetched, *fresh], tables, np.split(self._counted, ends[:-1]) if tables else [])

    def _take(self) -> None:
        for words, step in self.observed.poll():
            self._counted = words[: 2 * self._lines].reshape(self._lines, 2)
            if step.learned:
                self._pending.append((words, step))
        del self._pending[:-MOST_PENDING]

    def _is_learned(self, sees: Bools) -> bool:
        """Whether the cache learns from a step with these readers: if what it has not learned from before allows it."""
        asked = sum(
            int(sees[served.index].sum()) * len(served.tables) * len(served.pack.addresser.orders)
            for served in self.served.values()
            if served.keys is not None
        )
        self._due = min(self._due + LEARNED, max(asked, LEARNED))
        if not 0 < asked <= self._due:
            return False
        self._due -= asked
        return True

    def _learn(self, hot: HotRows) -> None:
        """What the last steps asked for, as if a fetch had: hits and misses by the tags as they are now."""
        pending, self._pending = self._pending, []
        for words, step in pending:
            for served in self.served.values():
                if served.keys is not None:
                    self._remember(hot, served, words[served.keys], step)

    def _remember(self, hot: HotRows, served: Served, words: Ints, step: Step) -> None:
        tokens = np.flatnonzero(step.sees[served.index])
        shape = served.addresses.shape(step.tokens)
        keys = words[: math.prod(shape)].reshape(shape)[:, tokens]
        askers = None if step.askers is None else step.askers[tokens]
        first: Ints | slice = slice(None)
        if isinstance(served.pack, StemPack):  # as its fetches do: each distinct row counts once
            _, first = np.unique(keys[0, :, 0], return_index=True)
        for index, (layer, direct) in enumerate(served.tables.items()):
            of_layer = keys[index if len(keys) > 1 else 0][first]
            found = hot.find(direct.table, layer, of_layer) if len(of_layer) else None
            if found is None:
                continue
            row_ids = np.zeros((of_layer.size, direct.heads), np.int64)
            for place, order in enumerate(direct.orders):
                missed = found.misses[found.misses % len(direct.orders) == place]
                row_ids[missed] = served.pack.addresser.rows_of_mix(layer, order, found.keys[missed])
            hot.remember(found, row_ids, None if askers is None else askers[first])

    # ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _reads(self, pack: Pack) -> bool:
        return all(self.transports[table.name].direct for table in pack.tables.values())

    def _direct(self, pack: Pack, layer: int, line: int) -> DirectTable:
        table, addresser, hot = pack.tables[layer], pack.addresser, self._prefetcher.hot
        assert isinstance(table, (DeviceTable, PinnedTable))
        orders = addresser.orders
        return DirectTable(
            table,
            layer,
            orders,
            addresser.heads,
            max_tokens=self._max,
            dtype=self._dtype,
            device=self.device,
            counters=self.observed.words[2 * line : 2 * (line + len(orders))].view(len(orders), 2),
            hot=hot if hot is not None and (table.name, layer) in hot.sources else None,
        )


def cached(pack: Pack, hot: HotRows) -> bool:
    """Whether the cache stands in front of a table of the pack."""
    return any((table.name, layer) in hot.sources for layer, table in pack.tables.items())
