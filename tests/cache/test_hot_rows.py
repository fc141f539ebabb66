"""HotRows: where rows are read changes, what is read never does."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from server.cache import hot_rows
from server.cache.hot_rows import HotRows, Source
from server.cache.hot_sources import shares
from server.cache.lookup import Fetch, Lookup
from server.cache.prefetcher import Prefetcher
from server.errors import CapacityError, StepFailed, TableError
from tests.cache.counted import CPU, MemoryTable, by_token, cache_for, hashed, source_of

MIB = 1 << 20
KINDS = ("float32", "bfloat16", "int8", "float8_e4m3_e8m0")


def keys_of(tokens: int, seed: int = 0, distinct: int = 60, orders: int = 2) -> np.ndarray:
    """Few distinct keys, the low ones often."""
    return np.random.default_rng(seed).zipf(1.3, (tokens, orders)) % distinct


def rows_of(prefetcher: Prefetcher, lookup: Lookup) -> torch.Tensor:
    (fetch,) = prefetcher.begin([lookup])
    return fetch.wait().clone()


def hits(prefetcher: Prefetcher) -> int:
    return sum(order.device_hits for layer in prefetcher.counters() for order in layer.orders)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [16, 200])  # one set, whose ways are fought over; room for everything
def test_rows_are_the_tables_bit_for_bit(entries: int, kind: str, dtype: torch.dtype, prefetch: bool) -> None:
    table = MemoryTable("t", kind=kind)
    hot = cache_for(hashed(table, 1, keys_of(1)), entries=entries)
    prefetcher = Prefetcher(dtype, CPU, MIB, prefetch, hot)
    for step in range(30):
        lookup = hashed(table, 1, keys_of(13, step))
        assert torch.equal(rows_of(prefetcher, lookup), table.values(lookup.row_ids, dtype))
    assert hits(prefetcher) > 0
    prefetcher.close()


@pytest.mark.parametrize("entries", [16, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_token_ids_are_the_tables_bit_for_bit(kind: str, entries: int) -> None:
    table = MemoryTable("t", kind=kind)
    hot = cache_for(by_token(table, 1, np.arange(1)), entries=entries)
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=hot)
    for step in range(30):
        lookup = by_token(table, 1, keys_of(13, step, distinct=300)[:, 0])
        assert torch.equal(rows_of(prefetcher, lookup), table.values(lookup.row_ids))
    assert hits(prefetcher) > 0
    prefetcher.close()


def test_keys_that_are_equal_in_two_tables_layers_or_orders_stay_apart() -> None:
    a, b = MemoryTable("a", seed=1), MemoryTable("b", seed=2)
    keys = np.repeat(keys_of(20, distinct=30, orders=1), 2, axis=1)  # the same key in both orders
    lookups = [hashed(a, 1, keys), hashed(a, 2, keys, heads=2), hashed(b, 1, keys), hashed(b, 2, keys, heads=2)]
    hot = cache_for(*lookups)
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=hot)
    for _ in range(5):
        for fetch in prefetcher.begin(lookups):
            table = fetch.lookup.table
            assert isinstance(table, MemoryTable)
            assert torch.equal(fetch.wait(), table.values(fetch.lookup.row_ids))
    assert {layer.table for layer in prefetcher.counters() if layer.orders[0].device_hits} == {"a", "b"}
    prefetcher.close()


def test_keys_of_one_hash_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_rows, "mixed", lambda owners, keys: np.full(len(keys), 5, np.uint64))
    table = MemoryTable("t")
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=cache_for(hashed(table, 1, keys_of(1))))
    for step in range(20):
        lookup = hashed(table, 1, keys_of(13, step))
        assert torch.equal(rows_of(prefetcher, lookup), table.values(lookup.row_ids))
    assert hits(prefetcher) > 0
    prefetcher.close()


def test_after_a_reload_nothing_of_the_old_table_is_served() -> None:
    table, other = MemoryTable("t", seed=1), MemoryTable("o", seed=2)
    lookups = [hashed(table, 1, keys_of(20)), hashed(other, 1, keys_of(20))]
    hot = cache_for(*lookups)
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=hot)
    for _ in range(3):
        for fetch in prefetcher.begin(lookups):
            fetch.wait()
    table.fill(seed=9)
    hot.reload(table)
    before = hits(prefetcher)
    assert torch.equal(rows_of(prefetcher, lookups[0]), table.values(lookups[0].row_ids))
    assert hits(prefetcher) == before
    rows_of(prefetcher, lookups[1])
    assert hits(prefetcher) == before + lookups[1].row_ids.size  # another table's rows stay
    prefetcher.close()


def test_what_was_seen_before_a_reload_does_not_enter_as_new() -> None:
    table = MemoryTable("t", seed=1)
    lookup = hashed(table, 1, keys_of(20))
    hot = cache_for(lookup)
    found = hot.find(table, 1, lookup.keys)
    assert found is not None
    hot.remember(found, lookup.row_ids, None)
    hot.reload(table)
    hot.learn()
    again = hot.find(table, 1, lookup.keys)
    assert again is not None
    assert not len(again.hits)


def test_a_table_whose_file_was_changed_fails_even_where_all_rows_are_cached() -> None:
    table = MemoryTable("t")
    lookup = hashed(table, 1, keys_of(8))
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=cache_for(lookup))
    for _ in range(3):
        rows_of(prefetcher, lookup)
    assert hits(prefetcher) >= lookup.row_ids.size
    table.fault = "file x was replaced"
    with pytest.raises(TableError, match="file x was replaced"):
        rows_of(prefetcher, lookup)
    prefetcher.close()


def test_a_fault_while_rows_enter_leaves_the_cache_as_it_was() -> None:
    table = MemoryTable("t")
    lookup = hashed(table, 1, keys_of(8))
    hot = cache_for(lookup)
    found = hot.find(table, 1, lookup.keys)
    assert found is not None
    hot.remember(found, lookup.row_ids, None)
    table.fault = "gone"
    hot.learn()
    assert all(pool.used == 0 for pool in hot.pools.values())
    assert hot.moves(("t", 1)) == [(0, 0), (0, 0)]


def test_a_cache_that_fails_is_left_out_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    table = MemoryTable("t")
    hot = cache_for(hashed(table, 1, keys_of(1)))
    hot.learn = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=hot)
    with caplog.at_level(logging.ERROR):
        for step in range(4):
            lookup = hashed(table, 1, keys_of(5, step))
            assert torch.equal(rows_of(prefetcher, lookup), table.values(lookup.row_ids))
        prefetcher.close()
    assert [record.message for record in caplog.records] == ["the device cache failed and is not used any more"]


def test_the_worker_goes_on_if_the_cache_fails_elsewhere_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`settle` gives a mirrored cache up on the engine's thread, between two looks of the worker."""
    lookup, done = hashed(MemoryTable("t"), 1, keys_of(3)), list[str]()
    hot = cache_for(lookup)

    class Reader:
        """Has the cache when first asked for it, and no more."""

        def __init__(self) -> None:
            self.answers = [hot]

        @property
        def hot(self) -> HotRows | None:
            return self.answers.pop() if self.answers else None

        def fill(self, fetch: Fetch) -> None:
            done.append("fetch")

    prefetcher = Prefetcher(torch.float32, CPU, MIB, prefetch=False)
    fetches = prefetcher.begin([lookup])
    monkeypatch.setattr(prefetcher, "_reader", Reader())
    prefetcher._serve_all(fetches)
    monkeypatch.setattr(prefetcher, "_reader", Reader())
    prefetcher._do_in_turn(lambda: done.append("job"))
    assert done == ["fetch", "job"] and not hot.turn.locked()
    prefetcher.close()


def test_an_unknown_table_is_read_past_the_cache() -> None:
    known, unknown = MemoryTable("known"), MemoryTable("unknown")
    namesake = MemoryTable("known", seed=5)
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=cache_for(hashed(known, 1, keys_of(1))))
    for table in (unknown, namesake):
        for _ in range(3):
            lookup = hashed(table, 1, keys_of(9))
            assert torch.equal(rows_of(prefetcher, lookup), table.values(lookup.row_ids))
    assert hits(prefetcher) == 0
    prefetcher.close()


def test_distinct_rows_of_several_columns_are_read_past_the_cache() -> None:
    table = MemoryTable("t")
    lookup = replace(hashed(table, 1, keys_of(9)), dedup=True)
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=cache_for(lookup))
    for _ in range(3):
        assert torch.equal(rows_of(prefetcher, lookup), table.values(lookup.row_ids))
    (counted,) = prefetcher.counters()
    assert counted.rows == table.read == 3 * len(np.unique(lookup.row_ids))
    assert all(order.looked_up == 0 for order in counted.orders)
    prefetcher.close()


def test_entries_are_put_together_on_a_device_as_on_the_host() -> None:
    table = MemoryTable("t", kind="int8", dim=30)  # 34 bytes a row: no whole words
    hot = cache_for(hashed(table, 1, keys_of(1), heads=3))
    for step in range(4):
        lookup = hashed(table, 1, keys_of(20, step), heads=3)
        found = hot.find(table, 1, lookup.keys)
        assert found is not None
        entries = table.raw[lookup.row_ids.reshape(-1)].reshape(40, 102)
        on_host = np.empty((40, 102), np.uint8)
        hot.assemble(found, entries[found.misses], on_host)
        on_device = hot.assemble_on_device(found, torch.from_numpy(entries[found.misses]))
        assert np.array_equal(on_host, entries)
        assert np.array_equal(on_device.numpy(), entries)
        hot.remember(found, lookup.row_ids, None)
        hot.learn()


# ── admission ──────────────────────────────────────────────────────────────────────────────────────────────────────


def learn(hot: HotRows, table: MemoryTable, keys: list[int], times: int = 1) -> None:
    for _ in range(times):
        lookup = by_token(table, 1, np.array(keys))
        found = hot.find(table, 1, lookup.row_ids)
        assert found is not None
        hot.remember(found, lookup.row_ids, None)
        hot.learn()


def cached(hot: HotRows, table: MemoryTable, keys: list[int]) -> list[bool]:
    found = hot.find(table, 1, np.array(keys)[:, None])
    assert found is not None
    return (found.slots >= 0).tolist()


@pytest.fixture
def one_set() -> tuple[HotRows, MemoryTable]:
    table = MemoryTable("t")
    return HotRows(16 * table.row_bytes, [Source(table, 1, (1,), 1)], CPU), table


def test_a_newcomer_enters_only_if_hotter_than_the_coldest_of_its_set(one_set: tuple[HotRows, MemoryTable]) -> None:
    hot, table = one_set
    residents = list(range(16))
    learn(hot, table, residents, times=3)
    learn(hot, table, residents[1:], times=2)
    learn(hot, table, [100], times=3)  # as hot as the coldest resident, not hotter
    assert cached(hot, table, [*residents, 100]) == [True] * 16 + [False]
    learn(hot, table, [100])
    assert cached(hot, table, [*residents, 100]) == [False] + [True] * 16


def test_who_had_to_leave_is_remembered_as_hot_as_it_was(one_set: tuple[HotRows, MemoryTable]) -> None:
    hot, table = one_set
    residents = list(range(16))
    learn(hot, table, residents, times=5)
    learn(hot, table, residents[1:], times=2)
    learn(hot, table, [100], times=6)
    assert cached(hot, table, [0, 100]) == [False, True]
    learn(hot, table, [0], times=2)  # 5 before, 7 now; the newcomer has 6
    assert cached(hot, table, [0, 100]) == [True, False]


def test_a_pass_brings_in_no_more_than_its_share_and_the_hottest_first() -> None:
    table = MemoryTable("t")
    hot = HotRows(64 * table.row_bytes, [Source(table, 1, (1,), 1)], CPU, most=5)
    learn(hot, table, [7] * 4 + [8] * 3 + [9] * 2 + list(range(20, 40)))
    assert cached(hot, table, [7, 8, 9]) == [True] * 3
    assert sum(pool.used for pool in hot.pools.values()) == 5


def test_what_was_hot_once_gives_way_in_time(one_set: tuple[HotRows, MemoryTable]) -> None:
    hot, table = one_set
    learn(hot, table, list(range(16)), times=200)
    for first in range(0, 40 * 100, 4):  # a stream that never asks for them again, 16 keys over and over
        learn(hot, table, [200 + (first + i) % 16 for i in range(4)])
    assert cached(hot, table, list(range(16))) == [False] * 16


def test_a_pass_comes_every_so_many_steps_and_at_once_after_a_long_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_rows, "MANY", 100)
    table = MemoryTable("t")
    hot = HotRows(64 * table.row_bytes, [Source(table, 1, (1,), 1)], CPU, every=4)
    passes: list[int] = []
    hot.learn = lambda: (passes.append(step), HotRows.learn(hot))  # type: ignore[method-assign, assignment, return-value]
    for step in range(1, 13):
        found = hot.find(table, 1, np.arange(60 if step > 9 else 5)[:, None])
        assert found is not None
        hot.remember(found, np.arange(len(found.slots)), None)
        hot.learn_if_due(step)
    assert passes == [4, 8, 11]


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_hit_rate_is_near_the_static_optimum_on_a_zipf_trace(alpha: float) -> None:
    """No policy that cannot see the future beats Σ p of the C most likely rows; the bar is 0.015 under it."""
    rows, entries, batch = 20_000, 400, 256
    table = MemoryTable("t", rows=rows, dim=1)
    hot = HotRows(entries * table.row_bytes, [Source(table, 1, (1,), 1)], CPU, every=1)
    likely = np.arange(1, rows + 1) ** -alpha
    likely /= likely.sum()
    trace = np.random.default_rng(0).permutation(rows)[
        np.searchsorted(np.cumsum(likely), np.random.default_rng(1).random(1200 * batch)).clip(0, rows - 1)
    ]
    found_at = []
    for step in range(1200):
        keys = trace[step * batch : (step + 1) * batch][:, None]
        found = hot.find(table, 1, keys)
        assert found is not None
        found_at.append(len(found.hits) / batch)
        hot.remember(found, keys, None)
        hot.learn()
    best = likely[:entries].sum()
    assert best - 0.015 <= np.mean(found_at[800:]) <= best + 0.01


# ── budget ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_budget_is_split_by_what_another_byte_would_save() -> None:
    """Slopes keys · E / (B · ln n) of Zipf traffic are equal, save for rounding."""
    ngrams = Source(MemoryTable("a", rows=80_000, dim=64, kind="int8"), 1, (2, 3), 8)
    tokens = Source(MemoryTable("b", rows=50_000, dim=576, kind="bfloat16"), 9, (1,), 1)
    given = shares(32 * MIB, [ngrams, tokens])
    assert sum(given.values()) == pytest.approx(32 * MIB, abs=2)
    slopes = [2 * 544 / given[544] / np.log(10_000), 1152 / given[1152] / np.log(50_000)]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)


def test_a_token_table_gets_no_more_than_all_its_rows() -> None:
    ngrams = Source(MemoryTable("a", rows=8_000), 1, (2, 3), 4)
    tokens = Source(MemoryTable("b", rows=100), 9, (1,), 1)
    assert shares(MIB, [ngrams, tokens]) == {128: 12_800, 512: MIB - 12_800}


def test_a_budget_under_one_set_of_each_names_what_would_do() -> None:
    ngrams = Source(MemoryTable("a", rows=8_000), 1, (2, 3), 4)
    tokens = Source(MemoryTable("b", rows=100), 9, (1,), 1)
    with pytest.raises(CapacityError, match=r"--device-cache is 10239 bytes; one set of every entry size needs 10240"):
        shares(10_239, [ngrams, tokens])
    cache = HotRows(10_240, [ngrams, tokens], CPU)
    assert [pool.capacity for pool in cache.pools.values()] == [16, 16]


# ── counters and hot lists ─────────────────────────────────────────────────────────────────────────────────────────


def test_rows_looked_up_are_exactly_the_sum_over_the_tiers() -> None:
    a, b = MemoryTable("a"), MemoryTable("b")
    hot = cache_for(hashed(a, 1, keys_of(1)), by_token(b, 2, np.arange(1)), entries=16)
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=hot)
    looked_up = {"a": 0, "b": 0}
    for step in range(40):
        lookups = [hashed(a, 1, keys_of(1 + step % 7, step)), by_token(b, 2, keys_of(9, step)[:, 0])]
        for fetch in prefetcher.begin(lookups):
            fetch.wait()
        for lookup in lookups:
            looked_up[lookup.table.name] += lookup.row_ids.size
    counted = {layer.table: layer for layer in prefetcher.counters()}
    for name, table in (("a", a), ("b", b)):
        orders = counted[name].orders
        assert sum(order.looked_up for order in orders) == looked_up[name]
        assert all(o.looked_up == o.device_hits + o.read + o.shared for o in orders)
        assert counted[name].rows == sum(order.read + order.device_hits for order in orders)
        assert counted[name].bytes == sum(order.read for order in orders) * table.row_bytes
        entered = sum(order.admissions for order in orders)
        assert table.read == sum(order.read for order in orders) + entered  # what enters is read once more
        assert entered - sum(order.evictions for order in orders) == counted[name].cache_bytes // table.row_bytes
        assert 0 < counted[name].cache_bytes <= counted[name].capacity * table.row_bytes
        assert all(order.device_hits for order in orders)
    assert [order.order for order in counted["a"].orders] == [2, 3]
    prefetcher.close()


def ask(hot: HotRows, table: MemoryTable, key: int, asker: int) -> None:
    lookup = hashed(table, 1, np.array([[key, key]]), askers=np.array([asker]))
    found = hot.find(table, 1, lookup.keys)
    assert found is not None
    hot.remember(found, lookup.row_ids, lookup.askers)
    hot.learn()


def test_a_hot_list_holds_what_several_requests_asked_for_and_nobodys_own() -> None:
    table = MemoryTable("t")
    hot = cache_for(hashed(table, 1, keys_of(1)))
    for asker in (1, 2, 3, 4):
        ask(hot, table, key=10, asker=asker)
    for _ in range(20):
        for asker in (7, 2_000_000_000):
            ask(hot, table, key=11, asker=asker)
    lists = hot.hot_list(source_of(hashed(table, 1, keys_of(1))))
    assert [keys.tolist() for keys, _ in lists] == [[10], [10]]


def test_an_adopted_hot_list_is_served_from_the_first_lookup_on_and_saved_again() -> None:
    table = MemoryTable("t")
    lookup = hashed(table, 1, np.arange(12).reshape(6, 2))
    hot = cache_for(lookup)
    source = hot.sources["t", 1]
    for order in (0, 1):
        row_ids = lookup.row_ids.reshape(6, 2, 4)[:, order]
        assert hot.adopt(source, order, lookup.keys[:, order], np.full(6, 3), row_ids) == 6
        assert hot.adopt(source, order, lookup.keys[:, order], np.full(6, 3), row_ids) == 0
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=hot)
    read = table.read
    assert torch.equal(rows_of(prefetcher, lookup), table.values(lookup.row_ids))
    assert table.read == read
    assert [sorted(keys.tolist()) for keys, _ in hot.hot_list(source)] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    prefetcher.close()


class Steps(RuleBasedStateMachine):
    """Any order of steps, hints, reloads and hot lists over a cache of one set: rows are always the table's."""

    @initialize(prefetch=st.booleans(), every=st.integers(1, 3))
    def start(self, prefetch: bool, every: int) -> None:
        self.tables = [MemoryTable("a", 300, 4), MemoryTable("b", 300, 4, "int8", 1)]
        lookups = [self.lookup(seed) for seed in range(6)]
        hot = HotRows(
            16 * sum(size for size in {source_of(lookup).entry_bytes for lookup in lookups}),
            [source_of(lookup) for lookup in {(x.table.name, x.layer): x for x in lookups}.values()],
            CPU,
            every=every,
        )
        self.prefetcher = Prefetcher(torch.float32, CPU, 1 << 16, prefetch, hot)
        self.fetches: list[list[Fetch]] = [[], []]

    def lookup(self, seed: int) -> Lookup:
        keys = keys_of(1 + seed % 7, seed // 6, distinct=40)
        table = self.tables[seed % 2]
        return by_token(table, 9, keys[:, 0]) if seed % 3 == 2 else hashed(table, seed % 3, keys, heads=2)

    @rule(seeds=st.lists(st.integers(0, 60), max_size=4))
    def hint(self, seeds: list[int]) -> None:
        self.prefetcher.hint([self.lookup(seed) for seed in seeds])

    @rule(seeds=st.lists(st.integers(0, 60), max_size=4))
    def begin(self, seeds: list[int]) -> None:
        self.fetches = [self.fetches[1], self.prefetcher.begin([self.lookup(seed) for seed in seeds])]

    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from([0, 1]))
        if self.fetches[step]:
            self.check(data.draw(st.sampled_from(self.fetches[step])))

    @rule(table=st.integers(0, 1))
    def reload(self, table: int) -> None:
        assert self.prefetcher.hot is not None
        self.prefetcher.hot.reload(self.tables[table])

    @rule(seed=st.integers(0, 60))
    def adopt(self, seed: int) -> None:
        lookup, hot = self.lookup(seed), self.prefetcher.hot
        assert hot is not None and lookup.keys is not None
        source = hot.sources[lookup.table.name, lookup.layer]
        keys, first = np.unique(lookup.keys[:, 0], return_index=True)
        row_ids = lookup.row_ids.reshape(len(lookup.keys), len(source.orders), -1)[first, 0]
        self.prefetcher.between_fetches(partial(hot.adopt, source, 0, keys, keys + 1, row_ids))

    def check(self, fetch: Fetch) -> None:
        table = fetch.lookup.table
        assert isinstance(table, MemoryTable)
        try:
            rows = fetch.wait()
        except StepFailed:
            return  # a later step's rows stand there by now
        assert torch.equal(rows, table.values(fetch.lookup.row_ids))

    def teardown(self) -> None:
        if hasattr(self, "prefetcher"):
            for fetches in self.fetches:
                for fetch in fetches:
                    self.check(fetch)
            self.prefetcher.close()
            for layer in self.prefetcher.counters():
                assert all(o.looked_up == o.device_hits + o.read + o.shared for o in layer.orders)


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_another_pack_under_the_name_of_one_that_left_is_counted_by_itself() -> None:
    old, new = MemoryTable("a"), MemoryTable("a", seed=1)
    asked = hashed(old, 1, keys_of(6))
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=cache_for(asked))

    def read(lookup: Lookup) -> None:
        for fetch in prefetcher.begin([lookup]):
            fetch.wait()

    read(asked)
    prefetcher.forget([old])
    shorter = hashed(new, 1, keys_of(6)[:, :1])
    prefetcher.cache([source_of(shorter)])
    for _ in range(3):
        read(shorter)
    (counted,) = prefetcher.counters()
    assert [(order.order, order.looked_up) for order in counted.orders] == [(2, 3 * 6 * 4)]
    assert 0 < counted.device_hits < counted.rows == 3 * 6 * 4
    prefetcher.close()


def test_a_hot_list_of_a_table_that_left_does_not_enter_for_its_successor() -> None:
    """Both have one name, layer and entry size; what a key means is their own affair."""
    old, new = MemoryTable("a"), MemoryTable("a", seed=1)
    lookup, later = hashed(old, 1, keys_of(6)), hashed(new, 1, keys_of(6))
    assert lookup.keys is not None
    hot = cache_for(lookup)
    hot.remove(old)
    assert hot.add(source_of(later)) is None
    rows = lookup.row_ids.reshape(6, 2, 4)[:, 0]
    assert hot.adopt(source_of(lookup), 0, lookup.keys[:, 0], np.full(6, 3), rows) == 0
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=hot)
    (fetch,) = prefetcher.begin([later])
    assert torch.equal(fetch.wait(), new.values(later.row_ids))
    prefetcher.close()


def test_a_table_that_came_after_mirroring_can_leave_again() -> None:
    first, later = MemoryTable("a"), MemoryTable("b", seed=1)
    hot = cache_for(hashed(first, 1, keys_of(6)))
    hot.mirror()
    source = source_of(hashed(later, 1, keys_of(6)))
    for _ in range(3):
        assert hot.add(source) is None
        hot.remove(later)
    assert [key for key in hot.sources] == [("a", 1)]
