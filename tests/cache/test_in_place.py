"""Rows that the device reads where they lie in RAM are those the host gathers, to the bit.

Here the device is a CPU, and the kernel its reference; tests/gpu has the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import language
from server.cache.hot_rows import HotRows, Source
from server.cache.pinned_table import PinnedTable
from server.cache.prefetcher import LayerCounters, Lookup, Prefetcher
from server.cache.row_table import RowTable
from server.cache.row_types import row_type
from server.cache.table_writer import random_rows, write_table
from server.errors import TableError
from tests.cache.test_prefetcher import CPU, MIB, ids_of

ROWS, DIM, HEADS, ORDERS = 4000, 96, 4, (2, 3)
COLUMNS = HEADS * len(ORDERS)


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "interpreting", False)


@pytest.fixture
def table(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PinnedTable]:
    kind = row_type(getattr(request, "param", "int8"), 0.37)
    path = tmp_path / "t.safetensors"
    write_table(path, random_rows(ROWS, DIM, 1), ROWS, DIM, kind, layout="packed")
    source = RowTable.open(path, name="t")
    made = PinnedTable(source)
    source.close()
    yield made
    made.close()


def prefetcher_of(table: PinnedTable, in_place: bool, dtype: torch.dtype = torch.float32, cache: int = 0) -> Prefetcher:
    hot = HotRows(cache, [Source(table, 1, ORDERS, HEADS)], CPU, every=1) if cache else None
    made = Prefetcher(dtype, CPU, MIB, hot=hot)
    if in_place:
        made.read_in_place([(table, COLUMNS, ORDERS), (table, 1, (1,))])
    return made


def lookups(table: PinnedTable, seed: int) -> list[Lookup]:
    """Of an Engram layer, and of one that reads a row a token, repeated ones once."""
    ngrams, tokens = ids_of(23, COLUMNS, seed, ROWS), ids_of(90, 1, seed, 40)
    keys = ids_of(23, len(ORDERS), seed % 3, 50)
    return [Lookup(table, 1, ngrams, keys, orders=ORDERS), Lookup(table, 2, tokens, dedup=True, orders=(1,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", ["bfloat16", "float32", "int8", "float8_e4m3", "float8_e4m3_e8m0"], indirect=True)
def test_rows_are_the_hosts(table: PinnedTable, dtype: torch.dtype) -> None:
    told: list[list[torch.Tensor]] = []
    for in_place in (False, True):
        prefetcher, rows = prefetcher_of(table, in_place, dtype), []
        for seed in range(4):
            for fetch in prefetcher.begin(lookups(table, seed)):
                rows.append(fetch.wait().clone())
                assert fetch.in_place == in_place
        prefetcher.close()
        told.append(rows)
    for gathered, read in zip(*told, strict=True):
        assert torch.equal(gathered.view(torch.uint8), read.view(torch.uint8))


def test_a_cache_learns_what_it_learns_from_gathered_rows(table: PinnedTable) -> None:
    """It is asked and told as ever; what it holds is read from the table all the same, and told so."""
    counted: list[tuple[LayerCounters, ...]] = []
    for in_place in (False, True):
        prefetcher = prefetcher_of(table, in_place, cache=1 << 18)
        for seed in range(12):
            for fetch in prefetcher.begin(lookups(table, seed)):
                fetch.wait()
        prefetcher.close()
        counted.append(prefetcher.counters())
    gathered, read = (counters[0] for counters in counted)
    assert read.admissions == gathered.admissions > 0 and read.rows == gathered.rows
    assert gathered.device_hits > 0 == read.device_hits
    assert read.bytes == read.rows * table.row_bytes


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_an_id_that_is_no_row_fails_its_fetch_alone(wrong: int, table: PinnedTable) -> None:
    prefetcher, good, bad = prefetcher_of(table, True), lookups(table, 0)[0], ids_of(5, COLUMNS, 0, ROWS)
    bad[3, 2] = wrong
    failing, sound = prefetcher.begin([Lookup(table, 1, bad, orders=ORDERS), good])
    with pytest.raises(TableError, match=f"asked for {wrong}$"):
        failing.wait()
    assert sound.wait().shape == (23, COLUMNS * DIM)
    prefetcher.close()


def test_a_table_that_failed_or_closed_is_not_read(table: PinnedTable) -> None:
    prefetcher = prefetcher_of(table, True)
    table.fault = "the rows are gone"
    with pytest.raises(TableError, match="the rows are gone"):
        prefetcher.begin(lookups(table, 0))[0].wait()
    prefetcher.close()


def test_a_table_whose_rows_cannot_be_read_so_is_gathered(table: PinnedTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("ptxas failed")

    monkeypatch.setattr("server.cache.in_place.lookup", broken)
    prefetcher = prefetcher_of(table, False)
    with pytest.raises(RuntimeError, match="ptxas"):
        prefetcher.read_in_place([(table, COLUMNS, ORDERS)])
    (fetch,) = prefetcher.begin(lookups(table, 0)[:1])
    assert fetch.wait().shape == (23, COLUMNS * DIM) and not fetch.in_place
    prefetcher.close()


def test_nothing_is_left_of_a_table_that_is_forgotten(table: PinnedTable) -> None:
    prefetcher = prefetcher_of(table, True)
    prefetcher.forget([table])
    (fetch,) = prefetcher.begin(lookups(table, 0)[:1])
    assert fetch.wait().shape == (23, COLUMNS * DIM) and not fetch.in_place
    prefetcher.close()
