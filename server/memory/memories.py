"""The packs attached to one model, and what one step does with them.

    begin(batch)   address every pack's rows for the tokens that see it, queue the fetches in layer order, return
    step.add(l)    at layer l: wait for this layer's rows only, gate them in

Each token reads the packs of its own sequence's view and no other; the packs of one layer all read the hidden state
as it was before any of them. Knows views and addresses; nothing of where rows live or of who asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from server.batch import Batch, Bools, Ints
from server.cache.prefetcher import Fetch, Lookup, Prefetcher
from server.memory.attached import AttachedPack
from server.memory.engram import ConvRead
from server.view import MemoryView


@dataclass(frozen=True, slots=True)
class Reading:
    """One pack at one layer in one step: the fetch, and the tokens that see the pack (None: all)."""

    pack: AttachedPack
    layer: int
    fetch: Fetch
    tokens: Tensor | None


@dataclass(slots=True)
class MemoryStep:
    """One step's rows on their way. `layers`: the decoder layers that read some."""

    batch: Batch
    readings: dict[int, list[Reading]] = field(default_factory=dict)
    conv_reads: dict[str, ConvRead] = field(default_factory=dict)

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.readings)

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden[T, H] plus what this layer's packs give. Waits for this layer's rows; raises their TableError."""
        total = hidden
        for reading in self.readings[layer]:
            rows = reading.fetch.wait()
            engram, slots = reading.pack.modules[layer], reading.pack.conv_slots[layer]
            conv = self._conv_read(reading)
            if reading.tokens is None:
                total = total + engram(hidden, rows, slots, conv)
            else:
                added = engram(hidden.index_select(0, reading.tokens), rows, slots, conv)
                total = total.index_add(0, reading.tokens, added)
        return total

    def _conv_read(self, reading: Reading) -> ConvRead:
        """Where the pack's convolutions read: made at its first layer, the same for the others."""
        name, shape = reading.pack.name, reading.pack.shape
        if name not in self.conv_reads:
            self.conv_reads[name] = ConvRead.of(self.batch, shape.kernel_size, shape.dilation, reading.tokens)
        return self.conv_reads[name]


class Memories:
    """`packs` in attachment order. `window`: the longest n-gram any of them looks at."""

    def __init__(self, packs: Sequence[AttachedPack], prefetcher: Prefetcher) -> None:
        self.packs, self.prefetcher = tuple(packs), prefetcher
        self.window = max((pack.addresser.n for pack in packs), default=1)
        self._pager = ThreadPoolExecutor(1, thread_name_prefix="pager")

    def begin(self, batch: Batch) -> MemoryStep | None:
        """Queues the fetches of all layers and returns; None if no token of the batch sees a memory."""
        planned: list[tuple[int, AttachedPack, Lookup, Ints | None]] = []
        for pack in self.packs:
            tokens = tokens_that_see(batch, pack.name)
            if tokens is not None and not len(tokens):
                continue
            windows, blocked = batch.windows, batch.blocked
            if tokens is not None:
                windows, blocked = windows[tokens], blocked[tokens]
            for layer, (row_ids, keys) in pack.address(windows, blocked).items():
                planned.append((layer, pack, Lookup(pack.tables[layer], layer, row_ids, keys), tokens))
        if not planned:
            return None
        planned.sort(key=lambda plan: plan[0])
        fetches = self.prefetcher.begin([plan[2] for plan in planned])
        step = MemoryStep(batch)
        for (layer, pack, _, tokens), fetch in zip(planned, fetches, strict=True):
            index = None if tokens is None else torch.from_numpy(tokens).to(batch.slots.device)
            step.readings.setdefault(layer, []).append(Reading(pack, layer, fetch, index))
        return step

    def hint(self, sequences_windows: Ints, blocked: Bools, views: Sequence[MemoryView]) -> None:
        """Starts fetching the rows of tokens that the next step will read, if every one of them sees a pack.

        windows[T, n], blocked[T, n] of the tokens just sampled, and their views. What turns out not to be asked for
        is dropped by the prefetcher.
        """
        planned: list[Lookup] = []
        for pack in self.packs:
            if all(pack.name in view.names for view in views):
                addresses = pack.address(sequences_windows, blocked)
                planned += [Lookup(pack.tables[layer], layer, *address) for layer, address in addresses.items()]
        self.prefetcher.hint(sorted(planned, key=lambda lookup: lookup.layer))

    def page_in(self, windows: Ints, blocked: Bools, view: MemoryView) -> None:
        """Hashes a waiting prompt and asks the OS for the pages its rows stand on. Returns at once."""
        for pack in self.packs:
            if pack.name in view.names:
                self._pager.submit(ask_for_pages, pack, windows, blocked)

    def faults(self) -> dict[str, str]:
        """Packs whose table file was changed, cut or failed while serving, with what happened."""
        broken = {pack.name: [table.fault for table in pack.tables.values() if table.fault] for pack in self.packs}
        return {name: faults[0] for name, faults in broken.items() if faults}

    def close(self) -> None:
        self._pager.shutdown(cancel_futures=True)
        self.prefetcher.close()
        for pack in self.packs:
            for table in pack.tables.values():
                table.close()


def ask_for_pages(pack: AttachedPack, windows: Ints, blocked: Bools) -> None:
    for layer, (row_ids, _) in pack.address(windows, blocked).items():
        pack.tables[layer].page_in(np.unique(row_ids))


def tokens_that_see(batch: Batch, name: str) -> Ints | None:
    """Indices of the batch's tokens whose view holds the pack; None when all do."""
    sees = np.array([name in view.names for view in batch.views])
    if sees.all():
        return None
    return np.flatnonzero(sees[batch.view_of])
