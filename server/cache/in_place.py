"""Rows read by the device where they lie in registered RAM, without a cache: what the fetches of a prefill do there.

    row_ids[T, C] ─ one copy ─→ device ─ rows in RAM, by unified addressing ─→ decode ─→ out[T, C · D]

The host gathers and decodes nothing: for 8,192 tokens of 16 rows that took one thread 20 ms a layer (docs/kernels.md),
more than the layers before need. Rows are the host path's, bit for bit. Knows ids, never tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.row_lookup import RowFormat, lookup
from server.cache.cuda_memory import send
from server.cache.pinned_table import PinnedTable
from server.cache.row_table import Ids, Table, check_range
from server.cache.row_types import Float8, Plain
from server.errors import TableError

# Programs that read rows beside a forward pass: each has some 2 KiB under way, and a host link needs 35 to 80 KiB
# (35 to 55 GB/s times 1 to 1.5 µs). More would take multiprocessors from the layers.
PROGRAMS = 64


def row_format(table: Table) -> RowFormat:
    kind = table.row_type
    if isinstance(kind, Plain):
        return RowFormat("plain", table.dim, table.row_bytes, dtype=kind.dtype)
    scale = kind.scale if isinstance(kind, Float8) else 1.0
    return RowFormat(kind.name, table.dim, table.row_bytes, scale=scale)  # type: ignore[arg-type]


def read_in_place(table: PinnedTable, row_ids: Ids, orders: int, out: Tensor) -> None:
    """row_ids[T, C] on the host, C = orders · heads → out[T, C · D] on the device. In the current stream; no wait.

    Raises TableError if an id is no row, or the table has failed.
    """
    if table.fault is not None:
        raise TableError(table.fault)
    if not row_ids.size:
        return
    check_range(table, row_ids.reshape(-1))
    ids = send(row_ids, out.device)
    unasked = torch.zeros(orders, 2, dtype=torch.int64, device=out.device)  # what was hit: there is no cache
    lookup(table.raw, row_format(table), ids, ids[:, :orders], unasked.view(-1), None, out, unasked, PROGRAMS)
