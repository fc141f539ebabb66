"""What a file's disk can do: random 4 KiB reads past the page cache, threads and queue depth swept.

threads T, depth 1   T threads, one pread each at a time
threads 1, depth D   one thread, D reads under way, by the kernel's asynchronous interface
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
READS = 8192
THREADS = (1, 2, 4, 8, 16, 32)
DEPTHS = (4, 16, 32, 64, 128, 256)
# io_setup, io_destroy, io_submit, io_getevents
SYSCALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
IOCB = np.dtype(
    [("data", "<u8"), ("key", "<u4"), ("flags", "<u4"), ("opcode", "<u2"), ("priority", "<i2"), ("fd", "<u4"),
     ("buffer", "<u8"), ("nbytes", "<u8"), ("offset", "<i8"), ("reserved", "<u8"), ("more_flags", "<u4"),
     ("event_fd", "<u4")]
)  # fmt: skip
EVENT_BYTES = 32

libc = ctypes.CDLL(None, use_errno=True)


def sweep(path: Path, seed: int = 0) -> list[dict[str, Any]]:
    """[{threads, depth, per_s}] of every setting, in an order drawn at random; all read other pages."""
    generator = np.random.default_rng(seed)
    settings = [(threads, 1) for threads in THREADS]
    if platform.machine() in SYSCALLS:
        settings += [(1, depth) for depth in DEPTHS]
    found = []
    for at in generator.permutation(len(settings)).tolist():
        threads, depth = settings[at]
        found.append({"threads": threads, "depth": depth, "per_s": rate(path, threads, depth, generator)})
    return sorted(found, key=lambda point: (point["depth"], point["threads"]))


def rate(path: Path, threads: int, depth: int, generator: np.random.Generator) -> float:
    """Random 4 KiB reads per second."""
    pages = path.stat().st_size // PAGE
    offsets = generator.choice(pages, min(READS, pages // 4), replace=False) * PAGE
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        begun = time.perf_counter()
        if depth > 1:
            _read_deep(fd, offsets, depth)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda part: _read(fd, part), np.array_split(offsets, threads)))
        return len(offsets) / (time.perf_counter() - begun)
    finally:
        os.close(fd)


def _read(fd: int, offsets: np.ndarray) -> None:
    with mmap.mmap(-1, PAGE) as page:  # aligned, as direct reads need it
        for offset in offsets.tolist():
            os.preadv(fd, [page], offset)


def _read_deep(fd: int, offsets: np.ndarray, depth: int) -> None:
    setup, destroy, submit, events = SYSCALLS[platform.machine()]
    context = ctypes.c_ulong(0)
    _call(setup, ctypes.c_uint(depth), ctypes.byref(context))
    buffer = mmap.mmap(-1, PAGE * depth)
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    blocks = np.zeros(len(offsets), IOCB)
    blocks["fd"], blocks["nbytes"], blocks["offset"] = fd, PAGE, offsets
    blocks["buffer"] = address + np.arange(len(offsets)) % depth * PAGE  # what is read is not looked at
    pointers = blocks.ctypes.data + np.arange(len(offsets), dtype=np.uint64) * IOCB.itemsize
    done = ctypes.create_string_buffer(EVENT_BYTES * depth)
    sent = over = 0
    while over < len(offsets):
        room = min(depth - (sent - over), len(offsets) - sent)
        if room:
            first = ctypes.c_void_p(pointers.ctypes.data + sent * pointers.itemsize)
            sent += _call(submit, context, ctypes.c_long(room), first)
        least = max(1, min(depth // 4, sent - over))
        over += _call(events, context, ctypes.c_long(least), ctypes.c_long(depth), done, None)
    _call(destroy, context)


def _call(number: int, *arguments: Any) -> int:
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
