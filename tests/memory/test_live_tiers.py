"""Packs that come while serving, under a memory limit or before a device cache: counted, held, cached, and gone."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from server.bench.page_cache import resident_pages
from server.cache.table_files import PAGE
from server.errors import CapacityError
from server.memory.memories import Memories
from server.runtime.messages import SamplingParams, Submit
from tests.engines import engine_on, logits_of, outputs_of
from tests.memory.test_live_packs import Live

MIB = 1 << 20
LARGE = {"rows": 8000, "dim": 64, "heads": 2}  # 2 layers of 4 heads' tables: 32,000 rows of 256 bytes, 2,000 pages each
FEW = {"max_num_batched_tokens": 16, "prefix_cache": "off"}
ONE = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def large(make_pack: Callable[..., Path]) -> Path:
    return make_pack("large", 3, **LARGE)


@pytest.fixture(scope="module")
def other(make_pack: Callable[..., Path]) -> Path:
    return make_pack("other", 4, **LARGE)


def memories_of(live: Live) -> Memories:
    memories = live.engine.runner.memories
    assert memories is not None
    return memories


def files_of(pack: Path) -> list[Path]:
    return sorted(pack.glob("table-*.safetensors"))


def drop(pack: Path) -> None:
    def dropped(path: Path) -> bool:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return resident_pages(path) < 100

    gc.collect()  # mappings of earlier tests
    for path in files_of(pack):
        if not eventually(lambda path=path: dropped(path), 5):  # type: ignore[misc]
            pytest.skip("this file system keeps pages whatever is advised")


def eventually(holds: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def random_prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    return [tuple(ids.tolist()) for ids in np.random.default_rng(seed).integers(0, 49_000, (count, 200))]


@pytest.mark.parametrize("start", ["bare", "with a pack"])
def test_a_limit_holds_with_packs_attached_under_load(
    start: str, tiny_llama_folder: Path, large: Path, other: Path
) -> None:
    """Every prompt reads pages nobody read before, of both packs; the files are four times the limit."""
    limit, packs = 4 * MIB, {"large": large, "other": other}
    for pack in packs.values():
        drop(pack)
    at_start = () if start == "bare" else (f"large={large}",)
    live = Live(tiny_llama_folder, *at_start, host_memory_limit=limit, **FEW)
    for number, prompt in enumerate(random_prompts(2, 1)):
        live.engine.submit(Submit(f"load-{number}", prompt, ONE, tuple(live.engine.packs)))
    for name in [name for name in packs if name not in live.engine.packs]:
        live.update(name, packs[name], live.engine.step)
    residency = memories_of(live).residency
    assert residency is not None and set(residency.figures()) == {"large/1", "large/3", "other/1", "other/3"}
    paths, most = [path for pack in packs.values() for path in files_of(pack)], 0
    for number, prompt in enumerate(random_prompts(12, 2)):
        live.engine.submit(Submit(f"{number}", prompt, ONE, ("large", "other")))
        while not live.engine.idle:
            live.engine.step()
            most = max(most, sum(resident_pages(path) for path in paths) * PAGE)
    # Headers, and folios that the kernel drops a little later.
    assert limit // 2 < most <= limit + 32 * len(paths) * PAGE
    assert residency.dropped_pages > 1000
    memories_of(live).close()


def test_under_a_limit_a_live_pack_gives_the_same_bits(
    tiny_llama_folder: Path, large: Path, prompt: tuple[int, ...]
) -> None:
    live = Live(tiny_llama_folder, host_memory_limit=2 * MIB, **FEW)
    live.update("large", large)
    at_start = engine_on(str(tiny_llama_folder), memory=(f"large={large}",), **FEW)
    for _ in range(2):
        assert torch.equal(logits_of(live.engine, prompt, ("large",)), logits_of(at_start, prompt, ("large",)))
    memories_of(live).close()


def test_a_pack_that_the_limit_cannot_hold_is_refused_with_the_value_that_would_do(
    tiny_llama_folder: Path, large: Path, other: Path, prompt: tuple[int, ...]
) -> None:
    at_start = {"memory": (f"large={large}",), "host_memory_limit": 1, **FEW}
    with pytest.raises(CapacityError) as least:
        engine_on(str(tiny_llama_folder), **at_start)
    enough = int(least.value.message.rpartition("set it to ")[2].split(",")[0])
    live = Live(tiny_llama_folder, f"large={large}", host_memory_limit=enough, **FEW)
    before = logits_of(live.engine, prompt, ("large",))
    with pytest.raises(CapacityError, match=rf"--host-memory-limit is {enough} bytes; .* set it to {2 * enough}"):
        live.update("other", other)
    assert tuple(live.engine.packs) == ("large",) and not live.changes.busy
    residency = memories_of(live).residency
    assert residency is not None and set(residency.figures()) == {"large/1", "large/3"}
    assert torch.equal(logits_of(live.engine, prompt, ("large",)), before)
    live.update("large")
    live.changes.settle()
    live.update("other", other)  # there is room again
    memories_of(live).close()
    Live(tiny_llama_folder, f"large={large}", host_memory_limit=2 * enough, **FEW).update("other", other)


@pytest.mark.parametrize("prefetch", ["on", "off"])
@pytest.mark.parametrize("attached", ["at start", "live"])
def test_a_removed_pack_leaves_no_entries_no_count_and_no_handles(
    attached: str,
    prefetch: str,
    tiny_llama_folder: Path,
    pack_a: Path,
    make_pack: Callable[..., Path],
    prompt: tuple[int, ...],
) -> None:
    large = make_pack("large", 3, **LARGE)  # a file that no other test maps
    drop(large)
    flags = {"host_memory_limit": 16 * MIB, "device_cache": MIB, "hot_list": "off", "prefetch": prefetch, **FEW}
    names = [f"a={pack_a}", f"large={large}"]
    live = Live(tiny_llama_folder, *names[: 2 if attached == "at start" else 1], **flags)
    if attached == "live":
        live.update("large", large)
    memories = memories_of(live)
    hot, residency = memories.prefetcher.hot, memories.residency
    assert hot is not None and residency is not None
    for number in range(3):
        outputs_of(live.engine, [Submit(f"r{number}", prompt, ONE, ("a", "large"))])
    assert "large/1" in residency.figures()
    assert sum(resident_pages(path) for path in files_of(large)) > 100
    live.update("large")
    live.changes.settle()
    assert set(residency.figures()) == {"a/1", "a/3"} and len(residency._files) == 2
    outputs_of(live.engine, [Submit("after", prompt, ONE, ("a",))])
    assert eventually(lambda: {table for table, _ in hot.sources} == {"a/1", "a/3"})
    hot.learn()
    assert {table for table, _ in hot._lines} == {"a/1", "a/3"} and hot._held.sum() == sum(
        pool.used for pool in hot.pools.values()
    )

    def handles() -> list[str]:
        gc.collect()
        opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_is_there(fd)]
        maps = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in (*opened, *maps) if str(large) in line]

    assert eventually(lambda: not handles()), handles()
    assert eventually(lambda: sum(resident_pages(path) for path in files_of(large)) < 100)
    memories.close()


def fd_is_there(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_live_packs_rows_enter_the_device_cache_and_are_the_same_bits(
    tiny_llama_folder: Path, pack_a: Path, make_pack: Callable[..., Path], prompt: tuple[int, ...]
) -> None:
    twin = make_pack("twin", 7)  # entries as large as those of pack_a
    plain = engine_on(str(tiny_llama_folder), memory=(f"twin={twin}",), **FEW)
    expected = logits_of(plain, prompt, ("twin",))
    live = Live(tiny_llama_folder, f"a={pack_a}", device_cache=4 * MIB, hot_list="off", **FEW)
    for turn in range(3):  # attached, removed and attached again: what an earlier one cached answers for nobody
        live.update("twin", twin)
        hot = memories_of(live).prefetcher.hot
        assert hot is not None
        before = hits(live)
        for number in range(3):
            assert torch.equal(logits_of(live.engine, prompt, ("twin",)), expected)
            memories_of(live).prefetcher.between_fetches(hot.learn)
            if not number:
                assert hits(live) == before, f"turn {turn}"
        assert hits(live) >= before + 16 * len(prompt)
        live.update("twin")
        live.changes.settle()
    memories_of(live).close()


def hits(live: Live) -> int:
    return sum(counters.device_hits for counters in live.engine.stats().memory if counters.table.startswith("twin"))


def test_a_live_pack_without_a_pool_of_its_size_is_read_without_the_cache_and_the_log_says_so(
    tiny_llama_folder: Path,
    pack_a: Path,
    pack_b: Path,
    prompt: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    live = Live(tiny_llama_folder, f"a={pack_a}", device_cache=MIB, hot_list="off", **FEW)
    live.update("b", pack_b)
    at_start = engine_on(str(tiny_llama_folder), memory=(f"b={pack_b}",), **FEW)
    assert torch.equal(logits_of(live.engine, prompt, ("b",)), logits_of(at_start, prompt, ("b",)))
    assert "table b/1 is read without the device cache: --device-cache has no pool for entries of 192 bytes" in (
        caplog.text
    )
    assert [note.split()[1] for note in live.engine.stats().notes] == ["b/1", "b/3"]
    live.update("b")
    live.changes.settle()
    assert live.engine.stats().notes == ()
    memories_of(live).close()
