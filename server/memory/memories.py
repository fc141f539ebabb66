"""The packs attached to one model, and what one step does with them.

    begin(batch)        address every pack's rows for the tokens that see it, queue the fetches in layer order, return
    step.add(l)         at layer l, before attention: wait for this layer's Engram rows only, gate them in
    step.up(l, dense)   at layer l, in its feed-forward block: the STEM rows in place of the up-projection

Each token reads the packs of its own sequence's view and no other; the Engram packs of one layer all read the hidden
state as it was before any of them. Knows views and addresses; nothing of where rows live or of who asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from server.batch import Batch, Bools, Ints
from server.cache.device_table import DeviceFetch, DeviceTable
from server.cache.pinned_table import PinnedTable
from server.cache.prefetcher import Fetch, LayerCounters, Lookup, Prefetcher
from server.cache.residency import Residency, Resident
from server.cache.row_table import RowTable
from server.errors import TableError
from server.memory.attached import AttachedPack
from server.memory.attachment import Attachment
from server.memory.reading import Addressed, Reading, Seen, askers_of, dead_tokens, edit_patches, seen_by
from server.memory.short_conv import ConvRead
from server.memory.stem import StemPack, StemReading
from server.memory.trace import GateTrace
from server.memory.warm_start import WarmStart
from server.view import MemoryView

if TYPE_CHECKING:
    from server.memory.device_rows import DeviceRows

# A hint costs about 0.4 ms of a step here (hashing and queueing, with cold processor caches) and gains the time between
# sampling and the next step's start: nothing where rows arrive before the first block is through.
HINT_SECONDS = 0.001
PAGE_IN_TOKENS = 256  # of a waiting prompt, asked for at once


@dataclass(slots=True)
class MemoryStep:
    """One step's rows on their way, by decoder layer; where the convolutions of each pack read."""

    fetches: list[Fetch | DeviceFetch]
    readings: dict[int, list[Reading]] = field(default_factory=dict)
    ups: dict[int, StemReading] = field(default_factory=dict)
    conv_reads: dict[tuple[str, str], ConvRead] = field(default_factory=dict)
    trace: GateTrace | None = None

    @property
    def slow(self) -> bool:
        """Whether the first fetch took so long that the next step's should start before that step does, if any may."""
        first = next((fetch for fetch in self.fetches if isinstance(fetch, Fetch)), None)
        return first is not None and first.prefetcher.ahead and first.done_at - first.issued > HINT_SECONDS

    @property
    def layers(self) -> frozenset[int]:
        """The layers with something to add."""
        return frozenset(self.readings)

    @property
    def up_layers(self) -> frozenset[int]:
        """The layers whose up-projection is replaced."""
        return frozenset(self.ups)

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden[T, H] plus what this layer's packs give. Waits for this layer's rows; raises their TableError."""
        total = hidden
        for reading in self.readings[layer]:
            rows = reading.rows()
            if self.trace is not None:
                self.trace.take(layer, reading, hidden, rows)
            module, slots = reading.pack.modules[layer], reading.pack.conv_slots.get(layer)
            conv = self.conv_reads.get(reading.pack.id)
            index = reading.index
            if index is None:
                total = module.add_to(total, hidden, rows, slots, conv, reading.dead)
            else:
                added = module(hidden.index_select(0, index), rows, slots, conv, reading.dead)
                total = total.index_add(0, index, added)
        return total

    def up(self, layer: int, dense: Tensor | None) -> Tensor:
        """[T, F] in place of the layer's up-projection, `dense`, where that is there. Raises the rows' TableError."""
        return self.ups[layer].up(dense)

    def distinct_up(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """As `decoder.DistinctRows`. Raises the rows' TableError."""
        return self.ups[layer].distinct()


class Memories:
    """`packs` in attachment order. `window`: the longest n-gram any of them looks at. `hot_list`: whether the cache, if
    there is one, starts with what was hot in the last run."""

    def __init__(
        self,
        packs: Sequence[AttachedPack | StemPack],
        prefetcher: Prefetcher,
        residency: Residency | None = None,
        *,
        hot_list: bool = False,
    ) -> None:
        self.packs, self.prefetcher, self.residency = tuple(packs), prefetcher, residency
        self.warm = WarmStart(packs, prefetcher) if hot_list and prefetcher.hot is not None else None
        self.window = max((pack.addresser.n for pack in packs), default=1)
        self.direct: DeviceRows | None = None  # what the device looks up by itself
        self._addressed: dict[tuple[str, str], tuple[Ints, Bools, list[Lookup]]] = {}
        self._step_bytes: dict[tuple[str, str], int] = {}  # of packs that came later
        self._paged: Counter[tuple[str, int]] = Counter()  # the pager's thread alone adds
        self._pager = ThreadPoolExecutor(1, thread_name_prefix="pager")

    def add(self, pack: AttachedPack | StemPack, step_bytes: int = 0) -> None:
        """From the next step on, tokens whose view holds the pack read it. Between steps only. `step_bytes`: of the
        pages that one step can touch of its mapped tables, at most."""
        if self.residency is not None:
            self.residency.add(pack.mapped, step_bytes)
        self._step_bytes[pack.id] = step_bytes
        self.prefetcher.cache(pack.sources())
        self.packs = (*self.packs, pack)
        self.window = max(self.window, pack.addresser.n)

    def remove(self, pack: AttachedPack | StemPack) -> None:
        """Closes a pack that no living sequence sees. Between steps only; rows still being read come to nothing."""
        self.packs = tuple(other for other in self.packs if other is not pack)
        self._addressed.pop(pack.id, None)
        if self.warm is not None:
            self.warm.forget(pack)
        if self.residency is not None:
            self.residency.remove(pack.mapped, self._step_bytes.pop(pack.id, 0))
        self.prefetcher.forget(tuple(pack.tables.values()))
        for table in pack.tables.values():
            table.close()

    def begin(self, batch: Batch) -> MemoryStep | None:
        """Queues the fetches of all layers and returns; None if no token of the batch sees a memory."""
        self.prefetcher.settle()
        readings = self.fetch(batch, self.packs)
        if not readings:
            return None
        step = MemoryStep([reading.fetch for reading in readings])
        for reading in readings:
            if isinstance(reading, StemReading):
                step.ups[reading.layer] = reading
                continue
            pack, shape = reading.pack, reading.pack.shape
            if pack.has_conv and pack.id not in step.conv_reads:  # the same for all layers of a pack
                step.conv_reads[pack.id] = ConvRead.of(batch, shape.kernel_size, shape.dilation, reading.seen.tokens)
            step.readings.setdefault(reading.layer, []).append(reading)
        return step

    def fetch(self, batch: Addressed, packs: Sequence[AttachedPack | StemPack]) -> list[Reading | StemReading]:
        """Queues the fetches of all layers of these packs and returns: what is read, as the layers will ask for it. May
        be called in the midst of a launch: a mirrored cache stays as it is."""
        staging = self.prefetcher.staging
        planned: list[tuple[int, AttachedPack | StemPack, Lookup, Seen]] = []
        for pack in packs:
            seen = seen_by(batch, pack, staging.device)
            if seen is not None:
                found = self._lookups(pack, seen.windows, seen.blocked, askers_of(batch, seen))
                planned += [(lookup.layer, pack, lookup, seen) for lookup in found]
        if not planned:
            return []
        planned.sort(key=lambda plan: (plan[0], isinstance(plan[1], StemPack)))
        fetches = self._begin([plan[2] for plan in planned])
        edited = [number for number, view in enumerate(batch.views) if view.overlays]
        readings: list[Reading | StemReading] = []
        for (layer, pack, lookup, seen), fetch in zip(planned, fetches, strict=True):
            if isinstance(pack, StemPack):
                means = tuple((index, pack.mean_row(layer, tokens)) for index, tokens in seen.means.items())
                readings.append(StemReading(pack, layer, fetch, seen.index, means))
                continue
            patches = edit_patches(batch, pack, lookup, seen, edited, staging.device, staging.dtype) if edited else ()
            readings.append(Reading(pack, layer, fetch, seen, dead_tokens(seen, staging.device), patches))
        return readings

    def _begin(self, lookups: Sequence[Lookup]) -> list[Fetch | DeviceFetch]:
        """Rows on the device are looked up by the layer that reads them; the others begin to be fetched."""
        queued = [lookup for lookup in lookups if not isinstance(lookup.table, DeviceTable)]
        begun = iter(self.prefetcher.begin(queued) if queued else ())
        dtype = self.prefetcher.staging.dtype
        return [
            DeviceFetch(lookup, dtype) if isinstance(lookup.table, DeviceTable) else next(begun) for lookup in lookups
        ]

    def rows_per_token(self, view: MemoryView) -> int:
        """Rows that a token of this view addresses, over all packs and layers."""
        return sum(pack.addresser.columns * len(pack.tables) for pack in self.packs if pack.id in view.packs)

    def hint(
        self, sequences_windows: Ints, blocked: Bools, views: Sequence[MemoryView], askers: Ints | None = None
    ) -> None:
        """Starts fetching the rows of tokens that the next step will read, if every one of them sees a pack.

        windows[T, n], blocked[T, n] of the tokens just sampled, their views, and askers[T] where these are counted.
        What turns out not to be asked for is dropped by the prefetcher.
        """
        planned: list[Lookup] = []
        for pack in self.packs:
            if all(pack.id in view.packs for view in views):
                found = self._lookups(pack, sequences_windows, blocked, askers)
                planned += [lookup for lookup in found if not isinstance(lookup.table, DeviceTable)]
        planned.sort(key=lambda lookup: (lookup.layer, lookup.dedup))
        self.prefetcher.hint(planned)

    def _lookups(
        self, pack: AttachedPack | StemPack, windows: Ints, blocked: Bools, askers: Ints | None
    ) -> list[Lookup]:
        """The pack's lookups; those just hinted are found again instead of hashed again."""
        last = self._addressed.get(pack.id)
        if last is None or not (np.array_equal(last[0], windows) and np.array_equal(last[1], blocked)):
            last = self._addressed[pack.id] = windows, blocked, lookups(pack, windows, blocked)
        return last[2] if askers is None else [replace(lookup, askers=askers) for lookup in last[2]]

    def page_in(self, windows: Ints, blocked: Bools, view: MemoryView) -> None:
        """Hashes a waiting prompt and asks the OS for the pages its rows stand on. Returns at once."""
        for pack in self.packs:
            if pack.id in view.packs:
                self._pager.submit(ask_for_pages, pack, windows, blocked, self._paged)

    def fetched(self) -> tuple[LayerCounters, ...]:
        """What was read so far of tables that are not on the device, by fetches and by the device itself."""
        found = self.prefetcher.counters()
        return found if self.direct is None else self.direct.counted(found)

    def counters(self) -> tuple[LayerCounters, ...]:
        """What was read so far, per table: by fetches, from tables on the device, and by the device itself."""
        on_device = [
            table.counters(layer)
            for pack in self.packs
            for layer, table in pack.tables.items()
            if isinstance(table, DeviceTable)
        ]
        found = (*self.prefetcher.counters(), *on_device)
        return found if self.direct is None else self.direct.counted(found)

    def placements(self) -> dict[tuple[str, int], str]:
        """(table, layer) → device, pinned or mapped."""
        tables = [(layer, table) for pack in self.packs for layer, table in pack.tables.items()]
        return {(table.name, layer): getattr(table, "placement", "mapped") for layer, table in tables}

    def page_ins(self) -> dict[tuple[str, int], int]:
        """(table, layer) → pages asked for ahead of a read, so far."""
        return dict(self._paged)

    def resident(self) -> list[tuple[str, int, Resident]]:
        """(table, layer, what of it stands in memory) of every table."""
        figures = self.residency.figures() if self.residency is not None else {}
        return [
            (table.name, layer, figures.get(table.name, Resident(table.nbytes, "copied")))
            for pack in self.packs
            for layer, table in pack.tables.items()
        ]

    def check_files(self) -> None:
        """Looks at every table's files as each gather does: what happened to them is among the faults then."""
        for pack in self.packs:
            for table in pack.tables.values():
                if isinstance(table, RowTable):
                    with suppress(TableError):
                        table.check()

    def faults(self) -> dict[tuple[str, str], str]:
        """Packs whose table file was changed, cut or failed while serving, by identity, with what happened."""
        broken = {pack.id: [table.fault for table in pack.tables.values() if table.fault] for pack in self.packs}
        return {identity: faults[0] for identity, faults in broken.items() if faults}

    def notes(self) -> tuple[str, ...]:
        """What does not work as asked for although every row is served: for operators."""
        tables = [table for pack in self.packs for table in pack.tables.values()]
        refused = [table.refusal for table in tables if isinstance(table, PinnedTable)]
        limit = self.residency.note if self.residency is not None else None
        lists = self.warm.notes() if self.warm is not None else ()
        return (*filter(None, (*refused, limit)), *self.prefetcher.uncached.values(), *lists)

    def hot_list_ages(self) -> dict[str, float]:
        """Table → seconds since the hot list in use was saved, for those that have one."""
        return self.warm.ages() if self.warm is not None else {}

    def close(self) -> None:
        self._pager.shutdown(cancel_futures=True)
        self.prefetcher.close()
        if self.warm is not None:
            self.warm.close()
        if self.residency is not None:
            self.residency.close()
        for pack in self.packs:
            for table in pack.tables.values():
                table.close()


def ask_for_pages(pack: Attachment, windows: Ints, blocked: Bools, paged: Counter[tuple[str, int]]) -> None:
    """In the order they will be read: a piece of the prompt through all layers, then the next. Counts the pages in
    `paged`, by table and layer.
    """
    for at in range(0, len(windows), PAGE_IN_TOKENS):
        part = slice(at, at + PAGE_IN_TOKENS)
        for layer, (row_ids, _) in pack.address(windows[part], blocked[part]).items():
            table = pack.tables[layer]
            paged[table.name, layer] += table.page_in(row_ids.reshape(-1))


def lookups(pack: Attachment, windows: Ints, blocked: Bools) -> list[Lookup]:
    """One a layer. Token-id rows are large and repeat within a step, so that each distinct one is read once."""
    dedup, orders = isinstance(pack, StemPack), pack.addresser.orders
    addresses = pack.address(windows, blocked)
    return [Lookup(pack.tables[layer], layer, rows, keys, dedup, orders) for layer, (rows, keys) in addresses.items()]
