"""Residency: how much of the mapped tables' files stands in RAM, and a background pass that keeps it under a limit.

    0 bytes ───────────────── low ──── high ──── limit          high = limit − the pages one step may bring
               drop down to here ◀──── above it, the pass begins
                                                 ▲ only here does a reader wait for the pass

One byte per page says whether it was read, and how lately (a clock): pages not read since the hand last came by are
dropped first, hot ones stay (`file_pages`). Tables may come and go. Without a limit nothing is kept, only counted.
Knows pages of files; nothing of rows.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Iterable
from queue import SimpleQueue

from server.cache.file_pages import FilePages, Resident
from server.cache.row_table import RowTable
from server.cache.table_files import PAGE, TableFile

__all__ = ["Residency", "Resident"]

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
OVER = "more of the mapped tables stays in RAM than the {} bytes of --host-memory-limit: another process maps them"
ROOM_SECONDS = 2.0  # the longest that a reader waits for pages to be dropped


class Residency:
    """Watches mapped tables. `limit`: most resident bytes of them together, 0 for none; `step_bytes`: what one step
    may bring at most. `add`, `remove` and `figures` belong to one thread. `close` ends its own."""

    def __init__(self, tables: Iterable[RowTable], limit: int, step_bytes: int) -> None:
        self.limit, self.step_bytes = limit, 0
        self.dropped_pages = self.waits = 0
        # Replaced whole by whoever adds or removes, since the thread goes through them meanwhile.
        self._files: dict[tuple[int, int], FilePages] = {}
        self._of: dict[RowTable, list[FilePages]] = {}  # by table: one that comes may have the name of one that leaves
        # To be closed by the thread, which may look at them now; with the mapping, which the table itself lets go of.
        self._gone: SimpleQueue[tuple[FilePages, mmap.mmap | None]] = SimpleQueue()
        self._set_marks(step_bytes)
        for table in tables:
            self._watch(table)
        self._pages = 0  # resident, as counted last, and those admitted since
        self._lock = threading.Lock()
        self._wake, self._room = threading.Event(), threading.Event()
        self._hand = 0
        self._warned = self._closed = False
        self.note: str | None = None  # why the limit is not held
        self._thread = threading.Thread(target=self._work, name="residency", daemon=True)
        self._thread.start()

    def add(self, tables: Iterable[RowTable], step_bytes: int) -> None:
        """Watches these tables too, from their first page on."""
        self._set_marks(self.step_bytes + step_bytes)
        for table in tables:
            self._watch(table)

    def remove(self, tables: Iterable[RowTable], step_bytes: int) -> None:
        """Watches these tables no more, and has their pages dropped under a limit, unless another table's lie in the
        same file. Before the tables are closed."""
        for table in tables:
            self._of.pop(table, None)
            for file in table.files:
                file.watch = None
                pages = self._files.get(_key(file))
                if pages is None or file not in pages.files:
                    continue
                if len(pages.files) > 1:
                    pages.files = [other for other in pages.files if other is not file]
                else:
                    self._files = {key: other for key, other in self._files.items() if other is not pages}
                    self._gone.put((pages, file.map))
        self._set_marks(self.step_bytes - step_bytes)
        self._wake.set()

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
        for table, files in self._of.items():
            parts = [file.resident() for file in files]
            counted = parts[0].counted if len({part.counted for part in parts}) == 1 else "sampled"
            found[table.name] = Resident(sum(part.nbytes for part in parts), counted)
        return found

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._room.set()
        self._thread.join()
        self._let_go()
        for file in self._files.values():
            file.close()

    def _set_marks(self, step_bytes: int) -> None:
        self.step_bytes = step_bytes
        self.high = max(self.limit - step_bytes, self.limit // 2)
        self.low = self.high * 7 // 8

    def _watch(self, table: RowTable) -> None:
        self._of[table] = []
        for file in table.files:
            pages = self._files.get(_key(file))
            if pages is None:
                pages = FilePages(file, self if self.limit else None)
                self._files = {**self._files, _key(file): pages}
                if self.limit:
                    pages.forget()  # what stands in RAM from before was not counted
            else:
                pages.files = [*pages.files, file]
            if self.limit:
                file.watch = pages
            self._of[table].append(pages)

    def _let_go(self) -> None:
        """Closes what is watched no more."""
        while not self._gone.empty():
            pages, mapped = self._gone.get()
            if self.limit:
                if mapped is not None:
                    mapped.madvise(mmap.MADV_DONTNEED)
                pages.forget()
            pages.close()
            del pages, mapped

    def _work(self) -> None:
        looked = 0.0
        while not self._closed:
            self._let_go()
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
        over = self._pages * PAGE > self.limit
        self.note = OVER.format(self.limit) if over else None
        if over and not self._warned and not self._closed:
            self._warned = True
            logger.warning("%d bytes: %s", self._pages * PAGE, self.note)
        self._room.set()

    def _count(self) -> int:
        """Pages of all files, by their bookkeeping."""
        pages = sum(file.count() for file in self._files.values())
        with self._lock:
            self._pages = pages
        return pages


def _key(file: TableFile) -> tuple[int, int]:
    """Which file it is, whatever its name."""
    return file.seen.st_dev, file.seen.st_ino
