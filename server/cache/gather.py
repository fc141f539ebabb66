"""Rows out of a mapped array: one thread for what a step usually reads, several for very many rows.

np.take copies whole rows and lets go of the interpreter lock, so that slices of one request run side by side. Handing
slices to a pool costs 20 µs on an idle machine and a scheduler's quantum on a busy one: below SPLIT_ROWS one thread was
never slower (docs/experiments.md).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from server.cache.row_types import Bytes, Ids

SPLIT_ROWS = 65_536
THREADS = min(4, len(os.sched_getaffinity(0)))


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="gather")


def take_rows(view: Bytes, ids: Ids, out: Bytes) -> None:
    """view[ids[N]] → out[N, width], C-contiguous. Ids outside the view are clipped: check them first."""
    if len(ids) < SPLIT_ROWS or THREADS == 1:
        np.take(view, ids, axis=0, out=out, mode="clip")
        return
    step = -(-len(ids) // THREADS)
    parts = [slice(at, at + step) for at in range(0, len(ids), step)]
    ends = [pool().submit(np.take, view, ids[part], 0, out[part], "clip") for part in parts[1:]]
    np.take(view, ids[parts[0]], axis=0, out=out[parts[0]], mode="clip")
    for end in ends:
        end.result()
