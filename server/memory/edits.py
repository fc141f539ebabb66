"""Edits: rows of attached packs that some requests read with other values. Nothing on disk or in a cache changes.

    overlay    (pack, layer) ─→ sorted row ids [U], values fp32 [U, D]      one snapshot of one scope's edits, frozen
    step       fetched rows [T, C · D] ◄── patch at the places whose row id is edited, for the tokens that see it

A scope is a tenant, or everyone. A sequence's view holds the snapshots it was admitted with, so that they live as long
as it does. A request that sees no edits takes no part in any of this. Packs are named by content (`identity`), never by
what a client calls them. Torch-free: the API composes what the engine applies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.batch import Ints

Floats = npt.NDArray[np.float32]
Cell = tuple[str, int]  # a pack's content key, a layer


@dataclass(frozen=True, slots=True, eq=False)
class EditedRows:
    """ids[U] ascending and distinct, values[U, D]: what one table's rows are read as."""

    ids: Ints
    values: Floats


Edited = Mapping[Cell, EditedRows]


@dataclass(frozen=True, slots=True, eq=False)
class Overlay:
    """One scope's edits at one moment. `id` is the same whenever ids and values are."""

    rows: Edited
    id: bytes = field(init=False)
    packs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(digest_size=32)
        for (pack, layer), edited in sorted(self.rows.items(), key=lambda item: item[0]):
            digest.update(f"{pack}/{layer}/{edited.values.shape};".encode())
            digest.update(edited.ids.astype("<i8").tobytes() + edited.values.astype("<f4").tobytes())
        object.__setattr__(self, "id", digest.digest())
        object.__setattr__(self, "packs", frozenset(pack for pack, _ in self.rows))

    def patch(self, pack: str, layer: int, row_ids: Ints) -> tuple[Ints, Floats] | None:
        """Where row_ids[…] are edited: places[N] in the flattened ids, and the values[N, D] that are read there."""
        edited = self.rows.get((pack, layer))
        if edited is None:
            return None
        flat = row_ids.reshape(-1)
        near = np.minimum(np.searchsorted(edited.ids, flat), len(edited.ids) - 1)
        places = np.flatnonzero(edited.ids[near] == flat)
        return (places, edited.values[near[places]]) if len(places) else None


def composed(edits: Iterable[Edited]) -> dict[Cell, EditedRows]:
    """Several edits as one, in order: where two change a row, the later one counts."""
    parts: dict[Cell, list[EditedRows]] = {}
    for edit in edits:
        for cell, edited in edit.items():
            if len(edited.ids):
                parts.setdefault(cell, []).append(edited)
    return {cell: _latest(rows) for cell, rows in parts.items()}


def _latest(parts: list[EditedRows]) -> EditedRows:
    if len(parts) == 1:
        return parts[0]
    ids = np.concatenate([part.ids for part in reversed(parts)])
    values = np.concatenate([part.values for part in reversed(parts)])
    distinct, first = np.unique(ids, return_index=True)  # of equal ids the first, which is the latest edit's
    return EditedRows(distinct, values[first])
