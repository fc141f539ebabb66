"""STEM: a table row per token id stands in for the feed-forward block's up-projection.

    dense  y = W_d (silu(W_g x) · W_u x)
    STEM   y = W_d (silu(W_g x) · U_l[t])        t the token at that place; no norm, scale or bias on the row

The up-projection is not even loaded: a third of the block's weights is gone, and with it per-request choice, unless
it was kept on purpose. A redirected position reads another token's row, or the mean of several; the mean is made once
and kept.

Shapes: T tokens, F feed-forward width, U distinct rows. Source: arXiv 2601.10639. Knows rows and places; nothing of
the block around it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from server.batch import Ints
from server.cache.device_table import DeviceFetch
from server.cache.prefetcher import Fetch
from server.cache.row_table import Table
from server.cache.table_files import ReadMode
from server.memory.addressing import Addresser, from_config
from server.memory.attachment import Attachment, fingerprint, open_tables
from server.memory.pack import StemConfig

KEPT_MEANS = 256  # rows made for redirects, over all layers


class StemPack(Attachment):
    """An attached STEM pack. `dtype`, `device`: the model's."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        config: StemConfig,
        addresser: Addresser,
        tables: dict[int, Table],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(name, fingerprint, addresser, tables)
        self.config, self.dtype, self.device = config, dtype, device
        self._means: OrderedDict[tuple[int, tuple[int, ...]], Tensor] = OrderedDict()

    def mean_row(self, layer: int, token_ids: tuple[int, ...]) -> Tensor:
        """[F] the mean of these tokens' rows, read at once and kept for the next time. Raises TableError."""
        key = layer, token_ids
        if key not in self._means:
            table = self.tables[layer]
            raw = np.empty((len(token_ids), table.row_bytes), np.uint8)
            table.gather(np.array(token_ids, np.int64), raw)
            rows = torch.empty(len(token_ids), table.dim)
            table.row_type.decode(torch.from_numpy(raw), rows)
            self._means[key] = rows.mean(0).to(self.device, self.dtype)
            while len(self._means) > KEPT_MEANS:
                self._means.popitem(last=False)
        self._means.move_to_end(key)
        return self._means[key]


@dataclass(frozen=True, slots=True)
class StemReading:
    """One STEM layer in one step: the fetch of distinct rows, the tokens that read it (None: all), and mean rows.

    `means`: (index among those tokens, row [F]) of redirects to several tokens.
    """

    pack: StemPack
    layer: int
    fetch: Fetch | DeviceFetch
    index: Tensor | None
    means: tuple[tuple[int, Tensor], ...] = ()

    def rows(self) -> Tensor:
        """Waits for the rows [T, F] of the tokens that read the table."""
        rows = self.fetch.wait()
        for index, row in self.means:
            rows[index] = row
        return rows

    def distinct(self) -> tuple[Tensor, Tensor] | None:
        """Waits for the rows [U, F] and inverse[T] of them; None unless every token reads a row of the table."""
        if self.index is not None or self.means or isinstance(self.fetch, DeviceFetch):
            return None
        found = self.fetch.wait_unique()
        return found.rows, found.inverse.view(-1)

    def up(self, dense: Tensor | None) -> Tensor:
        """[T, F] in place of the up-projection. `dense`: what that gives, for tokens that do not read the table."""
        rows = self.rows()
        if self.index is None:
            return rows
        assert dense is not None, "a request without STEM on a model without its up-projection"
        return dense.index_copy(0, self.index, rows)


def open_stem(
    folder: Path, name: str, config: StemConfig, dtype: torch.dtype, device: torch.device, read: ReadMode = "mmap"
) -> StemPack:
    """Raises PackError or TableError for tables that are not as the config says."""
    addresser = from_config(config.addressing())
    tables = open_tables(folder, addresser, config.intermediate_size, name, read)
    return StemPack(name, fingerprint(folder, config.layer_ids), config, addresser, tables, dtype, device)


def redirected(ids: Ints, places: Ints, redirects: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Applies a view's redirects to the ids[N, 1] of its tokens at positions places[N], in place.

    `redirects`: position → the tokens read instead. Returns index → tokens where there are several, whose mean counts.
    """
    means = {}
    for index, place in enumerate(places.tolist()):
        targets = redirects.get(place)
        if targets is not None:
            ids[index, 0] = targets[0]
            if len(targets) > 1:
                means[index] = targets
    return means
