"""Dropping a file from the page cache and proving it, for experiments that must begin cold."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from server.cache.row_table import RowTable
from server.cache.table_files import PAGE
from server.errors import CapacityError

libc = ctypes.CDLL(None, use_errno=True)
TRIES = 20
WARM_PAGES = 64  # a file's header and what was read around it


def resident_pages(path: Path) -> int:
    """Pages of the file in the page cache, as mincore says. Raises OSError."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        there = np.empty(-(-size // PAGE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        del view
        if libc.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(there.ctypes.data)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(np.count_nonzero(there & 1))


def drop(tables: Iterable[RowTable]) -> int:
    """Drops the tables' files; returns how many of their pages are left. Raises CapacityError if they stay."""
    left = 0
    for table in tables:
        stay = 0
        # Pages just read wait in the kernel's batches for a moment, where none is dropped, and a fetch that nobody
        # waits for may still map some.
        for _ in range(TRIES):
            for file in table.files:
                file.unmap(0, file.seen.st_size)
            table.forget()
            stay = sum(resident_pages(file.path) for file in table.files)
            if stay <= WARM_PAGES * len(table.files):
                break
            time.sleep(0.1)
        else:
            raise CapacityError(f"{stay} pages of {table.files[0].path} stay in memory: does another process map it?")
        left += stay
    return left
