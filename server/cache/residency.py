"""Residency: how much of the mapped tables' files stands in RAM, and a background pass that keeps it under a limit.

    0 bytes ───────────────── low ──── high ──── limit          high = limit − the pages one step may bring
               drop down to here ◀──── above it, the pass begins
                                                 ▲ only here does a reader wait for the pass

One byte per page says whether it was read, and how lately (a clock): pages not read since the hand last came by are
dropped first, hot ones stay. Dropping takes two calls: unmap (MADV_DONTNEED), else the page cache keeps the page, and
forget (POSIX_FADV_DONTNEED). What the bytes say is corrected by mincore, some windows at a time. Without a limit there
is no bookkeeping, and the figure is mincore's alone.

Knows pages of files; nothing of rows.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from server.cache.row_table import RowTable
from server.cache.row_types import Bytes, Ids
from server.cache.table_files import PAGE, TableFile

logger = logging.getLogger(__name__)

ABSENT, COLD, RECENT = 0, 1, 2
WINDOW = 65_536  # pages looked at by one call of mincore: 256 MiB, about 5 ms
LOOK_SECONDS = 5.0
WINDOWS_A_LOOK = 8  # 40 ms of one core every 5 s
ROOM_SECONDS = 2.0  # the longest that a reader waits for pages to be dropped

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of one table's files in RAM, and how they were counted.

    "mincore"; "sampled": mincore, some windows at a time; "touched": pages read and not dropped, corrected by mincore;
    "copied": the table is a copy in memory; "unknown": the OS does not say for a file that is not ours.
    """

    nbytes: int
    counted: str


class FilePages:
    """One file's pages: `state` says how lately each was read; without a limit it is None."""

    def __init__(self, file: TableFile, residency: Residency | None) -> None:
        self.files, self.residency = [file], residency  # several tables may lie in one file
        self.pages = -(-file.seen.st_size // PAGE)
        self.state: Bytes | None = np.zeros(self.pages, np.uint8) if residency is not None else None
        # A mapping of its own: counting touches no page, and tables read by pread have none.
        self._map = mmap.mmap(file.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data
        self._seen = np.full(-(-self.pages // WINDOW), -1, np.int64)  # resident pages per window, as last looked at
        self._next = self.counted = 0
        self.fd = os.dup(file.fd)
        self.countable = os.geteuid() in (0, file.seen.st_uid) or os.access(file.path, os.W_OK)

    def touch(self, first: Ids, last: Ids) -> None:
        """Pages first[i] to last[i] are about to be read. May wait, if the limit leaves no room for them."""
        assert self.state is not None and self.residency is not None
        spans = (
            [first] if first is last else [np.minimum(first + i, last) for i in range(int((last - first).max()) + 1)]
        )
        new = 0
        for pages in spans:
            new += int(np.count_nonzero(self.state[pages] == ABSENT))
            self.state[pages] = RECENT
        if new:
            self.residency.admit(new)

    def room(self) -> int:
        """Pages that may be asked for ahead."""
        assert self.residency is not None
        return self.residency.room()

    def look(self) -> None:
        """Asks the OS about the next windows, and believes it."""
        for _ in range(min(WINDOWS_A_LOOK, len(self._seen))):
            window = self._next
            self._next = (window + 1) % len(self._seen)
            begin, end = window * WINDOW, min((window + 1) * WINDOW, self.pages)
            there = self._mincore(begin, end)
            self._seen[window] = int(np.count_nonzero(there))
            if self.state is not None:
                part = self.state[begin:end]
                part[(there == 0) & (part == COLD)] = ABSENT
                np.maximum(part, there, out=part)  # RECENT stays, what is there unread counts as COLD

    def sweep(self, window: int) -> int:
        """Drops the window's cold pages and turns the recent ones cold; returns how many pages were dropped."""
        assert self.state is not None
        begin, end = window * WINDOW, min((window + 1) * WINDOW, self.pages)
        part = self.state[begin:end]
        cold = np.flatnonzero(part == COLD)
        kept = np.cumsum(part == RECENT)
        part[part == RECENT] = COLD
        if not len(cold):
            return 0
        part[cold] = ABSENT
        for file in self.files:
            file.unmap(begin * PAGE, min(end * PAGE, file.seen.st_size) - begin * PAGE)
        # One call for each run of pages between two that stay.
        group = kept[cold]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        ends = np.append(starts[1:], len(cold)) - 1
        for first, last in zip(cold[starts].tolist(), cold[ends].tolist(), strict=True):
            os.posix_fadvise(self.fd, (begin + first) * PAGE, (last - first + 1) * PAGE, os.POSIX_FADV_DONTNEED)
        return len(cold)

    def count(self) -> int:
        """Pages that stand in RAM, by the bookkeeping of a limit."""
        assert self.state is not None
        self.counted = int(np.count_nonzero(self.state))
        return self.counted

    @property
    def windows(self) -> int:
        return len(self._seen)

    def resident(self) -> Resident:
        if self.state is not None:
            return Resident(self.counted * PAGE, "touched")
        if not self.countable:
            return Resident(0, "unknown")
        looked = self._seen[self._seen >= 0]
        if not len(looked):
            return Resident(0, "unknown")
        whole = len(looked) == len(self._seen)
        mean = float(looked.mean())
        pages = int(looked.sum()) if whole else int(mean * len(self._seen))
        return Resident(pages * PAGE, "mincore" if len(self._seen) <= WINDOWS_A_LOOK else "sampled")

    def close(self) -> None:
        for file in self.files:
            file.watch = None
        self.files, self.residency = [], None  # let go of the tables' mappings
        self._map.close()
        os.close(self.fd)

    def _mincore(self, begin: int, end: int) -> Bytes:
        there = np.empty(end - begin, np.uint8)
        address = ctypes.c_void_p(self._address + begin * PAGE)
        if libc.mincore(address, ctypes.c_size_t((end - begin) * PAGE), ctypes.c_void_p(there.ctypes.data)):
            there[:] = ABSENT
        there &= 1
        return there


class Residency:
    """Watches mapped tables. `limit`: most resident bytes of them together, 0 for none; `step_bytes`: what one step
    may bring at most. `close` ends its thread."""

    def __init__(self, tables: Iterable[RowTable], limit: int, step_bytes: int) -> None:
        self.limit, self.high = limit, max(limit - step_bytes, limit // 2)
        self.low = self.high * 7 // 8
        self.dropped_pages = self.waits = 0
        self._files: dict[tuple[int, int], FilePages] = {}
        self._of: dict[str, list[FilePages]] = {}
        for table in tables:
            self._watch(table)
        self._pages = 0  # resident, as counted last, and those admitted since
        self._lock = threading.Lock()
        self._wake, self._room = threading.Event(), threading.Event()
        self._hand = 0
        self._warned = self._closed = False
        self._thread = threading.Thread(target=self._work, name="residency", daemon=True)
        self._thread.start()

    def admit(self, new: int) -> None:
        """`new` pages are about to be read. Wakes the pass above the high mark; waits for it above the limit."""
        with self._lock:
            self._pages += new
            pages = self._pages
        if pages * PAGE > self.high:
            self._room.clear()
            self._wake.set()
            if pages * PAGE > self.limit:
                self.waits += 1
                self._room.wait(ROOM_SECONDS)

    def room(self) -> int:
        """Pages that may be asked for ahead: a part of the limit, so that the steps keep the rest."""
        return self.high // 4 // PAGE

    def figures(self) -> dict[str, Resident]:
        """Per table, what stands in RAM."""
        found = {}
        for name, files in self._of.items():
            parts = [file.resident() for file in files]
            counted = parts[0].counted if len({part.counted for part in parts}) == 1 else "sampled"
            found[name] = Resident(sum(part.nbytes for part in parts), counted)
        return found

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._room.set()
        self._thread.join()
        for file in self._files.values():
            file.close()

    def _watch(self, table: RowTable) -> None:
        self._of[table.name] = []
        for file in table.files:
            key = file.seen.st_dev, file.seen.st_ino
            if key in self._files:
                self._files[key].files.append(file)
            else:
                self._files[key] = FilePages(file, self if self.limit else None)
            if self.limit:
                table.forget()  # what stands in RAM from before was not counted
                file.watch = self._files[key]
            self._of[table.name].append(self._files[key])

    def _work(self) -> None:
        looked = 0.0
        while not self._closed:
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                for file in self._files.values():
                    if file.countable:
                        file.look()
            if self.limit:
                self._hold()
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()

    def _hold(self) -> None:
        """Counts; above the high mark, drops cold pages down to the low one."""
        pages = self._count()
        if pages * PAGE > self.high:
            order = [(file, window) for file in self._files.values() for window in range(file.windows)]
            # Twice round at most: what was recent when the hand first came by is cold the second time.
            for _ in range(2 * len(order) + 1):
                if pages * PAGE <= self.low or self._closed:
                    break
                file, window = order[self._hand % len(order)]
                self._hand += 1
                dropped = file.sweep(window)
                pages -= dropped
                self.dropped_pages += dropped
                with self._lock:
                    self._pages -= dropped
                if self._pages * PAGE <= self.limit:
                    self._room.set()
        if self._pages * PAGE > self.limit and not self._warned and not self._closed:
            self._warned = True
            logger.warning(
                "%d bytes of mapped tables stay resident above --host-memory-limit %d: another process maps them",
                self._pages * PAGE,
                self.limit,
            )
        self._room.set()

    def _count(self) -> int:
        pages = sum(file.count() for file in self._files.values())
        with self._lock:
            self._pages = pages
        return pages
