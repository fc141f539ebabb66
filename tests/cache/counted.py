"""Tables in memory, and lookups by key, for tests of the cache."""

from __future__ import annotations

import numpy as np
import torch

from server.cache.hot_rows import HotRows, Source
from server.cache.lookup import Lookup
from server.cache.row_table import Ids
from server.cache.row_types import Bytes, row_type
from server.errors import TableError

CPU = torch.device("cpu")


class MemoryTable:
    """Random rows of a seed; counts how many were gathered. A `fault` fails every gather, as a table file's does."""

    def __init__(self, name: str, rows: int = 500, dim: int = 32, kind: str = "float32", seed: int = 0) -> None:
        self.name, self.rows, self.dim, self.row_type = name, rows, dim, row_type(kind)
        self.row_bytes = self.row_type.row_bytes(dim)
        self.nbytes = rows * self.row_bytes
        self.fault: str | None = None
        self.read = 0
        self.fill(seed)

    def fill(self, seed: int) -> None:
        values = np.random.default_rng(seed).normal(size=(self.rows, self.dim)).astype(np.float32)
        self.raw = self.row_type.encode(values)

    def gather(self, ids: Ids, out: Bytes) -> None:
        if self.fault is not None:
            raise TableError(self.fault)
        self.read += len(ids)
        out[:] = self.raw[ids]

    def page_in(self, ids: Ids) -> int:
        return len(ids)

    def close(self) -> None:
        pass

    def values(self, row_ids: Ids, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[T, C · D] straight from the table."""
        out = torch.empty(row_ids.size, self.dim, dtype=dtype)
        self.row_type.decode(torch.from_numpy(self.raw[row_ids.reshape(-1)]), out)
        return out.view(len(row_ids), -1)


def hashed(table: MemoryTable, layer: int, keys: Ids, heads: int = 4, askers: Ids | None = None) -> Lookup:
    """keys[T, O], `heads` rows for each: a function of key, order and head, as an addresser's rows are."""
    orders = np.arange(keys.shape[1])[:, None]
    rows = (keys[:, :, None] * 2654435761 + orders * 97 + np.arange(heads) * 31) % table.rows
    named = tuple(range(2, 2 + keys.shape[1]))
    return Lookup(table, layer, rows.reshape(len(keys), -1), keys, orders=named, askers=askers)


def by_token(table: MemoryTable, layer: int, ids: Ids, askers: Ids | None = None) -> Lookup:
    """ids[T]: a token-id table's rows, each distinct one read once."""
    return Lookup(table, layer, ids[:, None], ids[:, None], dedup=True, orders=(1,), askers=askers)


def source_of(lookup: Lookup) -> Source:
    return Source(lookup.table, lookup.layer, lookup.orders, lookup.row_ids.shape[1] // len(lookup.orders))


def cache_for(*lookups: Lookup, entries: int = 64, **settings: int) -> HotRows:
    """Room for about `entries` n-grams of each lookup's kind, learning after every step."""
    sources = [source_of(lookup) for lookup in lookups]
    return HotRows(sum(entries * source.entry_bytes for source in sources), sources, CPU, **{"every": 1, **settings})
