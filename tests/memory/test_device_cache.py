"""Hot rows within a device's lookups: never another value, the host's tags and the host's choices, exact counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import language
from server.cache.counters import LayerCounters
from server.cache.hot_rows import HotRows
from server.memory.device_memory import DeviceMemory
from server.memory.memories import Memories
from server.view import MemoryView
from tests.memory.device_steps import Decoding
from tests.memory.stems import save_stem
from tests.memory.test_device_memory import HIDDEN, memories_of, view_of

ENTRY = 4 * 16 * 4  # pack_a's: 4 heads of 16 fp32 values


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "interpreting", False)


@pytest.fixture
def cached(tiny_llama_folder: Path, pack_a: Path) -> Iterator[Callable[..., Memories]]:
    opened = []

    def make(nbytes: int = 1 << 18, every: int = 1, pack: Path = pack_a, **flags: Any) -> Memories:
        memories = memories_of(tiny_llama_folder, [pack], device_cache=nbytes, **flags)
        hot_of(memories).every = every
        opened.append(memories)
        return memories

    yield make
    for memories in opened:
        memories.close()


def hot_of(memories: Memories) -> HotRows:
    assert memories.prefetcher.hot is not None
    return memories.prefetcher.hot


def steps_of(memories: Memories, device: DeviceMemory | None, seed: int = 0, tokens: int = 40) -> Iterator[Any]:
    """Runs a decode step at a time, on the device or the host; gives each step and the rows by layer. Text repeats."""
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 49152, 4)
    ids = [generator.choice(words, tokens, p=[0.4, 0.3, 0.2, 0.1]) for _ in range(4)]
    views = [view_of(memories, 0)] * 3 + [MemoryView()]
    decoding = Decoding(memories, ids, views)
    for pack in memories.packs:
        pack.allocate_conv(decoding.slots, torch.device("cpu"))
    for position in range(tokens):
        positions = np.full(4, position)
        if device is None:
            step = memories.begin(decoding.host(positions))
            assert step is not None
            for layer in step.layers | step.up_layers:  # waits
                reading = step.readings[layer][0] if layer in step.layers else step.ups[layer]
                reading.fetch.wait()
            memories.prefetcher.between_fetches(lambda: None)
            yield step
            continue
        device.prepare(views, np.arange(4))
        batch = decoding.device(positions, device.sees(views))
        step = device.begin(batch)
        expected = decoding.host(positions)
        for pack in memories.packs:
            addresses = pack.address(expected.windows[:3], expected.blocked[:3])
            for layer, (row_ids, _) in addresses.items():
                raw = np.empty((row_ids.size, pack.tables[layer].row_bytes), np.uint8)
                pack.tables[layer].gather(np.ascontiguousarray(row_ids.reshape(-1)), raw)
                values = torch.empty(row_ids.size, pack.tables[layer].dim)
                pack.tables[layer].row_type.decode(torch.from_numpy(raw), values)
                reading = step.readings[layer][0] if layer in step.readings else step.ups[layer]
                assert torch.equal(reading.rows[:3], values.view(3, -1))
        device.between(batch)
        check_mirror(hot_of(memories))
        yield step


def check_mirror(hot: HotRows) -> None:
    """The device's tags are the host's, and under every tag lie the table's rows."""
    for pool in hot.pools.values():
        assert pool.tags is not None
        assert np.array_equal(pool.tags.hot.owners.numpy(), pool._owners)
        held = pool._owners != -1
        assert np.array_equal(pool.tags.hot.keys.numpy()[held], pool._keys[held])
    for key in hot.sources:
        assert np.array_equal(hot.on_device(key)[1].numpy(), hot._owners[key])


def of_layer(memories: Memories, layer: int) -> LayerCounters:
    return next(counters for counters in memories.counters() if counters.layer == layer)


def check_counts(counters: LayerCounters) -> None:
    for order in counters.orders:
        assert order.looked_up == order.device_hits + order.read + order.shared
    assert counters.rows == sum(order.looked_up for order in counters.orders)
    assert counters.device_hits == sum(order.device_hits for order in counters.orders)


def test_rows_are_the_tables_cold_warm_and_after_a_reload(cached: Callable[..., Memories]) -> None:
    memories = cached()
    device, hot = DeviceMemory(memories, 6), hot_of(memories)
    list(steps_of(memories, device))
    warm = of_layer(memories, 1)
    check_counts(warm)
    assert warm.rows == 40 * 3 * 8 and warm.device_hits > warm.rows // 4
    assert warm.bytes == warm.device_bytes == (warm.rows - warm.device_hits) * 64
    assert warm.admissions > 0 and warm.capacity > 0 and warm.cache_bytes > 0
    for table in memories.packs[0].tables.values():
        hot.reload(table)
    check_mirror(hot)
    before = of_layer(memories, 1).device_hits
    first = steps_of(memories, device)
    next(first)
    assert of_layer(memories, 1).device_hits == before  # nothing answers for the old generation
    list(first)
    assert of_layer(memories, 1).device_hits > before


def test_rows_are_the_tables_while_one_set_thrashes(cached: Callable[..., Memories]) -> None:
    memories = cached(16 * ENTRY)
    device = DeviceMemory(memories, 6)
    (pool,) = hot_of(memories).pools.values()
    assert pool.sets == 1
    list(steps_of(memories, device, tokens=60))
    counters = of_layer(memories, 3)
    check_counts(counters)
    assert counters.evictions > 0


def test_what_enters_is_what_enters_on_the_hosts_path(cached: Callable[..., Memories]) -> None:
    host, served = cached(64 * ENTRY, prefetch="off"), cached(64 * ENTRY)
    device = DeviceMemory(served, 6)
    pairs = zip(steps_of(host, None), steps_of(served, device), strict=True)
    for _ in pairs:
        host.prefetcher._do_jobs()  # what its next step would begin with
        for ours, theirs in zip(hot_of(served).pools.values(), hot_of(host).pools.values(), strict=True):
            assert np.array_equal(ours._owners, theirs._owners) and np.array_equal(ours._keys, theirs._keys)
            assert np.array_equal(ours._counts, theirs._counts)
    for layer in (1, 3):
        ours, theirs = of_layer(served, layer), of_layer(host, layer)
        assert ours.orders == theirs.orders and ours.rows == theirs.rows


def test_large_steps_are_learned_from_now_and_then_and_counted_always(
    cached: Callable[..., Memories], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.memory.device_rows.LEARNED", 4)  # a step looks 12 n-grams up
    memories = cached()
    device, learned = DeviceMemory(memories, 6), 0
    remember = hot_of(memories).remember

    def counted(*args: Any) -> None:
        nonlocal learned
        learned += len(args[0].slots)
        remember(*args)

    monkeypatch.setattr(hot_of(memories), "remember", counted)
    list(steps_of(memories, device, tokens=60))
    assert learned == 60 * 4
    counters = of_layer(memories, 1)
    check_counts(counters)
    assert counters.rows == 60 * 3 * 8 and counters.device_hits > 0


def test_token_id_rows_are_cached_too(cached: Callable[..., Memories], tmp_path: Path) -> None:
    table = torch.randn(49152, 160, generator=torch.Generator().manual_seed(5))
    memories = cached(64 * 640, pack=save_stem(tmp_path / "s", {2: table}, HIDDEN))
    list(steps_of(memories, DeviceMemory(memories, 6)))
    counters = of_layer(memories, 2)
    check_counts(counters)
    assert counters.rows == 40 * 3 and counters.device_hits > 60


def test_host_and_device_steps_share_a_cache_and_add_up(cached: Callable[..., Memories]) -> None:
    memories = cached(every=4)
    device = DeviceMemory(memories, 6)
    for _ in zip(steps_of(memories, None), steps_of(memories, device), strict=True):
        pass
    counters = of_layer(memories, 1)
    check_counts(counters)
    assert counters.rows == 2 * 40 * 3 * 8


def test_a_step_that_reads_the_cache_puts_admission_off_and_is_not_waited_for(cached: Callable[..., Memories]) -> None:
    memories = cached()
    device, hot = DeviceMemory(memories, 6), hot_of(memories)
    with hot.turn:  # as the prefetcher holds it from finding entries to reading them
        list(steps_of(memories, device, tokens=10))
        assert of_layer(memories, 1).admissions == 0
    list(steps_of(memories, device, tokens=10))
    assert of_layer(memories, 1).admissions > 0


def test_a_hot_list_enters_between_launches(
    cached: Callable[..., Memories], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cached(hot_list="on")
    list(steps_of(first, DeviceMemory(first, 6)))
    hot_of(first).learn()
    saved = sum(len(keys) for source in hot_of(first).sources.values() for keys, _ in hot_of(first).hot_list(source))
    assert saved > 0  # three requests of each step ask for the same few n-grams
    first.close()
    again = cached(every=1 << 30, hot_list="on")
    device, begun = DeviceMemory(again, 6), time.monotonic()
    while not again.warm.loaded.is_set() and time.monotonic() - begun < 20:
        list(steps_of(again, device, tokens=1))
        time.sleep(0.01)
    assert sum(of_layer(again, layer).admissions for layer in (1, 3)) == 4 * saved
    before = of_layer(again, 1).device_hits
    list(steps_of(again, device))
    assert of_layer(again, 1).device_hits > before


@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_where_no_decode_step_runs_on_the_device_the_host_fills_the_cache(
    cached: Callable[..., Memories], prefetch: str
) -> None:
    memories = cached(prefetch=prefetch)
    device, ran = DeviceMemory(memories, 6), list[int]()
    memories.prefetcher.between_fetches(lambda: ran.append(1))
    device.give_up()
    list(steps_of(memories, None))
    counted = of_layer(memories, 1)
    assert ran == [1] and counted.device_hits > 0 and counted.admissions > 0
    check_counts(counted)


def test_the_cache_changes_between_launches_and_in_none(tiny_llama_folder: Path, pack_a: Path, pack_b: Path) -> None:
    """Else the rows that the host brings would wait, as behind any change, for the part of the step that runs."""
    tiers = ("p0=pinned", "p1=mapped")
    memories = memories_of(tiny_llama_folder, [pack_a, pack_b], placement=tiers, device_cache=1 << 18)
    hot = hot_of(memories)
    ids = [np.arange(10) + 7 * i for i in range(3)]
    decoding = Decoding(memories, ids, [view_of(memories, 0, 1)] * 3)
    for pack in memories.packs:
        pack.allocate_conv(decoding.slots, torch.device("cpu"))
    device, changes, changing = DeviceMemory(memories, 6), [], hot.changing

    def counted() -> Any:
        changes.append("change")
        return changing()

    hot.changing = counted  # type: ignore[method-assign]
    for position in range(10):
        positions = np.full(3, position)
        host = decoding.host(positions)
        device.prepare(decoding.views, positions=positions, windows=lambda host=host: (host.windows, host.blocked))
        batch = decoding.device(positions, device.sees(decoding.views))
        step = device.begin(batch)
        for layer in step.layers:
            step.add(layer, torch.zeros(batch.num_tokens, HIDDEN))
        assert len(changes) == position
        device.between(batch)
    assert len(changes) == 10
    memories.begin(host)
    assert len(changes) == 11  # a step that goes the host's way changes it before its fetches
    memories.close()
