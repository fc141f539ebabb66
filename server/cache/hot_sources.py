"""What hot rows can be kept of, and how the bytes for them are divided. Knows sizes, never ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.cache.hot_pool import WAYS
from server.cache.row_table import Table
from server.errors import CapacityError

SourceKey = tuple[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What can be cached: a table at a layer, its n-gram orders, and how many rows each n-gram reads."""

    table: Table
    layer: int
    orders: tuple[int, ...]
    heads: int

    @property
    def key(self) -> SourceKey:
        return self.table.name, self.layer

    @property
    def entry_bytes(self) -> int:
        return self.heads * self.table.row_bytes


def shares(nbytes: int, sources: Sequence[Source]) -> dict[int, int]:
    """Bytes of each entry size's pool, so that one more byte saves as much reading in one as in another.

    Under Zipf traffic (exponent 1) a pool of B bytes over n entries saves, per token, keys · E · ln(B / E) / ln n
    bytes; equal slopes make B proportional to keys · E / ln n. Nobody gets more than all it could hold.

    Raises CapacityError if one set of each does not fit.
    """
    pools: dict[int, list[Source]] = {}
    for source in sources:
        pools.setdefault(source.entry_bytes, []).append(source)
    least = {size: WAYS[0] * size for size in pools}
    if nbytes < sum(least.values()):
        raise CapacityError(
            f"--device-cache is {nbytes} bytes; one set of every entry size needs {sum(least.values())}: raise it, or "
            f"set 0 to do without"
        )
    weights, ceilings = {}, {}
    for size, members in pools.items():
        entries = sum(max(source.table.rows // source.heads, 2) for source in members)
        weights[size] = sum(len(source.orders) for source in members) * size / math.log(entries)
        # Distinct n-grams are not bounded by a hashed table's rows.
        bounded = all(source.orders == (1,) for source in members)
        ceilings[size] = max(entries * size, least[size]) if bounded else nbytes
    return _filled(nbytes, least, ceilings, weights)


def _filled(
    nbytes: int, least: Mapping[int, int], ceilings: Mapping[int, int], weights: Mapping[int, float]
) -> dict[int, int]:
    """By weight, within bounds: whoever would fall outside is set to its bound, and the rest is divided anew."""
    given: dict[int, int] = {}
    while len(given) < len(weights):
        open_ = [size for size in weights if size not in given]
        rest, total = nbytes - sum(given.values()), sum(weights[size] for size in open_)
        wanted = {size: int(rest * weights[size] / total) for size in open_}
        low = {size: least[size] for size in open_ if wanted[size] < least[size]}
        high = {size: ceilings[size] for size in open_ if wanted[size] > ceilings[size]}
        given |= low or high or wanted
    return given
