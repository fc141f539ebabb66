"""The seam of memories that are taught: rows as leaves with gradient, and how a batch reads them.

    places[T, C] ─ leaf ─→ rows[T, C · D] ─→ add(layer, hidden) or up(layer, dense)     as in the decoder's MemoryStep
                                     └─→ stray(layer)     how far general text is moved from the bare backbone

`engram.py` and `stem.py` fill it in. Knows places of rows, nothing of files, losses or optimisers' schedules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.batch import Ints
from server.memory.addressing import Addresser, windows_of
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.rows import TrainedRows

Places = Mapping[int, Tensor]  # layer → [T, C] indices into the layer's TrainedRows


@dataclass(frozen=True, slots=True)
class Leaf:
    """The distinct rows of one layer that one step may change."""

    distinct: Tensor
    values: Tensor


@dataclass(slots=True)
class TaughtStep:
    """One batch's reading of a taught memory; the decoder's MemoryStep. rows: per layer [T, C · D] fp32."""

    memory: TaughtMemory
    layout: Layout
    rows: dict[int, Tensor]
    leaves: dict[int, Leaf] = field(default_factory=dict)
    layers: frozenset[int] = field(init=False)
    up_layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.layers, self.up_layers = self.memory.adds, self.memory.replaces

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden + self.memory.added(layer, hidden, self.rows[layer], self.layout)

    def up(self, layer: int, dense: Tensor | None) -> Tensor:
        return self.memory.up(layer, self.rows[layer])


class TaughtMemory(ABC):
    """`rows`: layer → its rows. `adds`, `replaces`: layers that add to the stream, or stand in for up-projections."""

    keeps_rows_from_retained: ClassVar[bool]  # whether general text changes modules only, never rows

    def __init__(self, addresser: Addresser, rows: Mapping[int, TrainedRows]) -> None:
        self.addresser, self.rows = addresser, dict(rows)
        self.layer_ids = addresser.layer_ids

    adds: frozenset[int] = frozenset()
    replaces: frozenset[int] = frozenset()

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Of the modules; empty for memories without."""

    def added(self, layer: int, hidden: Tensor, rows: Tensor, layout: Layout) -> Tensor:
        """What the layer adds to hidden[T, H]."""
        raise NotImplementedError

    def up(self, layer: int, rows: Tensor) -> Tensor:
        """[T, F] in the model's dtype."""
        raise NotImplementedError

    @abstractmethod
    def stray(self, layer: int, state: Tensor, rows: Tensor, layout: Layout, frozen: Frozen) -> Tensor:
        """[T] squared length of what this layer changes in the stream, at the bare backbone's state[T, H].

        Zero everywhere means that the backbone answers as if the memory were not there.
        """

    def read(
        self, layout: Layout, places: Places, retained: Places | None = None
    ) -> tuple[TaughtStep, dict[int, Tensor]]:
        """The step that reads `places` with gradient, and the rows of retained text, per layer [T', C · D]."""
        step = TaughtStep(self, layout, {})
        kept: dict[int, Tensor] = {}
        for layer, rows in self.rows.items():
            wanted = [places[layer]]
            if retained is not None and not self.keeps_rows_from_retained:
                wanted.append(retained[layer])
            flat = torch.cat([part.flatten() for part in wanted])
            distinct, values, inverse = rows.leaf(flat)
            step.leaves[layer] = Leaf(distinct, values)
            taken = F.embedding(inverse, values)
            count = places[layer].numel()
            step.rows[layer] = taken[:count].view(len(places[layer]), -1)
            if retained is not None:
                rest = rows.values[retained[layer].flatten()] if self.keeps_rows_from_retained else taken[count:]
                kept[layer] = rest.view(len(retained[layer]), -1)
        return step, kept

    @torch.no_grad()
    def look(self, layout: Layout, places: Places) -> TaughtStep:
        """The step that only reads."""
        rows = {layer: self.rows[layer].values[at.flatten()].view(len(at), -1) for layer, at in places.items()}
        return TaughtStep(self, layout, rows)

    def places(self, sequences: Sequence[Ints]) -> list[dict[int, Tensor]]:
        """Per sequence and layer, [T, C] places of the rows that its tokens read."""
        return [
            {layer: self.rows[layer].places(ids) for layer, ids in addresses(self.addresser, sequence).items()}
            for sequence in sequences
        ]


def addresses(addresser: Addresser, sequence: Ints) -> dict[int, Ints]:
    """Per layer the row ids [T, C] that a sequence's tokens read."""
    found = addresser.address(*windows_of(sequence, addresser.n))
    return {layer: rows for layer, (rows, _) in found.items()}


def joined(places: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """Several sequences' places, one after another."""
    return {layer: torch.cat([each[layer] for each in places]) for layer in places[0]}
