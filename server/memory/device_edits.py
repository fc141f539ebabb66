"""Edits within a CUDA graph: the overlays of a step as lists of fixed size on the device.

    views ─ distinct overlays, numbered ─┬─→ per layer keys[N] (number, row id), ascending, and values[N, D]
                                         └─→ numbers[T, 2]: everyone's and the tenant's of each token, -1: none

Written before a launch and only where something changed. What a token reads is what the host path patches in, in the
same order. Shapes: T tokens, N = MOST_EDITS, D values a row. Knows overlays and places; nothing of who made them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.row_patch import LAST, ROW_BITS, SCOPES, patch
from server.cache.cuda_memory import send
from server.memory.attached import AttachedPack
from server.memory.edits import Overlay
from server.view import MemoryView

MOST_EDITS = 4096  # rows of one layer that one step's overlays may edit: 2 MiB of values of 256 bf16


class EditedLayer:
    """The list of one pack at one layer."""

    def __init__(self, pack: AttachedPack, layer: int, most: int, dtype: torch.dtype, device: torch.device) -> None:
        self.cell = pack.content, layer
        with torch.inference_mode(False):
            self.keys = torch.full((most,), LAST, dtype=torch.int64, device=device)
            self.values = torch.zeros(most, pack.tables[layer].dim, dtype=dtype, device=device)

    def count(self, overlays: Sequence[Overlay]) -> int:
        return sum(len(overlay.rows[self.cell].ids) for overlay in overlays if self.cell in overlay.rows)

    def write(self, overlays: Sequence[Overlay]) -> None:
        """On the current stream."""
        keys, values = [np.empty(0, np.int64)], [np.empty((0, self.values.shape[1]), np.float32)]
        for number, overlay in enumerate(overlays):
            edited = overlay.rows.get(self.cell)
            if edited is not None:
                keys.append((number << ROW_BITS) + edited.ids)
                values.append(edited.values)
        all_keys = np.full(len(self.keys), LAST)
        found = np.concatenate(keys)
        all_keys[: len(found)] = found
        self.keys.copy_(send(all_keys, self.keys.device), non_blocking=True)
        self.values[: len(found)].copy_(send(np.concatenate(values), self.values.device), non_blocking=True)


class DeviceEdits:
    """Of Engram packs, for steps of up to `max_tokens`."""

    def __init__(
        self,
        packs: Sequence[AttachedPack],
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        most: int,
    ) -> None:
        self.most, self.device = most, device
        self.layers = {
            (pack.id, layer): EditedLayer(pack, layer, most, dtype, device) for pack in packs for layer in pack.tables
        }
        with torch.inference_mode(False):
            self.numbers = torch.full((max_tokens, SCOPES), -1, dtype=torch.int64, device=device)
        self._written: tuple[Overlay, ...] = ()
        self._numbers = np.full((max_tokens, SCOPES), -1, np.int64)

    def fit(self, views: Sequence[MemoryView]) -> bool:
        """Whether the overlays of these views can be read here."""
        overlays = overlays_of(views)
        return not overlays or (
            all(len(view.overlays) <= SCOPES for view in views)
            and all(layer.count(overlays) <= self.most for layer in self.layers.values())
        )

    def write(self, views: Sequence[MemoryView]) -> None:
        """views[T] of a step, which `fit`; on the current stream, before its launch."""
        overlays = overlays_of(views)
        if not overlays and not self._written:
            return
        if overlays != self._written:
            for layer in self.layers.values():
                layer.write(overlays)
            self._written = overlays
        number_of = {id(overlay): number for number, overlay in enumerate(overlays)}
        numbers = np.full_like(self._numbers, -1)
        for token, view in enumerate(views):
            for scope, overlay in enumerate(view.overlays):
                numbers[token, scope] = number_of[id(overlay)]
        if not np.array_equal(numbers, self._numbers):
            self._numbers = numbers
            self.numbers.copy_(send(numbers, self.device), non_blocking=True)

    def patch(self, pack: AttachedPack, layer: int, rows: Tensor, row_ids: Tensor) -> None:
        """rows[T, C · D] in place; on the current stream; may be captured."""
        edited = self.layers[pack.id, layer]
        patch(rows, row_ids, self.numbers[: len(rows)], edited.keys, edited.values)


def overlays_of(views: Sequence[MemoryView]) -> tuple[Overlay, ...]:
    """The distinct ones, in the order in which the views name them."""
    found: dict[int, Overlay] = {}
    for view in views:
        for overlay in view.overlays:
            assert isinstance(overlay, Overlay)
            found[id(overlay)] = overlay
    return tuple(found.values())
