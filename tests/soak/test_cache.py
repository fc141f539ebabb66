"""Up to 200,000 steps through a device cache that learns after every one: nothing grows, no row is ever wrong."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import torch

from server.cache.prefetcher import Prefetcher
from tests.cache.counted import CPU, MemoryTable, by_token, cache_for, hashed

PASSES = 200_000
MIB = 1 << 20


def held() -> tuple[int, int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_many_passes_leave_no_memory_handle_or_thread_behind(soak_seconds: float) -> None:
    generator = np.random.default_rng(0)
    engram, stem = MemoryTable("a", rows=5000, kind="int8"), MemoryTable("b", rows=3000, kind="bfloat16", seed=1)
    hot = cache_for(
        hashed(engram, 1, np.zeros((1, 2), np.int64)), by_token(stem, 2, np.zeros(1, np.int64)), entries=200
    )
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=hot)

    def steps(count: int) -> int:
        ends, done = time.monotonic() + soak_seconds, 0
        while done < count and time.monotonic() < ends:
            keys = generator.zipf(1.2, (6, 2)) % 4000
            lookups = [hashed(engram, 1, keys, askers=keys[:, 0]), by_token(stem, 2, keys[:, 0] % 3000)]
            for fetch, lookup in zip(prefetcher.begin(lookups), lookups, strict=True):
                rows = fetch.wait()
                if done % 50 == 0:
                    table = engram if lookup.layer == 1 else stem
                    assert torch.equal(rows, table.values(lookup.row_ids))
            done += 1
            if done % 1000 == 0:
                hot.hot_list(hot.sources["a", 1])
                hot.reload(stem if done % 2000 else engram)
        return done

    steps(5000)
    gc.collect()
    before, objects, bytes_before = held(), len(gc.get_objects()), resident()
    done = steps(PASSES)
    gc.collect()
    least = PASSES if soak_seconds >= 900 else 10_000  # 900: make soak's own; a shorter slice does what it can
    assert done >= least, f"only {done} passes in {soak_seconds:.0f} s"
    assert held() == before
    assert len(gc.get_objects()) - objects < 1000  # one lost object per pass would be ten times that
    assert resident() - bytes_before < 8 * MIB
    prefetcher.close()
