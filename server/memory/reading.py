"""Readings: one pack's rows at one layer in one step, and the tokens that see them, as the host addresses them.

    a step's tokens ─ view holds the pack? ─► Seen ─ addresses ─► fetch ─► Reading: rows, once a layer asks for them

Shapes: T tokens, n = longest n-gram, C rows per token, D values per row. Knows views, windows and edits; nothing of
hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from server.batch import Bools, Ints
from server.cache.cuda_memory import send
from server.cache.device_table import DeviceFetch
from server.cache.prefetcher import Fetch, Lookup
from server.memory.attached import AttachedPack
from server.memory.attachment import Attachment
from server.memory.edits import Overlay
from server.memory.stem import StemPack, redirected
from server.view import MemoryView


class Addressed(Protocol):
    """What memories need of a step's tokens, all of it on the host: as `Batch`'s."""

    @property
    def views(self) -> tuple[MemoryView, ...]: ...
    @property
    def view_of(self) -> Ints: ...
    @property
    def windows(self) -> Ints: ...
    @property
    def blocked(self) -> Bools: ...
    @property
    def host_positions(self) -> Ints: ...
    @property
    def askers(self) -> Ints | None: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """The tokens of one step that see a pack: their indices on the host and on the device (None: all), their windows.

    `means`: index among them → the tokens whose mean row a redirect makes them read.
    """

    tokens: Ints | None
    index: Tensor | None
    windows: Ints
    blocked: Bools
    means: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Patch:
    """places[N] among the T · C rows fetched, and the values[N, D] that are read there, on the model's device."""

    places: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """One Engram pack at one layer in one step."""

    pack: AttachedPack
    layer: int
    fetch: Fetch | DeviceFetch
    seen: Seen
    dead: Tensor | None
    patches: tuple[Patch, ...] = ()

    @property
    def index(self) -> Tensor | None:
        """The tokens that see the pack, on the device; None: all."""
        return self.seen.index

    def rows(self) -> Tensor:
        """Waits for the rows [T, C · D]; edited ones are put in place of those fetched."""
        rows = self.fetch.wait()
        for patch in self.patches:
            rows.view(-1, patch.values.shape[1])[patch.places] = patch.values
        return rows


def seen_by(batch: Addressed, pack: Attachment, device: torch.device) -> Seen | None:
    """The step's tokens whose view holds the pack, redirects applied for token-id tables; None if there are none."""
    tokens = tokens_that_see(batch, pack.id)
    if tokens is None:
        seen = Seen(None, None, batch.windows, batch.blocked)
    elif len(tokens):
        seen = Seen(tokens, send(tokens, device), batch.windows[tokens], batch.blocked[tokens])
    else:
        return None
    if isinstance(pack, StemPack) and any(view.redirects for view in batch.views):
        return redirect(batch, seen)
    return seen


def askers_of(batch: Addressed, seen: Seen) -> Ints | None:
    return batch.askers if batch.askers is None or seen.tokens is None else batch.askers[seen.tokens]


def redirect(batch: Addressed, seen: Seen) -> Seen:
    ids, positions = seen.windows[:, :1].copy(), batch.host_positions
    means: dict[int, tuple[int, ...]] = {}
    for number, view in enumerate(batch.views):
        if view.redirects:
            of_view = batch.view_of if seen.tokens is None else batch.view_of[seen.tokens]
            where = np.flatnonzero(of_view == number)
            at = where if seen.tokens is None else seen.tokens[where]
            own = ids[where]
            several = redirected(own, positions[at], dict(view.redirects))
            ids[where] = own
            means |= {int(where[index]): tokens for index, tokens in several.items()}
    return Seen(seen.tokens, seen.index, ids, seen.blocked, means)


def dead_tokens(seen: Seen, device: torch.device) -> Tensor | None:
    """bool[T] of the tokens that take part in no n-gram; None when there are none, as in plain text."""
    dead = seen.blocked[:, 0]
    return send(dead.copy(), device) if dead.any() else None


def tokens_that_see(batch: Addressed, pack: tuple[str, str]) -> Ints | None:
    """Indices of the step's tokens whose view holds the pack; None when all do."""
    sees = np.array([pack in view.packs for view in batch.views])
    if sees.all():
        return None
    return np.flatnonzero(sees[batch.view_of])


def edit_patches(
    batch: Addressed,
    pack: Attachment,
    lookup: Lookup,
    seen: Seen,
    edited: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Patch, ...]:
    """Where tokens of the views `edited` read other rows than the table's, in the order in which they apply; values in
    the model's dtype."""
    view_of = batch.view_of if seen.tokens is None else batch.view_of[seen.tokens]
    columns, patches = lookup.row_ids.shape[1], []
    for number in edited:
        tokens = np.flatnonzero(view_of == number)
        for overlay in batch.views[number].overlays if len(tokens) else ():
            assert isinstance(overlay, Overlay)
            found = overlay.patch(pack.content, lookup.layer, lookup.row_ids[tokens])
            if found is not None:
                places = tokens[found[0] // columns] * columns + found[0] % columns
                patches.append(Patch(send(places, device), send(found[1], device).to(dtype)))
    return tuple(patches)
