"""What only a GPU shows of direct lookups: registered memory, captured graphs, streams beside each other.

Rows are compared with the row types' own decoding on the host, bit for bit. Needs torch, Triton and pytest only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import language
from server.cache import cuda_memory
from server.cache.device_table import DeviceTable
from server.cache.direct import DirectTable, Observed
from server.cache.hot_rows import HotRows, Source
from server.cache.pinned_table import PinnedTable
from server.cache.prefetcher import Lookup, Prefetcher
from server.cache.row_table import RowTable
from server.cache.row_types import row_type
from server.cache.table_writer import random_rows, write_table
from server.cache.transport import transport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not language.available or language.interpreting, reason="needs Triton, not its interpreter"),
]

KINDS = ("bfloat16", "float16", "float32", "int8", "float8_e4m3", "float8_e4m3_e8m0")
ROWS, DIM, HEADS, ORDERS, TOKENS = 4000, 256, 8, (2, 3), 64
DEVICE = torch.device("cuda")


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[list[PinnedTable | DeviceTable]]:
    opened: list[PinnedTable | DeviceTable] = []
    yield opened
    torch.cuda.synchronize()
    for table in opened:
        table.close()


def opened(tmp_path: Path, kind: str, placement: str, tables: list[PinnedTable | DeviceTable], dim: int = DIM):
    path = tmp_path / f"{kind}-{placement}.safetensors"
    write_table(path, random_rows(ROWS, dim, seed=1), ROWS, dim, row_type(kind, 0.37), layout="packed")
    source = RowTable.open(path, name="t")
    if placement == "device":
        table: PinnedTable | DeviceTable = DeviceTable(source, DEVICE)
    else:
        table = PinnedTable(source, cuda_memory.register, cuda_memory.unregister)
    source.close()
    assert transport(table, DEVICE).direct, getattr(table, "note", "")
    tables.append(table)
    return table


def expected(table: PinnedTable | DeviceTable, row_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    raw = np.empty((row_ids.numel(), table.row_bytes), np.uint8)
    table.gather(np.ascontiguousarray(row_ids.cpu().numpy().reshape(-1)), raw)
    values = torch.empty(row_ids.numel(), table.dim, dtype=dtype)
    table.row_type.decode(torch.from_numpy(raw), values)
    return values.view(len(row_ids), -1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN compares equal to NaN, whatever its payload; -0 does not to 0."""
    return tensor.cpu().float().nan_to_num(nan=12345.0).view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fetches_read_registered_rows_where_they_lie(
    kind: str, dtype: torch.dtype, tmp_path: Path, tables: list[PinnedTable | DeviceTable]
) -> None:
    table = opened(tmp_path, kind, "pinned", tables)
    assert isinstance(table, PinnedTable)
    prefetcher = Prefetcher(dtype, DEVICE, 64 << 20)
    prefetcher.read_in_place([(table, HEADS * len(ORDERS), ORDERS)])
    for seed in range(3):
        row_ids = np.random.default_rng(seed).integers(0, ROWS, (500, HEADS * len(ORDERS)))
        (fetch,) = prefetcher.begin([Lookup(table, 0, row_ids, orders=ORDERS)])
        rows = fetch.wait()
        assert fetch.in_place
        assert torch.equal(bits(rows), bits(expected(table, torch.from_numpy(row_ids), dtype)))
    prefetcher.close()


class Lookups:
    """A table behind hot rows (or none), static tensors of one step, and a captured graph of its lookup."""

    def __init__(self, table: PinnedTable | DeviceTable, dtype: torch.dtype, cache: int = 0) -> None:
        self.table, self.dtype = table, dtype
        source = Source(table, 0, ORDERS, HEADS)
        self.hot = HotRows(cache, [source], DEVICE, every=1) if cache else None
        self.prefetcher = Prefetcher(dtype, DEVICE, 1 << 20, hot=self.hot)
        if self.hot is not None:
            self.hot.mirror()
        self.observed: Observed[torch.Tensor] = Observed(2 * len(ORDERS) + TOKENS * len(ORDERS), DEVICE)
        counters = self.observed.words[: 2 * len(ORDERS)].view(len(ORDERS), 2)
        self.keys = self.observed.words[2 * len(ORDERS) :].view(TOKENS, len(ORDERS))
        self.row_ids = torch.zeros(TOKENS, len(ORDERS) * HEADS, dtype=torch.int64, device=DEVICE)
        self.seen = torch.ones(TOKENS, dtype=torch.bool, device=DEVICE)
        self.direct = DirectTable(
            table, 0, ORDERS, HEADS, max_tokens=TOKENS, dtype=dtype, device=DEVICE, counters=counters, hot=self.hot
        )
        self.rows = self.look_up()  # compiles
        torch.cuda.synchronize()
        self.graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(self.graph):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.rows = self.look_up()
            torch.cuda.current_stream().wait_stream(side)

    def look_up(self) -> torch.Tensor:
        return self.direct.lookup(self.row_ids, self.keys, self.seen)

    def draw(self, seed: int, distinct: int) -> torch.Tensor:
        """Writes a step's keys; its rows are a function of them."""
        keys = np.random.default_rng(seed).integers(0, distinct, (TOKENS, len(ORDERS)))
        spread = keys[..., None] * 2654435761 + np.arange(len(ORDERS))[:, None] * 97 + np.arange(HEADS) * 31
        row_ids = torch.from_numpy((spread % ROWS).reshape(TOKENS, -1))
        self.keys.copy_(torch.from_numpy(keys))
        self.row_ids.copy_(row_ids)
        return row_ids

    def between(self, row_ids: torch.Tensor) -> None:
        """As `DeviceRows.between`: nobody waits."""
        self.observed.push(row_ids)
        arrived = self.observed.poll()

        def observe(hot: HotRows) -> None:
            for words, asked in arrived:
                found = hot.find(self.table, 0, words[2 * len(ORDERS) :].reshape(TOKENS, -1))
                assert found is not None
                hot.remember(found, asked.numpy().reshape(-1), None)

        self.prefetcher.settle(observe)

    def counts(self) -> list[int]:
        return self.observed.words[: 2 * len(ORDERS)].view(-1, 2).sum(0).tolist()


@pytest.mark.parametrize("placement", ["pinned", "device"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_captured_lookup_reads_the_tables_rows(
    tmp_path: Path, tables: list[PinnedTable | DeviceTable], kind: str, placement: str, dtype: torch.dtype
) -> None:
    lookups = Lookups(opened(tmp_path, kind, placement, tables), dtype)
    for seed in range(3):
        row_ids = lookups.draw(seed, 1 << 40)
        lookups.graph.replay()
        assert torch.equal(bits(lookups.rows), bits(expected(lookups.table, row_ids, dtype)))
    assert lookups.counts() == [0, 4 * TOKENS * len(ORDERS)]  # the first compiled


def test_a_wide_row_of_a_token_comes_whole(tmp_path: Path, tables: list[PinnedTable | DeviceTable]) -> None:
    table = opened(tmp_path, "bfloat16", "pinned", tables, dim=9728)
    ids = torch.arange(0, ROWS, 61, device=DEVICE)[:, None]
    counters = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    direct = DirectTable(
        table, 0, (1,), 1, max_tokens=len(ids), dtype=torch.bfloat16, device=DEVICE, counters=counters, hot=None
    )
    found = direct.lookup(ids, ids, torch.ones(len(ids), dtype=torch.bool, device=DEVICE))
    assert torch.equal(found.cpu(), expected(table, ids, torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sets", [1, 40], ids=["one set", "many sets"])
def test_the_cache_changes_no_value_cold_warm_thrashing_or_reloaded(
    tmp_path: Path, tables: list[PinnedTable | DeviceTable], kind: str, sets: int
) -> None:
    table = opened(tmp_path, kind, "pinned", tables)
    lookups = Lookups(table, torch.bfloat16, cache=sets * 16 * HEADS * table.row_bytes)
    for step in range(60):
        row_ids = lookups.draw(step, 60)
        lookups.graph.replay()
        found = bits(lookups.rows)
        assert torch.equal(found, bits(expected(table, row_ids, torch.bfloat16)))
        lookups.between(row_ids)
        if step == 40:
            before = lookups.counts()
            assert before[0] > 0
            lookups.hot.reload(table)
            lookups.graph.replay()
            assert lookups.counts()[0] == before[0]  # nothing answers for the old generation
    assert lookups.counts()[0] > before[0]


def test_admission_between_replays_never_tears_a_row(tmp_path: Path, tables: list[PinnedTable | DeviceTable]) -> None:
    """Replays and admissions are issued as fast as the host can; every replay's rows are kept, and compared after."""
    table = opened(tmp_path, "int8", "pinned", tables)
    lookups = Lookups(table, torch.bfloat16, cache=2 * 16 * HEADS * table.row_bytes)
    kept, wanted = [], []
    for step in range(400):
        row_ids = lookups.draw(step, 200)
        lookups.graph.replay()
        kept.append(lookups.rows.clone())
        wanted.append(row_ids)
        lookups.between(row_ids)
    for found, row_ids in zip(kept, wanted, strict=True):
        assert torch.equal(bits(found), bits(expected(table, row_ids, torch.bfloat16)))
    assert sum(entered for entered, _ in lookups.hot.moves(("t", 0))) > 100


def test_the_hosts_path_reads_the_same_cache_from_a_stream_of_its_own(
    tmp_path: Path, tables: list[PinnedTable | DeviceTable]
) -> None:
    from server.cache.lookup import Lookup

    table = opened(tmp_path, "int8", "pinned", tables)
    lookups = Lookups(table, torch.bfloat16, cache=2 * 16 * HEADS * table.row_bytes)
    for step in range(200):
        row_ids = lookups.draw(step, 200)
        keys = np.random.default_rng(step).integers(0, 200, (TOKENS, len(ORDERS)))
        lookup = Lookup(table, 0, row_ids.numpy(), keys, orders=ORDERS)
        (fetch,) = lookups.prefetcher.begin([lookup])
        lookups.graph.replay()
        lookups.between(row_ids)  # while the prefetcher's worker may read the cache
        fetched = fetch.wait().clone()
        right = bits(expected(table, row_ids, torch.bfloat16))
        assert torch.equal(bits(lookups.rows), right) and torch.equal(bits(fetched), right)
    lookups.prefetcher.close()


def test_the_host_waits_for_nothing(tmp_path: Path, tables: list[PinnedTable | DeviceTable]) -> None:
    """Behind a second of work the host still prepares, launches and tidies up at once."""
    table = opened(tmp_path, "bfloat16", "pinned", tables)
    lookups = Lookups(table, torch.bfloat16, cache=1 << 20)
    for step in range(8):
        lookups.between(lookups.draw(step, 50))
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    row_ids = lookups.draw(9, 50)
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    lookups.graph.replay()
    for _ in range(3):
        lookups.between(row_ids)
    assert not busy.query()
    torch.cuda.synchronize()
