"""Cases of hashing, lookup and edits: rows and row ids to the bit, in every row type and cache state.

    misses    no n-gram is in the cache: whole rows out of registered host memory at random places
    hits      every n-gram is: out of device memory, after a look at the tags of its set
    mixed     every second one

Shapes: T tokens, O orders, C = O · 8 rows a token of D values each, S sets of W ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kernels import ngram_hash, row_lookup, row_patch
from kernels.ngram_hash import HashConstants
from kernels.row_lookup import HotTags
from server.bench.gpu.ceilings import grids, random_ids
from server.bench.gpu.kernel_case import BITS, Case, Sizes, different
from server.bench.gpu.models import DIM, HEADS, ORDERS
from server.bench.gpu.tables import MadeUp, fill, of_type
from server.cache.in_place import row_format
from server.cache.row_table import Table
from server.cache.row_types import RowType
from server.memory.addressing import NGramAddresser, from_config, windows_of

WAYS = 32
SPARE_SETS = 4  # sets of the cache, at least, for each that its entries would fill
TYPES = {"bfloat16": DIM, "int8": DIM, "float8_e4m3": DIM, "float8_e4m3_e8m0": 256}  # values a row
MANY_ROWS = 4096


class Wanted:
    """Distinct n-grams of T tokens, the rows of each, and a cache that holds the share `cached` of them."""

    def __init__(self, sizes: Sizes, table: Tensor, kind: RowType, dim: int, cached: float) -> None:
        self.table, self.kind, self.dim = table, kind, dim
        self.form = row_format(cast(Table, MadeUp("", len(table), dim, kind)))
        self.count, device = sizes.tokens * len(ORDERS), sizes.device
        self.row_ids = random_ids(len(table), self.count * HEADS, device).view(sizes.tokens, -1)
        self.keys = (torch.arange(self.count, device=device) * 1_000_003 + 17).view(-1, len(ORDERS))
        self.owners = torch.arange(len(ORDERS), device=device)
        entry = HEADS * table.shape[1]
        sets = max(sizes.cache_bytes // (WAYS * entry), -(-self.count // WAYS) * SPARE_SETS)
        self.tags = HotTags(
            torch.zeros(sets, WAYS, dtype=torch.int64, device=device),
            torch.full((sets, WAYS), -1, dtype=torch.int64, device=device),
            torch.full((sets * WAYS, entry), 0xA5, dtype=torch.uint8, device=device),
        )
        order = torch.randperm(self.count, generator=sizes.generator, device=device)
        self.held = order[: int(cached * self.count)]
        self._enter(self.held)
        self.out = torch.empty(sizes.tokens, len(ORDERS) * HEADS * dim, dtype=sizes.dtype, device=device)
        self.counters = torch.zeros(len(ORDERS), 2, dtype=torch.int64, device=device)

    def _enter(self, held: Tensor) -> None:
        """The entries to ways of their sets, in order; a set that is full keeps what it has."""
        sets, ways = self.tags.keys.shape
        owners, keys = self.owners[held % len(ORDERS)], self.keys.view(-1)[held]
        where, order = row_lookup.set_of(owners, keys, sets).sort(stable=True)
        way = torch.arange(len(where), device=where.device) - torch.searchsorted(where, where)
        entries, slot = order[way < ways], (where * ways + way)[way < ways]
        self.tags.keys.view(-1)[slot] = keys[entries]
        self.tags.owners.view(-1)[slot] = owners[entries]
        row_ids = self.row_ids.view(-1, HEADS)[held[entries]].view(-1)
        rows = self.table[row_ids.to(self.table.device)].to(slot.device)
        self.tags.cached[slot] = rows.view(len(entries), self.tags.cached.shape[1])

    def look_up(self, programs: int) -> None:
        row_lookup.lookup(
            self.table, self.form, self.row_ids, self.keys, self.owners, self.tags, self.out, self.counters, programs
        )

    def expected(self) -> Tensor:
        """By the row type's own decoding of what the host reads."""
        raw = self.table[self.row_ids.view(-1).to(self.table.device)].cpu()
        rows = torch.empty(len(raw), self.dim)
        self.kind.decode(raw, rows)
        return rows.to(self.out.dtype).view(self.out.shape)

    @property
    def moved(self) -> int:
        """Rows read, values written, and the tags of one set an n-gram."""
        return self.row_ids.numel() * self.table.shape[1] + self.out.nbytes + self.count * WAYS * 16


def looked_up(sizes: Sizes, table: Tensor, kind: RowType, dim: int, cached: float) -> Case:
    wanted = Wanted(sizes, table, kind, dim, cached)
    programs = grids(sizes.device)[-1]

    def fresh() -> None:
        wanted.out.fill_(float("nan"))
        wanted.counters.zero_()

    def deviation() -> float:
        counted = abs(int(wanted.counters.sum()) - wanted.count)
        short = max(0, int(0.99 * len(wanted.held)) - int(wanted.counters[:, 0].sum()))  # a full set leaves a few out
        return different(wanted.out.cpu(), wanted.expected()) + counted + short

    return Case(
        fresh,
        lambda: wanted.look_up(programs),
        deviation,
        f"{BITS}: the row type's own decoding",
        wanted.moved,
        *(("copy", 0) if cached else ("rows", wanted.row_ids.numel() * table.shape[1])),
    )


def row_cases(table: Callable[[], Tensor], kind: RowType, dim: int) -> dict[str, Callable[[Sizes], Case]]:
    """By name. `table()` uint8[rows, R]: the large one, registered; made when it is needed."""
    cases: dict[str, Callable[[Sizes], Case]] = {"n-gram hash": hashed}
    for name, cached in (("misses", 0.0), ("mixed", 0.5), ("hits", 1.0)):
        cases[f"lookup, {name}"] = lambda sizes, cached=cached: looked_up(sizes, table(), kind, dim, cached)  # type: ignore[misc]
    for other, width in TYPES.items():
        cases[f"lookup of {other} rows"] = lambda sizes, other=other, width=width: looked_up(  # type: ignore[misc]
            sizes, *small_table(sizes, other, width), 0.5
        )
    return cases | {"edited rows": patched}


def small_table(sizes: Sizes, name: str, dim: int) -> tuple[Tensor, RowType, int]:
    """A table on the device."""
    shape = MadeUp(name, MANY_ROWS, dim, of_type(name))
    raw = np.empty((shape.rows, shape.row_bytes), np.uint8)
    fill(shape, raw)
    return torch.from_numpy(raw).to(sizes.device), shape.row_type, dim


def hashed(sizes: Sizes) -> Case:
    """The paper's two layers, against the addresser on the host."""
    addressing = {
        "layer_ids": [1, 2],
        "max_ngram_size": max(ORDERS),
        "n_head_per_ngram": HEADS,
        "engram_vocab_size": [39_000_000] * len(ORDERS),
        "pad_id": 0,
        "seed": 0,
        "compressed_vocab_size": sizes.model.vocab_size,
    }
    addresser = from_config(addressing)
    assert isinstance(addresser, NGramAddresser)
    device, pad = sizes.device, addresser.n - 1
    primes = torch.tensor([addresser.primes[layer] for layer in addresser.layer_ids], device=device)
    flat = primes.view(len(primes), -1)
    constants = HashConstants(
        multipliers=torch.tensor([addresser.multipliers[layer] for layer in addresser.layer_ids], device=device),
        primes=primes,
        offsets=flat.cumsum(1) - flat,
        lookup=None,
        orders=addresser.orders,
        ids=addresser.rule.ids,
        outside=addresser.rule.pad,
    )
    length = -(-sizes.tokens // sizes.sequences)
    tokens = torch.zeros(sizes.sequences, pad + length, dtype=torch.int64, device=device)
    tokens[:, pad:] = sizes.integers(sizes.model.vocab_size + 3, sizes.sequences, length)  # unknown ids among them
    row_of = torch.arange(sizes.sequences, device=device).repeat_interleave(length)
    positions = torch.arange(length, device=device).repeat(sizes.sequences)
    found: list[Tensor] = [tokens, tokens]

    def work() -> None:
        found[:] = ngram_hash.ngram_rows(tokens, row_of, positions, pad, constants)

    def deviation() -> float:
        pairs = [windows_of(ids, addresser.n) for ids in tokens[:, pad:].cpu().numpy()]
        windows, blocked = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        wrong = 0.0
        for index, layer in enumerate(addresser.layer_ids):
            for got, expected in zip(found, addresser.address(windows, blocked)[layer], strict=True):
                wrong += different(got[index].cpu(), torch.from_numpy(np.ascontiguousarray(expected)))
        return wrong

    written = len(positions) * len(addresser.layer_ids) * len(ORDERS) * (HEADS + 1) * 8
    return Case(
        lambda: None,
        work,
        deviation,
        f"{BITS}: the addresser's rows and hashes",
        written + tokens.nbytes,
    )


def patched(sizes: Sizes) -> Case:
    """64 edits; every token of even number sees them."""
    dim, edits = DIM, min(64, sizes.tokens)
    row_ids = sizes.integers(MANY_ROWS, sizes.tokens, len(ORDERS) * HEADS)
    edited = torch.randperm(MANY_ROWS, generator=sizes.generator, device=sizes.device)[:edits].sort().values
    values = sizes.normal(edits, dim)
    overlays = torch.full((sizes.tokens, row_patch.SCOPES), -1, dtype=torch.int64, device=sizes.device)
    overlays[::2, 0] = 0
    before = sizes.normal(sizes.tokens, row_ids.shape[1] * dim)
    out = before.clone()

    def deviation() -> float:
        expected = before.view(sizes.tokens, -1, dim).clone()
        hit = (row_ids[..., None] == edited) & (overlays[:, 0] == 0)[:, None, None]
        token, column, edit = hit.nonzero(as_tuple=True)
        expected[token, column] = values[edit]
        return different(out, expected.view_as(out))

    return Case(
        lambda: out.copy_(before),
        lambda: row_patch.patch(out, row_ids, overlays, edited, values),
        deviation,
        f"{BITS}: edited rows where they are seen, the others as they were",
        row_ids.nbytes + overlays.nbytes,
    )
