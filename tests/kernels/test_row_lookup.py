"""Lookup: rows bit-exact against the row types' own decoding, in every cache state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import language, row_lookup
from kernels.row_lookup import HotTags, RowFormat
from server.cache.row_types import RowType, row_type

ORDERS, HEADS, DIM, ROWS, SETS, WAYS = 2, 3, 32, 80, 4, 16


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


def empty_tags(entry_bytes: int) -> HotTags:
    return HotTags(
        torch.zeros(SETS, WAYS, dtype=torch.int64),
        torch.full((SETS, WAYS), -1, dtype=torch.int64),
        torch.full((SETS * WAYS, entry_bytes), 0xA5, dtype=torch.uint8),
    )


def enter(tags: HotTags, table: torch.Tensor, owner: int, key: int, row_ids: torch.Tensor) -> None:
    """Into the first free way of its set."""
    where = int(row_lookup.set_of(torch.tensor(owner), torch.tensor(key), SETS))
    way = int((tags.owners[where] == -1).int().argmax())
    assert tags.owners[where, way] == -1
    tags.cached[where * WAYS + way] = table[row_ids].flatten()
    tags.keys[where, way], tags.owners[where, way] = key, owner


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN compares equal to NaN, whatever its payload; -0 does not to 0."""
    return tensor.nan_to_num(nan=12345.0).view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


IMPLEMENTATIONS = [
    row_lookup.lookup,
    lambda *args, seen=None: row_lookup.reference(*args[:8], seen),  # has no programs
]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # infinities are compared too
@pytest.mark.parametrize("lookup", IMPLEMENTATIONS, ids=["kernel", "reference"])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "int8", "float8_e4m3", "float8_e4m3_e8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_the_tables_with_the_cache_off_cold_and_warm(lookup, name: str, dtype: torch.dtype) -> None:
    if language.interpreting and lookup is row_lookup.lookup and (name == "bfloat16") != (dtype == torch.bfloat16):
        pytest.skip("the interpreter truncates to bf16 and loses its subnormals; a GPU rounds")
    kind = row_type(name, 0.37)
    table = table_of(kind)
    form = form_of(kind, table.shape[1])
    generator = torch.Generator().manual_seed(1)
    tokens, owners = 20, torch.tensor([5, 9])
    keys = torch.randint(0, 25, (tokens, ORDERS), generator=generator) * 1_000_003
    row_ids = (keys[..., None] // 1_000_003 + 31 * torch.arange(ORDERS)[:, None] + torch.arange(HEADS)) % ROWS
    expected = torch.empty(tokens * ORDERS * HEADS, DIM, dtype=dtype)
    kind.decode(table[row_ids.flatten()], expected)
    expected = expected.view(tokens, -1)
    seen = torch.arange(tokens) % 3 != 1

    def rows(held: HotTags | None, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[list[int]]]:
        out = torch.full((tokens, ORDERS * HEADS * DIM), 7.0, dtype=dtype)
        counters = torch.zeros(ORDERS, 2, dtype=torch.int64)
        lookup(table, form, row_ids.flatten(1), keys, owners, held, out, counters, 16, seen=mask)
        return out, counters.tolist()

    tags = empty_tags(HEADS * table.shape[1])
    for held in (None, tags):  # off, cold
        out, counted = rows(held)
        assert torch.equal(bits(out), bits(expected))
        assert counted == [[0, tokens], [0, tokens]]
    entered = {(order, int(keys[token, order])) for token in range(0, tokens, 2) for order in range(ORDERS)}
    for token, order in np.ndindex(tokens, ORDERS):
        if (order, int(keys[token, order])) in entered and token % 2 == 0:
            with_key = (tags.owners == owners[order]) & (tags.keys == keys[token, order])
            if not with_key.any():
                enter(tags, table, int(owners[order]), int(keys[token, order]), row_ids[token, order])
    hits = [[(order, int(key)) in entered for order, key in enumerate(token)] for token in keys]
    out, counted = rows(tags)
    assert torch.equal(bits(out), bits(expected))
    found = [sum(hit[order] for hit in hits) for order in range(ORDERS)]
    assert counted == [[found[order], tokens - found[order]] for order in range(ORDERS)]
    assert 0 < min(found) < tokens
    out, counted = rows(tags, seen)
    assert torch.equal(bits(out[seen]), bits(expected[seen])) and (out[~seen] == 7.0).all()
    assert [sum(order) for order in counted] == [int(seen.sum())] * ORDERS


@pytest.mark.parametrize("lookup", IMPLEMENTATIONS, ids=["kernel", "reference"])
@pytest.mark.parametrize("name", ["bfloat16", "int8", "float8_e4m3_e8m0"])
def test_a_row_wider_than_a_program_holds_comes_in_pieces(lookup, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_lookup, "VALUES", 64)
    kind, dim = row_type(name), 160
    raw = np.random.default_rng(0).integers(0, 120, (ROWS, kind.row_bytes(dim)), np.uint8)
    table = torch.from_numpy(raw)
    form = RowFormat("plain" if name == "bfloat16" else name, dim, table.shape[1])
    ids = torch.tensor([[3], [79], [0]])
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    expected = torch.empty(3, dim, dtype=dtype)
    kind.decode(table[ids.flatten()], expected)
    out = torch.full((3, dim), 7.0, dtype=dtype)
    lookup(table, form, ids, ids, torch.tensor([0]), None, out, torch.zeros(1, 2, dtype=torch.int64), 2)
    assert torch.equal(bits(out), bits(expected))


def test_the_sets_are_those_of_the_cache() -> None:
    hot_pool = pytest.importorskip("server.cache.hot_pool")
    generator = np.random.default_rng(3)
    keys, owners = generator.integers(0, 2**62, 200), generator.integers(0, 40, 200)
    expected = (hot_pool.mixed(owners, keys) >> np.uint64(32)) * np.uint64(12345) >> np.uint64(32)
    got = row_lookup.set_of(torch.from_numpy(owners), torch.from_numpy(keys), 12345)
    assert np.array_equal(got.numpy(), expected.astype(np.int64))
