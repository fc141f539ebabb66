"""Lookup and Fetch: what a memory layer asks for, and that request while it is under way.

Shapes: T tokens, C rows per token, D values per row, O n-gram orders, U distinct rows. Knows ids, never tokens.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from server.cache.row_table import Ids, Table


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Rows row_ids[T, C] of `table`, for `layer`. The arrays must not be changed afterwards.

    `keys`[T, O] names the n-grams behind the rows, for caches; `orders` says how long these are. `dedup`: read each
    distinct row once. `askers`[T]: which request each token is of, a number under 2^32.
    """

    table: Table
    layer: int
    row_ids: Ids
    keys: Ids | None = None
    dedup: bool = False
    orders: tuple[int, ...] = ()
    askers: Ids | None = None

    def same_rows(self, other: Lookup) -> bool:
        return self is other or (
            self.table is other.table
            and self.layer == other.layer
            and self.dedup == other.dedup
            and np.array_equal(self.row_ids, other.row_ids)
        )


@dataclass(frozen=True, slots=True)
class UniqueRows:
    """rows[U, D], and inverse[T, C]: which of them each token's columns read."""

    rows: Tensor
    inverse: Tensor


class Waits(Protocol):
    """Who answers for a fetch."""

    @property
    def ahead(self) -> bool: ...

    def wait(self, fetch: Fetch) -> Tensor: ...


class Fetch:
    """One lookup under way. Its rows may be read until the `hint` or `begin` that follows the next step's `begin`.

    `hits`: cache entries found, by order; None where no cache was asked. `rows_read`: rows read from the table;
    `in_place`: by the device, where they lie.
    `inverse`: which row each token's columns read; None: the rows stand as they were asked for.
    """

    __slots__ = (
        "begin", "copied", "counted", "done_at", "dropped", "error", "hits", "in_place", "inverse", "issued", "lookup",
        "pending", "prefetcher", "rows", "rows_read", "step",
    )  # fmt: skip

    def __init__(self, prefetcher: Waits, lookup: Lookup, begin: int, step: int, issued: float) -> None:
        self.prefetcher, self.lookup, self.begin, self.step = prefetcher, lookup, begin, step
        self.issued = self.done_at = issued
        self.pending = threading.Lock()  # held until the rows are there; much cheaper to make than an Event
        self.pending.acquire()
        self.error: Exception | None = None
        self.dropped = self.counted = self.in_place = False
        self.rows: Tensor | None = None  # [T · C, D], or [U, D]
        self.rows_read = 0
        self.hits: list[int] | None = None
        self.inverse: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """Blocks until the rows are there: [T, C · D] in the model's dtype and on its device.

        Raises what the table raised (TableError), NotReady if the prefetcher was closed first, StepFailed if the rows
        are overwritten already.
        """
        rows = self.prefetcher.wait(self)
        tokens, columns = self.lookup.row_ids.shape
        if self.inverse is not None:
            rows = rows.index_select(0, self.inverse.view(-1))
        return rows.view(tokens, columns * self.lookup.table.dim)

    def wait_unique(self) -> UniqueRows:
        """As `wait`, for a lookup with `dedup`: the distinct rows and the way back to tokens."""
        rows = self.prefetcher.wait(self)
        if not self.lookup.dedup:
            raise ValueError("wait_unique() is for lookups with dedup=True")
        if self.inverse is not None:
            return UniqueRows(rows, self.inverse)
        return UniqueRows(rows, torch.arange(len(rows), device=rows.device).view(self.lookup.row_ids.shape))
