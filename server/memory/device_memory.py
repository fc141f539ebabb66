"""The memories of a decode step that the device serves by itself: no host fetch, legal in a CUDA graph.

    host    serves? ─ sees, prepare ─ launch ─────────────────────────────────────────────── between
    main    ──────────┬─ embed ─ block 0 ─ … ─ add(l) ─ block l ─ … ─ up(m) ─ … ─ join ─ sample
    side              └─ hash ─ rows of layer l ─ event ┘  rows of layer m ─ event ┘

Shapes: B tokens, one a sequence; K attached packs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from server.batch import Bools, DecodeBatch, Ints
from server.memory.memories import Memories
from server.view import MemoryView


class DeviceStep:
    """One step's memory, as `decoder.MemoryStep`. `layers`, `up_layers`: the same in every step."""

    layers: frozenset[int]
    up_layers: frozenset[int]

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden[B, H] with what the memories of this layer add; tokens that see none are left as they are."""
        raise NotImplementedError

    def up(self, layer: int, dense: Tensor | None) -> Tensor:
        """[B, F] in place of the layer's up-projection; tokens that do not see the pack keep `dense`."""
        raise NotImplementedError

    def join(self) -> None:
        """The current stream waits for the side stream: before a capture ends."""


class DeviceMemory:
    """`max_num_seqs`: the most tokens of a step. Packs attached later are not served."""

    def __init__(self, memories: Memories, max_num_seqs: int) -> None:
        self.memories, self.packs, self.max_num_seqs = memories, memories.packs, max_num_seqs

    def serves(self, views: Sequence[MemoryView], positions: Ints | None = None) -> bool:
        """Whether a decode step of these views can be done wholly on the device; positions[B] of its tokens tell
        redirects that lie behind from those ahead (None: any redirect is ahead)."""
        return not any(view.packs for view in views)

    def sees(self, views: Sequence[MemoryView]) -> Bools:
        """[K, B], `DecodeBatch.sees`."""
        return np.array([[pack.id in view.packs for view in views] for pack in self.packs], bool)

    def prepare(self, views: Sequence[MemoryView], askers: Ints | None = None) -> None:
        """Before each launch, on its stream: writes what varies. `views`: of the real tokens, which come first;
        askers[B]: which request each is of, where hot lists are kept."""

    def begin(self, batch: DecodeBatch) -> DeviceStep:
        """Hashes and looks up on the side stream; may be captured. Rows are there until the next `begin`."""
        raise NotImplementedError

    def between(self, batch: DecodeBatch) -> None:
        """After a launch, on its stream, without waiting: counters are read, rows enter the cache now and then."""
