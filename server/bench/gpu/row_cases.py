"""Cases of hashing, lookup and admission: rows and row ids to the bit, in every row type and cache state.

    misses    no n-gram is in the cache: whole rows out of registered host memory at random places
    hits      every n-gram is: out of device memory, after a look at the tags of its set
    mixed     every second one

Shapes: N = T · O n-grams of T tokens, 8 heads of D values each, S sets of W ways.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kernels import admission, ngram_hash, row_lookup
from kernels.ngram_hash import HashConstants
from kernels.row_lookup import KINDS, HotTags, RowFormat
from server.bench.gpu.ceilings import grids, random_ids
from server.bench.gpu.kernel_case import BITS, Case, Sizes, different
from server.bench.gpu.models import DIM, HEADS, ORDERS
from server.bench.gpu.tables import MadeUp, fill, of_type
from server.cache.row_types import Plain, RowType
from server.memory.addressing import NGramAddresser, from_config, windows_of

WAYS = 32
SPARE_SETS = 4  # sets a test's cache has for each that its entries would fill
TYPES = {"bfloat16": DIM, "int8": DIM, "float8_e4m3": DIM, "float8_e4m3_e8m0": 256}  # values a row
MANY_ROWS = 4096


def form_of(kind: RowType, dim: int, stride: int) -> RowFormat:
    """How the lookup kernel is told of a row type."""
    if isinstance(kind, Plain):
        return RowFormat("plain", dim, stride, dtype=kind.dtype)
    name = next(known for known in KINDS if known == kind.name)
    return RowFormat(name, dim, stride, scale=getattr(kind, "scale", 1.0))  # type: ignore[arg-type]


class Wanted:
    """N n-grams with distinct keys, the rows of each, and a cache that holds the first `cached` of them."""

    def __init__(self, sizes: Sizes, table: Tensor, kind: RowType, dim: int, cached: float) -> None:
        self.table, self.kind, self.dim = table, kind, dim
        self.count, device = sizes.tokens * len(ORDERS), sizes.device
        self.row_ids = random_ids(len(table), self.count * HEADS, device).view(self.count, HEADS)
        self.keys = torch.arange(self.count, device=device) * 1_000_003 + 17
        self.owners = torch.arange(self.count, device=device) % len(ORDERS)
        self.tags = tags_for(self, -(-self.count // WAYS) * SPARE_SETS, sizes)
        order = torch.randperm(self.count, generator=sizes.generator, device=device)
        self.held = order[: int(cached * self.count)]
        self._enter(self.held)
        self.out = torch.empty(self.count, HEADS * dim, dtype=sizes.dtype, device=device)
        self.counters = torch.zeros(2, dtype=torch.int64, device=device)

    def _enter(self, held: Tensor) -> None:
        """The entries to ways of their sets, in order; a set that is full keeps what it has."""
        sets, ways = self.tags.keys.shape
        where, order = row_lookup.set_of(self.owners[held], self.keys[held], sets).sort(stable=True)
        first = torch.searchsorted(where, where)
        way = torch.arange(len(where), device=where.device) - first
        fits = way < ways
        entries, slot = held[order][fits], (where * ways + way)[fits]
        self.tags.keys.view(-1)[slot] = self.keys[entries]
        self.tags.owners.view(-1)[slot] = self.owners[entries]
        rows = self.table[self.row_ids[entries].view(-1).to(self.table.device)]
        self.tags.cached[slot] = rows.to(slot.device).view(len(entries), -1)

    def look_up(self, programs: int) -> None:
        form = form_of(self.kind, self.dim, self.table.shape[1])
        row_lookup.lookup(
            self.table, form, self.row_ids, self.keys, self.owners, self.tags, self.out, self.counters, programs
        )

    def expected(self) -> Tensor:
        """By the row type's own decoding of what the host reads."""
        raw = self.table[self.row_ids.view(-1).to(self.table.device)].cpu()
        rows = torch.empty(len(raw), self.dim)
        self.kind.decode(raw, rows)
        return rows.to(self.out.dtype).view_as(self.out.cpu())

    @property
    def moved(self) -> int:
        """Rows read, values written, and the tags of one set an n-gram."""
        return self.row_ids.numel() * self.table.shape[1] + self.out.nbytes + self.count * WAYS * 16


def tags_for(wanted: Wanted, sets: int, sizes: Sizes) -> HotTags:
    entry = HEADS * wanted.table.shape[1]
    return HotTags(
        torch.zeros(sets, WAYS, dtype=torch.int64, device=sizes.device),
        torch.full((sets, WAYS), -1, dtype=torch.int64, device=sizes.device),
        torch.full((sets * WAYS, entry), 0xA5, dtype=torch.uint8, device=sizes.device),
    )


def looked_up(sizes: Sizes, table: Tensor, kind: RowType, dim: int, cached: float, name: str) -> Case:
    wanted = Wanted(sizes, table, kind, dim, cached)
    programs = grids(sizes.device)[-1]

    def fresh() -> None:
        wanted.out.fill_(float("nan"))
        wanted.counters.zero_()

    def deviation() -> float:
        counted = abs(int(wanted.counters.sum()) - wanted.count)
        short = max(0, int(0.99 * len(wanted.held)) - int(wanted.counters[0]))  # a full set leaves a few out
        return different(wanted.out.cpu(), wanted.expected()) + counted + short

    return Case(
        name,
        fresh,
        lambda: wanted.look_up(programs),
        deviation,
        f"{BITS}: the row type's own decoding",
        wanted.moved,
        "copy" if cached else "rows",
    )


def row_cases(sizes: Sizes, table: Tensor, kind: RowType, dim: int) -> Iterator[Case]:
    """`table` uint8[rows, R]: the large one, registered."""
    yield hashed(sizes)
    for cached, name in ((0.0, "misses"), (0.5, "mixed"), (1.0, "hits")):
        yield looked_up(sizes, table, kind, dim, cached, f"lookup, {name}")
    for other, width in TYPES.items():
        yield looked_up(sizes, *small_table(sizes, other, width), 0.5, f"lookup of {other} rows")
    yield admitted(sizes)


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
        "n-gram hash",
        lambda: None,
        work,
        deviation,
        f"{BITS}: the addresser's rows and hashes",
        written + tokens.nbytes,
    )


def admitted(sizes: Sizes) -> Case:
    """512 newcomers into an empty cache of their size, against the reference on the host."""
    table, kind, dim = small_table(sizes, "float8_e4m3", DIM)
    wanted = Wanted(sizes, table, kind, dim, 0.0)
    count, sets = min(512, wanted.count), len(wanted.tags.keys)
    heat = sizes.integers(200, count).int() + 1
    where = row_lookup.set_of(wanted.owners[:count], wanted.keys[:count], sets)
    order = torch.from_numpy(np.lexsort((-heat.cpu().numpy(), where.cpu().numpy()))).to(sizes.device)
    groups, members = where[order].unique_consecutive(return_counts=True)
    starts = torch.cat([members.new_zeros(1), members.cumsum(0)])
    new = [part[order].contiguous() for part in (wanted.keys[:count], wanted.owners[:count], heat)]
    rows = wanted.row_ids[:count][order].contiguous()
    counts, moves = torch.zeros(sets, WAYS, dtype=torch.int32, device=sizes.device), wanted.counters
    tensors = (wanted.tags.keys, wanted.tags.owners, wanted.tags.cached, counts, moves)
    before = [tensor.clone() for tensor in tensors]

    def fresh() -> None:
        for tensor, kept in zip(tensors, before, strict=True):
            tensor.copy_(kept)

    def deviation() -> float:
        keys, owners, cached, held, moved = (tensor.cpu() for tensor in before)
        admission.reference(
            table.cpu(), HotTags(keys, owners, cached), held, starts.cpu(), groups.cpu(), *(n.cpu() for n in new),
            rows.cpu(), moved,
        )  # fmt: skip
        expected = (keys, owners, cached, held, moved)
        return sum(different(got.cpu(), want) for got, want in zip(tensors, expected, strict=True))

    return Case(
        "admission",
        fresh,
        lambda: admission.admit(table, wanted.tags, counts, starts, groups, *new, rows, moves),
        deviation,
        f"{BITS}: tags, rows and counts of the reference",
        2 * count * HEADS * table.shape[1] + 2 * len(groups) * WAYS * 4,
    )
