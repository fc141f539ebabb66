"""Staged rows of a decode step: the packs whose tables only the host can read, brought while the device computes.

    device   part 0 of the step ──────────────────┐ rows(l) ─ part 1 ─ … ─ rows(m) ─ part 2
    host     └ the last step's tokens ─ hash ─ fetch ┘ arrive(l)         arrive(m)

A step is launched up to the first place that reads such rows, before the host knows its tokens; then the host waits for
them, has their rows fetched, and lets each place's rows arrive: the stream waits for the copy, takes the rows to where
a captured graph finds them, and goes on. Without a token that sees such a pack nothing is waited for.

Shapes: T tokens, n = longest n-gram, W values a token. Knows packs and places; nothing of graphs or hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.batch import Bools, Ints
from server.memory.attached import AttachedPack
from server.memory.memories import Memories
from server.memory.reading import Reading
from server.memory.stem import StemPack, StemReading
from server.view import MemoryView

Pack = AttachedPack | StemPack
Identity = tuple[str, str]
Place = tuple[int, bool]  # a layer, and whether rows stand in for its up-projection there
Windows = Callable[[], tuple[Ints, Bools]]


@dataclass(frozen=True, slots=True)
class StagedTokens:
    """A step's tokens, as `reading.Addressed`."""

    views: tuple[MemoryView, ...]
    view_of: Ints
    windows: Ints
    blocked: Bools
    host_positions: Ints
    askers: Ints | None


@dataclass(frozen=True, slots=True)
class Expected:
    """The step that is launched next: a view, a position and maybe an asker a token, and how to learn its n-grams."""

    views: Sequence[MemoryView]
    positions: Ints
    askers: Ints | None
    windows: Windows

    def tokens(self) -> StagedTokens:
        """Waits for the step before, if that has yet to sample them."""
        windows, blocked = self.windows()
        number = {view: place for place, view in enumerate(dict.fromkeys(self.views))}
        view_of = np.array([number[view] for view in self.views], np.int64)
        return StagedTokens(tuple(number), view_of, windows, blocked, self.positions, self.askers)


class StagedRows:
    """Of `packs`, some of those of `memories`, for steps of up to `max_tokens`.

    `rows`[max_tokens, W] of each pack are its last place's that arrived: a place's are read before the next one's come.
    """

    def __init__(self, packs: Sequence[Pack], memories: Memories, max_tokens: int) -> None:
        staging = memories.prefetcher.staging
        self.packs, self._memories = tuple(packs), memories
        with torch.inference_mode(False):
            self.rows: dict[Identity, Tensor] = {
                pack.id: torch.zeros(max_tokens, width(pack), dtype=staging.dtype, device=staging.device)
                for pack in packs
            }
        self.places: frozenset[Place] = frozenset(place_of(pack, layer) for pack in packs for layer in pack.tables)
        self._expected: Expected | None = None
        self._readings: dict[Place, list[Reading | StemReading]] | None = None

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(rows.nbytes for rows in self.rows.values())

    def can_read(self, identity: Identity) -> bool:
        """Whether the pack is among these, and none of its tables has failed."""
        pack = next((pack for pack in self.packs if pack.id == identity), None)
        return pack is not None and all(table.fault is None for table in pack.tables.values())

    def expect(self, expected: Expected | None) -> None:
        """Before a launch; None: none of the step's tokens sees one of these packs."""
        self._expected, self._readings = expected, None

    def arrive(self, place: Place) -> None:
        """Between two parts of a step: the rows of this place are there for what comes next in the current stream. The
        first place of a step has the rows of all fetched. Raises what the tables raise.
        """
        if self._expected is None:
            return
        if self._readings is None:
            self._readings = {}
            for reading in self._memories.fetch(self._expected.tokens(), self.packs):
                self._readings.setdefault(place_of(reading.pack, reading.layer), []).append(reading)
        for reading in self._readings.get(place, ()):
            self._take(reading)

    def _take(self, reading: Reading | StemReading) -> None:
        into, rows = self.rows[reading.pack.id], reading.rows()
        if reading.index is None:
            into[: len(rows)].copy_(rows)
        else:
            into.index_copy_(0, reading.index, rows)


def place_of(pack: Pack, layer: int) -> Place:
    return layer, isinstance(pack, StemPack)


def width(pack: Pack) -> int:
    """Values of a token's rows, the same at every layer."""
    return pack.addresser.columns * next(iter(pack.tables.values())).dim
