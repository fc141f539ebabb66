"""The pages of one file: which of them stand in RAM, how lately each was read, and dropping those that are cold.

    state[page]   ABSENT ─ read ─▶ RECENT ─ the hand comes by ─▶ COLD ─ it comes again ─▶ dropped: ABSENT

Dropping takes two calls: unmap (MADV_DONTNEED), else the page cache keeps the page, and forget (POSIX_FADV_DONTNEED).
What `state` says is corrected by mincore, some windows at a time. Without a limit there is no state, and the figure is
mincore's alone. Knows one file; nothing of limits or rows.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from server.cache.row_types import Bytes, Ids
from server.cache.table_files import PAGE, TableFile

ABSENT, COLD, RECENT = 0, 1, 2
WINDOW = 65_536  # pages looked at by one call of mincore: 256 MiB, about 5 ms
WINDOWS_A_LOOK = 8  # 40 ms of one core every 5 s

libc = ctypes.CDLL(None, use_errno=True)


class Limit(Protocol):
    """Who bounds the resident pages of all files together."""

    def admit(self, new: int) -> None:
        """`new` pages are about to be read. May wait for room."""

    def room(self) -> int:
        """How many pages may be asked for ahead."""


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

    def __init__(self, file: TableFile, limit: Limit | None) -> None:
        self.files, self.limit = [file], limit  # several tables may lie in one file
        self.pages = -(-file.seen.st_size // PAGE)
        self.state: Bytes | None = np.zeros(self.pages, np.uint8) if limit is not None else None
        # A mapping of its own: counting touches no page, and tables read by pread have none.
        self._map = mmap.mmap(file.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data
        self._seen = np.full(-(-self.pages // WINDOW), -1, np.int64)  # resident pages per window, as last looked at
        self._next = self.counted = 0
        self.fd = os.dup(file.fd)
        self.countable = os.geteuid() in (0, file.seen.st_uid) or os.access(file.path, os.W_OK)

    def touch(self, first: Ids, last: Ids) -> None:
        """Pages first[i] to last[i] are about to be read. May wait, if the limit leaves no room for them."""
        limit = self.limit
        if self.state is None or limit is None:  # let go of while somebody still read ahead
            return
        spans = (
            [first] if first is last else [np.minimum(first + i, last) for i in range(int((last - first).max()) + 1)]
        )
        new = 0
        for pages in spans:
            new += int(np.count_nonzero(self.state[pages] == ABSENT))
            self.state[pages] = RECENT
        if new:
            limit.admit(new)
            for pages in spans:  # what a pass dropped while this waited for it is about to be read all the same
                self.state[pages] = RECENT

    def room(self) -> int:
        """Pages that may be asked for ahead."""
        limit = self.limit
        return 0 if limit is None else limit.room()

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

    def forget(self) -> None:
        """Has the OS drop all of the file's pages."""
        for file in self.files:
            file.unmap(0, file.seen.st_size)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for file in self.files:
            file.watch = None
        self.files, self.limit = [], None  # let go of the tables' mappings
        self._map.close()
        os.close(self.fd)

    def _mincore(self, begin: int, end: int) -> Bytes:
        there = np.empty(end - begin, np.uint8)
        address = ctypes.c_void_p(self._address + begin * PAGE)
        if libc.mincore(address, ctypes.c_size_t((end - begin) * PAGE), ctypes.c_void_p(there.ctypes.data)):
            there[:] = ABSENT
        there &= 1
        return there
