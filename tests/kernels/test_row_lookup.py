"""Lookup and admission: rows bit-exact against the row types' own decoding, in every cache state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import admission, row_lookup
from kernels.row_lookup import HotTags, RowFormat
from server.cache.row_types import RowType, row_type

HEADS, DIM, ROWS, SETS, WAYS = 3, 32, 80, 4, 16


def table_of(kind: RowType) -> torch.Tensor:
    """Every byte value somewhere; scales that give no NaN but one."""
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, (ROWS, kind.row_bytes(DIM)), np.uint8)
    if kind.name == "int8":
        scales = generator.normal(size=(ROWS, 1)).astype("<f4")
        raw[:, DIM:] = scales.view(np.uint8)
    padded = np.zeros((ROWS, -(-raw.shape[1] // 16) * 16), np.uint8)
    padded[:, : raw.shape[1]] = raw
    return torch.from_numpy(padded)


def form_of(kind: RowType, stride: int) -> RowFormat:
    if kind.name in ("float32", "float16", "bfloat16"):
        return RowFormat("plain", DIM, stride, dtype=getattr(torch, kind.name))
    return RowFormat(kind.name, DIM, stride, scale=0.37 if kind.name == "float8_e4m3" else 1.0)


def empty_tags(entry_bytes: int) -> tuple[HotTags, torch.Tensor]:
    tags = HotTags(
        torch.zeros(SETS, WAYS, dtype=torch.int64),
        torch.full((SETS, WAYS), -1, dtype=torch.int64),
        torch.full((SETS * WAYS, entry_bytes), 0xA5, dtype=torch.uint8),
    )
    return tags, torch.zeros(SETS, WAYS, dtype=torch.int32)


def grouped(keys: torch.Tensor, owners: torch.Tensor, heat: torch.Tensor):
    """Newcomers by set, hottest first, as an admission pass wants them."""
    where = row_lookup.set_of(owners, keys, SETS)
    order = torch.tensor(sorted(range(len(keys)), key=lambda i: (int(where[i]), -int(heat[i]))))
    sets, counts = where[order].unique_consecutive(return_counts=True)
    return order, sets, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN compares equal to NaN, whatever its payload."""
    return tensor.nan_to_num(nan=12345.0)


@pytest.mark.parametrize("lookup", [row_lookup.lookup, row_lookup.reference])
@pytest.mark.parametrize("admit", [admission.admit, admission.reference])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "int8", "float8_e4m3", "float8_e4m3_e8m0"])
def test_rows_are_the_tables_with_the_cache_off_cold_and_warm(lookup, admit, name: str) -> None:
    kind = row_type(name, 0.37)
    table = table_of(kind)
    form = form_of(kind, table.shape[1])
    generator = torch.Generator().manual_seed(1)
    count = 40
    keys = torch.randint(0, 25, (count,), generator=generator) * 1_000_003
    owners = torch.randint(0, 2, (count,), generator=generator)
    row_ids = (keys[:, None] // 1_000_003 + 31 * owners[:, None] + torch.arange(HEADS)) % ROWS
    expected = torch.empty(count * HEADS, DIM)
    kind.decode(table[row_ids.flatten()], expected)
    expected = expected.view(count, HEADS * DIM)
    dtype = form.dtype if form.kind == "plain" else torch.float32
    tags, counts = empty_tags(HEADS * table.shape[1])
    moves = torch.zeros(2, dtype=torch.int64)

    def rows(held: HotTags | None, counters: torch.Tensor) -> torch.Tensor:
        out = torch.full((count, HEADS * DIM), 7.0, dtype=dtype)
        extra = (16,) if lookup is row_lookup.lookup else ()
        lookup(table, form, row_ids, keys, owners, held, out, counters, *extra)
        return out.float()

    for held in (None, tags):  # off, cold
        counters = torch.zeros(2, dtype=torch.int64)
        assert torch.equal(bits(rows(held, counters)), bits(expected))
        assert counters.tolist() == [0, count]

    distinct = torch.unique(torch.stack([owners, keys, *row_ids.T]), dim=1)
    heat = torch.arange(1, distinct.shape[1] + 1, dtype=torch.int32)
    order, sets, starts = grouped(distinct[1], distinct[0], heat)
    chosen = [part[order].contiguous() for part in (distinct[1], distinct[0], heat, distinct[2:].T)]
    admit(table, tags, counts, starts, sets, *chosen, moves)
    counters = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(bits(rows(tags, counters)), bits(expected))
    assert counters.sum() == count and counters[0] > 0
    assert moves[0] == (tags.owners != -1).sum() + moves[1]
    assert int(moves[0]) >= min(WAYS, int(starts.diff().max()))


@pytest.mark.parametrize("admit", [admission.admit, admission.reference])
def test_a_colder_newcomer_does_not_enter_and_a_hotter_one_takes_the_coldest_way(admit) -> None:
    table = torch.arange(ROWS * 16, dtype=torch.int64).to(torch.uint8).view(ROWS, 16)
    tags, counts = empty_tags(16)
    keys, owners = torch.arange(WAYS) + 100, torch.zeros(WAYS, dtype=torch.int64)
    tags.keys[2], tags.owners[2], counts[2] = keys, owners, torch.arange(10, 10 + WAYS, dtype=torch.int32)
    moves = torch.zeros(2, dtype=torch.int64)
    new = torch.tensor([500, 600, 700])
    admit(
        table, tags, counts, torch.tensor([0, 3]), torch.tensor([2]), new, torch.ones(3, dtype=torch.int64),
        torch.tensor([50, 11, 11], dtype=torch.int32), torch.tensor([[5], [6], [7]]), moves,
    )  # fmt: skip
    assert moves.tolist() == [1, 1]
    assert tags.keys[2, 0] == 500 and tags.owners[2, 0] == 1 and counts[2, 0] == 50
    assert torch.equal(tags.cached[2 * WAYS], table[5])
    assert tags.keys[2, 1:].tolist() == keys[1:].tolist()


def test_the_sets_are_those_of_the_cache() -> None:
    hot_pool = pytest.importorskip("server.cache.hot_pool")
    generator = np.random.default_rng(3)
    keys, owners = generator.integers(0, 2**62, 200), generator.integers(0, 40, 200)
    expected = (hot_pool.mixed(owners, keys) >> np.uint64(32)) * np.uint64(12345) >> np.uint64(32)
    got = row_lookup.set_of(torch.from_numpy(owners), torch.from_numpy(keys), 12345)
    assert np.array_equal(got.numpy(), expected.astype(np.int64))
