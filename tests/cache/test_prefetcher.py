"""Prefetcher: the right rows at the right layer, waiting no longer than it must, holding no more than it may."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from server.cache.prefetcher import Fetch, LayerCounters, Lookup, Prefetcher
from server.cache.row_table import RowTable
from server.cache.row_types import Bytes, Plain, RowType, row_type
from server.cache.staging import max_tokens
from server.cache.table_writer import random_rows, write_table
from server.errors import CapacityError, NotReady, StepFailed, TableError

CPU = torch.device("cpu")
MIB = 1 << 20


class SlowTable:
    """Row i is [i, i, …]; every gather takes `delay` seconds of sleep first."""

    def __init__(self, delay: float = 0.0, rows: int = 1000, dim: int = 8, name: str = "slow") -> None:
        self.name, self.rows, self.dim, self.delay = name, rows, dim, delay
        self.row_type: RowType = Plain(torch.float32)
        self.row_bytes = dim * 4
        self.fault: str | None = None
        self.gathers: list[np.ndarray] = []
        self.threads: set[str] = set()

    def gather(self, ids: np.ndarray, out: Bytes) -> None:
        self.threads.add(threading.current_thread().name)
        self.gathers.append(ids.copy())
        time.sleep(self.delay)
        if self.fault is not None:
            raise TableError(self.fault)
        out.view(np.float32)[:] = ids[:, None]

    def page_in(self, ids: np.ndarray) -> int:
        return len(ids)


def ids_of(tokens: int, columns: int, seed: int = 0, rows: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, rows, (tokens, columns))


def expected(ids: np.ndarray, dim: int = 8) -> torch.Tensor:
    return torch.from_numpy(ids).float().repeat_interleave(dim, dim=1)


@pytest.fixture
def prefetcher() -> Prefetcher:
    made = Prefetcher(torch.float32, CPU, MIB)
    yield made
    made.close()


def test_rows_come_side_by_side_for_every_token(prefetcher: Prefetcher) -> None:
    ids = ids_of(5, 3)
    (fetch,) = prefetcher.begin([Lookup(SlowTable(), 1, ids)])
    assert torch.equal(fetch.wait(), expected(ids))
    assert torch.equal(fetch.wait(), expected(ids))  # asking twice is allowed


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "float8_e4m3_e8m0"])
def test_rows_of_a_file_are_decoded_to_the_models_dtype(
    name: str, dtype: torch.dtype, prefetch: bool, tmp_path: Path
) -> None:
    path, kind = tmp_path / "t.safetensors", row_type(name)
    write_table(path, random_rows(5000, 64, 1), 5000, 64, kind, layout="packed")
    values = np.concatenate(list(random_rows(5000, 64, 1)))
    decoded = torch.empty(5000, 64, dtype=dtype)
    kind.decode(torch.from_numpy(kind.encode(values)), decoded)
    table = RowTable.open(path)
    prefetcher = Prefetcher(dtype, CPU, 32 * MIB, prefetch)
    ids = ids_of(130, 16, rows=5000)  # 133,120 values: more than are decoded in one piece
    with torch.inference_mode():
        (fetch,) = prefetcher.begin([Lookup(table, 3, ids)])
        assert torch.equal(fetch.wait(), decoded[ids].view(130, 1024))
    prefetcher.close()
    table.close()


def test_distinct_rows_are_read_once_and_find_their_tokens(prefetcher: Prefetcher) -> None:
    table, ids = SlowTable(), np.array([[7], [3], [7], [7], [900]])
    (fetch,) = prefetcher.begin([Lookup(table, 2, ids, dedup=True)])
    unique = fetch.wait_unique()
    assert unique.rows[:, 0].tolist() == [3, 7, 900]
    assert torch.equal(unique.rows[unique.inverse[:, 0]], expected(ids))
    assert torch.equal(fetch.wait(), expected(ids))
    assert [len(gather) for gather in table.gathers] == [3]
    assert prefetcher.counters() == (LayerCounters("slow", 2, 3, 96, *_times(prefetcher)),)


def _times(prefetcher: Prefetcher) -> tuple[float, float]:
    (sums,) = prefetcher.counters()
    return sums.fetch_s, sums.stall_s


class Clock:
    """The prefetcher's time, in seconds: it moves only where a test or the end of a read moves it, so stalls are exact
    however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0
        self._then: Callable[[], object] | None = None

    def perf_counter(self) -> float:
        now, then, self._then = self.now, self._then, None
        if then is not None:
            then()
        return now

    def after_the_next_reading(self, then: Callable[[], object]) -> None:
        self._then = then


class TimedTable(SlowTable):
    """Its reads end one by one, when `ended` is released, at these times of the clock."""

    def __init__(self, clock: Clock, *ends: float) -> None:
        super().__init__()
        self.clock, self.ends, self.reading, self.ended = clock, list(ends), threading.Event(), threading.Semaphore(0)

    def gather(self, ids: np.ndarray, out: Bytes) -> None:
        self.reading.set()
        assert self.ended.acquire(timeout=60)
        super().gather(ids, out)
        self.clock.now = self.ends.pop(0)

    def wait_for(self, fetch: Fetch) -> None:
        """Waits for rows whose read ends once the wait has begun."""
        self.clock.after_the_next_reading(self.ended.release)
        fetch.wait()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("server.cache.prefetcher.time", made)
    return made


@pytest.mark.parametrize("compute", [0, 1, 3, 4])
def test_stall_is_what_is_left_of_the_read_when_the_layer_asks(
    compute: int, clock: Clock, prefetcher: Prefetcher
) -> None:
    table = TimedTable(clock, 4)
    (fetch,) = prefetcher.begin([Lookup(table, 1, ids_of(4, 2))])
    clock.now = compute
    table.wait_for(fetch)
    assert _times(prefetcher) == (4, 4 - compute)


def test_a_layer_that_asks_after_the_read_does_not_stall(clock: Clock, prefetcher: Prefetcher) -> None:
    table = TimedTable(clock, 4)
    (fetch,) = prefetcher.begin([Lookup(table, 1, ids_of(4, 2))])
    table.ended.release()
    with fetch.pending:  # the read is over
        pass
    clock.now = 6
    fetch.wait()
    assert _times(prefetcher) == (4, 0)


def test_two_layers_take_turns_and_each_waits_for_its_own_rows_only(clock: Clock, prefetcher: Prefetcher) -> None:
    table = TimedTable(clock, 4, 8)
    first, second = prefetcher.begin([Lookup(table, 1, ids_of(4, 2)), Lookup(table, 15, ids_of(4, 2, seed=1))])
    table.wait_for(first)
    clock.now += 2  # layers 2 to 14
    table.wait_for(second)
    one, two = prefetcher.counters()
    assert (one.layer, one.fetch_s, one.stall_s) == (1, 4, 4)
    assert (two.layer, two.fetch_s, two.stall_s) == (15, 8, 2)


def test_asking_for_the_second_layer_first_does_not_lose_the_first(prefetcher: Prefetcher) -> None:
    a, b = ids_of(2, 2), ids_of(2, 2, seed=1)
    first, second = prefetcher.begin([Lookup(SlowTable(0.002), 1, a), Lookup(SlowTable(), 2, b)])
    assert torch.equal(second.wait(), expected(b))
    assert torch.equal(first.wait(), expected(a))


def test_without_prefetch_the_whole_fetch_is_stall_on_the_callers_thread(clock: Clock) -> None:
    prefetcher, table = Prefetcher(torch.float32, CPU, MIB, prefetch=False), TimedTable(clock, 7)
    (fetch,) = prefetcher.begin([Lookup(table, 1, ids_of(4, 2))])
    clock.now = 3
    assert not table.reading.is_set()
    table.wait_for(fetch)
    assert table.threads == {threading.current_thread().name}
    assert _times(prefetcher) == (4, 4)
    prefetcher.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_times_are_real_seconds(prefetch: bool) -> None:
    prefetcher, begun = Prefetcher(torch.float32, CPU, MIB, prefetch), time.perf_counter()
    (fetch,) = prefetcher.begin([Lookup(SlowTable(0.004), 1, ids_of(4, 2))])
    fetch.wait()
    fetch_s, stall_s = _times(prefetcher)
    took = time.perf_counter() - begun
    assert 0.004 <= fetch_s <= took
    assert stall_s <= took and (prefetch or stall_s >= 0.004)
    prefetcher.close()


def test_begin_does_not_wait_for_the_table(clock: Clock, prefetcher: Prefetcher) -> None:
    table = TimedTable(clock, 1, 2)
    fetches = prefetcher.begin([Lookup(table, layer, ids_of(4, 2)) for layer in range(2)])
    assert not table.gathers  # no read has ended, and `begin` has
    for fetch in fetches:
        table.wait_for(fetch)
    assert len(table.gathers) == 2


def test_a_hinted_lookup_is_joined_not_read_again(prefetcher: Prefetcher) -> None:
    table, ids = SlowTable(), ids_of(4, 2)
    prefetcher.begin([])
    prefetcher.hint([Lookup(table, 1, ids), Lookup(table, 2, ids)])
    fetches = prefetcher.begin([Lookup(table, 1, ids.copy()), Lookup(table, 2, ids_of(4, 2, seed=9))])
    assert torch.equal(fetches[0].wait(), expected(ids))
    assert torch.equal(fetches[1].wait(), expected(ids_of(4, 2, seed=9)))
    joined = [gather for gather in table.gathers if np.array_equal(gather, ids.ravel())]
    assert len(table.gathers) <= 3  # layer 2's hint may have been dropped before it was read
    assert 1 <= len(joined) <= 2


@pytest.mark.parametrize("difference", ["table", "layer", "ids", "dedup"])
def test_only_the_same_rows_for_the_same_layer_are_joined(difference: str, prefetcher: Prefetcher) -> None:
    table, ids = SlowTable(), ids_of(4, 2)
    prefetcher.hint([Lookup(table, 1, ids)])
    changed = {
        "table": Lookup(SlowTable(), 1, ids),
        "layer": Lookup(table, 2, ids),
        "ids": Lookup(table, 1, ids + 1),
        "dedup": Lookup(table, 1, ids, dedup=True),
    }[difference]
    (fetch,) = prefetcher.begin([changed])
    assert torch.equal(fetch.wait(), expected(changed.row_ids))
    assert [sums.layer for sums in prefetcher.counters()] == [changed.layer]


def test_a_hint_is_forgotten_after_the_next_begin(prefetcher: Prefetcher) -> None:
    table, ids = SlowTable(), ids_of(4, 2)
    prefetcher.hint([Lookup(table, 1, ids)])
    prefetcher.begin([])
    (fetch,) = prefetcher.begin([Lookup(table, 1, ids)])
    assert torch.equal(fetch.wait(), expected(ids))
    assert fetch.step == 2


def test_hints_take_no_room_from_the_step(prefetcher: Prefetcher) -> None:
    """Half of 1 MiB holds 8,192 tokens of two 8-value rows; hints fill it, then the step needs all of it."""
    table = SlowTable()
    for seed in range(20):
        prefetcher.hint([Lookup(table, 1, ids_of(1500, 2, seed))])
    kept = ids_of(1500, 2, 3)
    ids = ids_of(8192 - 1500, 2, 99)
    fetches = prefetcher.begin([Lookup(table, 1, kept), Lookup(table, 2, ids)])
    assert torch.equal(fetches[0].wait(), expected(kept))
    assert torch.equal(fetches[1].wait(), expected(ids))


def test_rows_stay_while_the_next_step_is_fetched_and_are_refused_after_that(prefetcher: Prefetcher) -> None:
    table = SlowTable()
    ids = [ids_of(4, 2, seed) for seed in range(4)]
    (first,) = prefetcher.begin([Lookup(table, 1, ids[0])])
    rows = first.wait()
    (second,) = prefetcher.begin([Lookup(table, 1, ids[1])])
    second.wait()
    assert torch.equal(rows, expected(ids[0]))
    prefetcher.begin([Lookup(table, 1, ids[2])])[0].wait()
    assert torch.equal(second.wait(), expected(ids[1]))
    with pytest.raises(StepFailed, match="step 1 were asked for in step 3"):
        first.wait()


def test_without_prefetch_a_forgotten_fetch_does_not_write_over_a_later_steps_rows() -> None:
    prefetcher, table = Prefetcher(torch.float32, CPU, MIB, prefetch=False), SlowTable()
    fetches = [prefetcher.begin([Lookup(table, 1, ids_of(4, 2, seed))])[0] for seed in range(3)]
    rows = fetches[2].wait()
    with pytest.raises(StepFailed):
        fetches[0].wait()
    assert torch.equal(rows, expected(ids_of(4, 2, 2)))


def test_rows_are_refused_once_hints_may_stand_in_their_place(prefetcher: Prefetcher) -> None:
    table, ids = SlowTable(), ids_of(4, 2)
    (first,) = prefetcher.begin([Lookup(table, 1, ids)])
    (second,) = prefetcher.begin([Lookup(table, 1, ids)])
    assert torch.equal(first.wait(), expected(ids))
    prefetcher.hint([Lookup(table, 1, ids_of(4, 2, seed=5))])
    assert torch.equal(second.wait(), expected(ids))
    with pytest.raises(StepFailed, match="step 1 were asked for in step 2"):
        first.wait()


def test_a_tables_error_reaches_the_layer_as_it_is_and_others_go_on(prefetcher: Prefetcher) -> None:
    broken, sound = SlowTable(name="broken"), SlowTable()
    broken.fault = "file x was replaced"
    ids = ids_of(4, 2)
    bad, good = prefetcher.begin([Lookup(broken, 1, ids), Lookup(sound, 2, ids)])
    for _ in range(2):
        with pytest.raises(TableError, match="^file x was replaced$"):
            bad.wait()
    assert torch.equal(good.wait(), expected(ids))
    assert [sums.table for sums in prefetcher.counters()] == ["slow"]


def test_a_wrong_row_id_fails_its_fetch_only(prefetcher: Prefetcher, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_table(path, random_rows(10, 8, 1), 10, 8, row_type("float32"))
    table = RowTable.open(path)
    bad, good = prefetcher.begin([Lookup(table, 1, np.array([[10]])), Lookup(table, 2, np.array([[9]]))])
    with pytest.raises(TableError, match="asked for 10"):
        bad.wait()
    assert good.wait().shape == (1, 8)


def test_counters_add_up(prefetcher: Prefetcher) -> None:
    table = SlowTable()
    for _ in range(3):
        for fetch in prefetcher.begin([Lookup(table, layer, ids_of(5, 2)) for layer in (1, 4)]):
            fetch.wait()
            fetch.wait()
    assert [(c.table, c.layer, c.rows, c.bytes) for c in prefetcher.counters()] == [
        ("slow", 1, 30, 960),
        ("slow", 4, 30, 960),
    ]


def test_a_step_that_does_not_fit_names_the_bytes_and_both_flags() -> None:
    prefetcher = Prefetcher(torch.float32, CPU, 4096)
    with pytest.raises(CapacityError, match=r"33 tokens need 4224 bytes.*--staging gives 4096.*max-num-batched-tokens"):
        prefetcher.begin([Lookup(SlowTable(), 1, ids_of(33, 2))])
    ids = ids_of(32, 2)
    assert torch.equal(prefetcher.begin([Lookup(SlowTable(), 1, ids)])[0].wait(), expected(ids))
    prefetcher.close()


@pytest.mark.parametrize("staging", [1 << 10, 5000, 1 << 16, 1_000_003])
@pytest.mark.parametrize("columns", [(1,), (2,), (3, 16)])
def test_max_tokens_is_the_most_that_begin_takes(staging: int, columns: tuple[int, ...]) -> None:
    table = SlowTable(rows=10)
    shapes = [(table, c) for c in columns]
    try:
        most = max_tokens(staging, shapes, torch.float32)
    except CapacityError as error:
        assert f"--staging is {staging} bytes" in str(error)
        most = 0
    prefetcher = Prefetcher(torch.float32, CPU, staging, prefetch=False)

    def lookups(tokens: int) -> list[Lookup]:
        return [Lookup(table, i, ids_of(tokens, c, rows=10)) for i, c in enumerate(columns)]

    if most:
        prefetcher.begin(lookups(most))
    with pytest.raises(CapacityError):
        prefetcher.begin(lookups(most + 1))


def test_the_staging_one_token_needs_is_in_the_message_and_is_enough() -> None:
    table = SlowTable(dim=64)
    with pytest.raises(CapacityError, match=r"need 8704: raise --staging"):
        max_tokens(8000, [(table, 16), (table, 1)], torch.float32)
    assert max_tokens(8704, [(table, 16), (table, 1)], torch.float32) == 1


def test_closing_fails_what_is_not_served_and_refuses_what_comes_after(clock: Clock) -> None:
    prefetcher, table = Prefetcher(torch.float32, CPU, MIB), TimedTable(clock, 1)
    fetches = prefetcher.begin([Lookup(table, layer, ids_of(4, 2)) for layer in range(5)])
    assert table.reading.wait(60)
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    while not prefetcher._closed:
        time.sleep(0.001)
    table.ended.release()
    closer.join(60)
    prefetcher.close()
    assert torch.equal(fetches[0].wait(), expected(ids_of(4, 2)))
    for fetch in fetches[1:]:
        with pytest.raises(NotReady, match="closed before"):
            fetch.wait()
    with pytest.raises(NotReady, match="closed"):
        prefetcher.begin([Lookup(table, 1, ids_of(4, 2))])


def test_closing_from_many_threads_under_load_ends_the_worker_and_blocks_nobody() -> None:
    others = set(threading.enumerate())
    for _ in range(20):
        prefetcher = Prefetcher(torch.float32, CPU, MIB)
        closers = [threading.Thread(target=prefetcher.close) for _ in range(4)]
        served = 0
        try:
            for step in range(10_000):
                if step == 20:
                    for closer in closers:
                        closer.start()
                for fetch in prefetcher.begin([Lookup(SlowTable(), layer, ids_of(2, 2)) for layer in (1, 2)]):
                    fetch.wait()
                    served += 1
            raise AssertionError("never closed")
        except NotReady:
            pass
        for closer in closers:
            closer.join(timeout=5)
            assert not closer.is_alive()
        assert served >= 40
        assert "prefetcher" not in {thread.name for thread in set(threading.enumerate()) - others}


def test_10_000_steps_leave_no_thread_descriptor_or_memory_behind(prefetcher: Prefetcher, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_table(path, random_rows(1000, 32, 1), 1000, 32, row_type("int8"))
    table = RowTable.open(path)

    def steps(count: int) -> None:
        for step in range(count):
            ids = ids_of(4, 4, seed=step % 7)
            prefetcher.hint([Lookup(table, 1, ids)])
            for fetch in prefetcher.begin([Lookup(table, 1, ids), Lookup(table, 2, ids, dedup=True)]):
                fetch.wait()

    def held() -> tuple[int, int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    steps(500)
    gc.collect()
    before, objects, resident = held(), len(gc.get_objects()), _resident()
    steps(10_000)
    gc.collect()
    assert held() == before
    assert len(gc.get_objects()) - objects < 1000  # one lost object a step would be 10,000
    assert _resident() - resident < 8 * MIB
    table.close()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Steps(RuleBasedStateMachine):
    """Any order of hints, begins, waits and abandoned steps: a wait gives the rows it asked for or says it cannot."""

    @initialize(prefetch=st.booleans())
    def start(self, prefetch: bool) -> None:
        self.prefetcher = Prefetcher(torch.float32, CPU, 8192, prefetch)
        self.tables = [SlowTable(name="a"), SlowTable(name="b")]
        self.fetches: list[list[Fetch]] = [[], []]  # of the step before the last, of the last
        self.hinted = False

    def lookup(self, seed: int) -> Lookup:
        ids = ids_of(1 + seed % 11, 2, seed)
        return Lookup(self.tables[seed % 2], seed % 3, ids, dedup=seed % 5 == 0)

    @rule(seeds=st.lists(st.integers(0, 20), max_size=5))
    def hint(self, seeds: list[int]) -> None:
        self.prefetcher.hint([self.lookup(seed) for seed in seeds])
        self.hinted |= bool(seeds)

    @rule(seeds=st.lists(st.integers(0, 20), max_size=5))
    def begin(self, seeds: list[int]) -> None:
        self.fetches = [self.fetches[1], self.prefetcher.begin([self.lookup(seed) for seed in seeds])]
        self.hinted = False

    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from([0, 1]))
        if self.fetches[step]:
            self.check(step, data.draw(st.sampled_from(self.fetches[step])))

    def check(self, step: int, fetch: Fetch) -> None:
        """Rows of the step before the last stand where hints go: once there are some, they are refused."""
        try:
            rows = fetch.wait()
        except StepFailed:
            assert step == 0
            assert self.hinted
        else:
            assert torch.equal(rows, expected(fetch.lookup.row_ids))

    def teardown(self) -> None:
        if hasattr(self, "prefetcher"):
            for step in (0, 1):
                for fetch in self.fetches[step]:
                    self.check(step, fetch)
            self.prefetcher.close()


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
