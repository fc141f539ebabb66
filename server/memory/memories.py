"""The packs attached to one model, and what one step does with them.

    begin(batch)   address every pack's rows for the tokens that see it, queue the fetches in layer order, return
    step.add(l)    at layer l: wait for this layer's rows only, gate them in

Each token reads the packs of its own sequence's view and no other; the packs of one layer all read the hidden state
as it was before any of them. Knows views and addresses; nothing of where rows live or of who asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from server.batch import Batch, Ints
from server.cache.prefetcher import Fetch, Lookup, Prefetcher
from server.memory.attached import AttachedPack
from server.memory.engram import ConvRead


@dataclass(frozen=True, slots=True)
class Reading:
    """One pack at one layer in one step: the fetch, and the tokens that see the pack (None: all)."""

    pack: AttachedPack
    layer: int
    fetch: Fetch
    tokens: Tensor | None
    conv: ConvRead


@dataclass(slots=True)
class MemoryStep:
    """One step's rows on their way. `layers`: the decoder layers that read some."""

    readings: dict[int, list[Reading]] = field(default_factory=dict)

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.readings)

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden[T, H] plus what this layer's packs give. Waits for this layer's rows; raises their TableError."""
        total = hidden
        for reading in self.readings[layer]:
            rows = reading.fetch.wait()
            engram, slots = reading.pack.modules[layer], reading.pack.conv_slots[layer]
            if reading.tokens is None:
                total = total + engram(hidden, rows, slots, reading.conv)
            else:
                added = engram(hidden.index_select(0, reading.tokens), rows, slots, reading.conv)
                total = total.index_add(0, reading.tokens, added)
        return total


class Memories:
    """`packs` in attachment order. `window`: the longest n-gram any of them looks at."""

    def __init__(self, packs: Sequence[AttachedPack], prefetcher: Prefetcher) -> None:
        self.packs, self.prefetcher = tuple(packs), prefetcher
        self.window = max((pack.addresser.n for pack in packs), default=1)

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
        step = MemoryStep()
        conv_reads: dict[tuple[int, int, bool], ConvRead] = {}
        for (layer, pack, _, tokens), fetch in zip(planned, fetches, strict=True):
            index = None if tokens is None else torch.from_numpy(tokens).to(batch.slots.device)
            conv = conv_reads.get(pack.conv_key) if tokens is None else None
            if conv is None:
                conv = ConvRead.of(batch, pack.shape.kernel_size, pack.shape.dilation, index)
                if tokens is None:
                    conv_reads[pack.conv_key] = conv
            step.readings.setdefault(layer, []).append(Reading(pack, layer, fetch, index, conv))
        return step


def tokens_that_see(batch: Batch, name: str) -> Ints | None:
    """Indices of the batch's tokens whose view holds the pack; None when all do."""
    sees = np.array([name in view.names for view in batch.views])
    if sees.all():
        return None
    return np.flatnonzero(sees[batch.view_of])
