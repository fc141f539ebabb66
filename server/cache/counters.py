"""What a memory's tables did so far, per table and layer, and within it per n-gram order: snapshots.

    looked_up  =  device_hits  +  read  +  shared            rows, exactly, for every order

Crosses the engine's pipe with every step. Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class OrderCounters(NamedTuple):
    """Rows of n-grams of one length: found in the device cache, read from the table, or read for another token too.

    `admissions`, `evictions`: rows that entered the cache, and rows that had to leave it.
    """

    order: int
    looked_up: int = 0
    device_hits: int = 0
    read: int = 0
    shared: int = 0
    admissions: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class LayerCounters:
    """Running totals of one (table, layer): rows looked up (distinct ones, where each is read once), bytes read from
    the table, seconds fetching, seconds waited; rows found in the device cache, let in and put out; bytes sent to a
    device; now: rows its pool has room for, and the bytes of it that hold rows of this table.

    A fetch counts once it has been waited for. `orders` is empty for lookups that do not name theirs.
    """

    table: str
    layer: int
    rows: int = 0
    bytes: int = 0
    fetch_s: float = 0.0
    stall_s: float = 0.0
    device_hits: int = 0
    admissions: int = 0
    evictions: int = 0
    capacity: int = 0
    cache_bytes: int = 0
    orders: tuple[OrderCounters, ...] = ()
    device_bytes: int = 0
