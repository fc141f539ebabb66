"""RowTable: fixed-stride rows in safetensors files, read in place. No conversion, no second copy.

    ids[N] ──▶ check files (one stat each) ──▶ check range ──▶ per column: copy N runs of bytes ──▶ raw[N, R]

read="mmap"    the files are mapped; a warm row costs a memory copy. A file cut short *during* a copy ends the process
               (SIGBUS); one cut, replaced or rewritten before it is noticed and refused.
read="pread"   one system call per row and column; slower warm, but survives truncated and failing files.

Shapes: N rows asked for, R bytes a row (values, then scales, then padding: `row_types`). Opening reads headers only
and costs the same for any size. Knows ids, never tokens or layers. Locks nothing; safe from several threads.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from server.cache.layouts import Layout, find_layout, read_header, safetensors_files
from server.cache.row_types import Bytes, RowType
from server.cache.row_types import Ids as Ids
from server.cache.table_files import PAGE, Column, ReadMode, TableFile
from server.errors import TableError

logger = logging.getLogger(__name__)

# A gather slower than this met pages that were not in memory: a fault takes 30 µs and more, a warm row 0.1. The part
# that does not grow with the rows is what a warm gather of a few, asking included, takes on cold processor caches.
DISK_SECONDS, WARM_SECONDS = 5e-6, 3e-4


class Table(Protocol):
    """What the prefetcher needs of a table."""

    name: str
    rows: int
    dim: int
    row_type: RowType
    row_bytes: int
    nbytes: int
    fault: str | None

    def gather(self, ids: Ids, out: Bytes) -> None:
        """Copies rows ids[N] into out uint8[N, R], C-contiguous. Raises TableError; `out` is then not to be used."""

    def page_in(self, ids: Ids) -> int:
        """Asks the OS for the pages these rows stand on, without waiting for them; returns how many distinct pages."""

    def close(self) -> None:
        """Lets go of what it holds; gathers fail from then on."""


class RowTable:
    """A table opened in place. Attributes: name, rows, dim, row_type, row_bytes, nbytes (of all rows), files, fault.

    `fault` names what happened to a file; once set, every gather raises it: the rows are no longer to be trusted.
    Safe to read from several threads.
    """

    def __init__(self, name: str, layout: Layout, read: ReadMode) -> None:
        self.name, self.layout, self.read = name, layout, read
        self.rows, self.dim, self.row_type = layout.rows, layout.dim, layout.row_type
        self.row_bytes = layout.row_bytes
        self.nbytes = self.rows * self.row_bytes
        self.fault: str | None = None
        self._from_disk = False  # whether the last gather waited for the disk, so that the next should ask at once
        opened = {path: TableFile(path, read) for path in layout.paths}
        self.files = tuple(opened.values())
        self._columns = [Column(regions, opened) for regions in layout.columns]

    @classmethod
    def open(
        cls,
        path: Path | str | Sequence[Path | str],
        *,
        tensor: str = "table",
        name: str | None = None,
        read: ReadMode = "mmap",
    ) -> RowTable:
        """Opens the table `tensor` in a file, a folder of *.safetensors, or the files listed.

        Raises TableError if a file is no safetensors file, is not as long as its header says, or holds no such table.
        """
        paths = safetensors_files(path)
        layout = find_layout([read_header(file) for file in paths], tensor)
        return cls(name if name is not None else paths[0].stem, layout, read)

    def step_bytes(self, rows: int) -> int:
        """Bytes of the pages that `rows` rows stand on, at most."""
        return min(sum(column.pages_per_row for column in self._columns) * rows * PAGE, self.nbytes + PAGE)

    def gather(self, ids: Ids, out: Bytes) -> None:
        """Rows ids[N] → out uint8[N, R], C-contiguous. Raises TableError if an id is no row, or a file has changed."""
        self.check()
        if not len(ids):
            return
        check_range(self, ids)
        if out.shape != (len(ids), self.row_bytes):
            raise ValueError(f"out is {out.shape}; {len(ids)} rows of {self.name} need {(len(ids), self.row_bytes)}")
        begun = time.perf_counter()
        if self._from_disk and len(ids) > 1:
            self.page_in(ids)
        try:
            at = 0
            for column in self._columns:
                column.read(ids, out if len(self._columns) == 1 else out[:, at : at + column.width])
                at += column.width
        except TableError as error:
            self._break(error.message)
            raise
        self._from_disk = time.perf_counter() - begun > WARM_SECONDS + DISK_SECONDS * len(ids)

    def read_run(self, first: int, out: Bytes) -> None:
        """The len(out) rows from `first` on → out uint8[n, R], for copies: read in order.

        Raises TableError.
        """
        at = 0
        for column in self._columns:
            column.read_run(first, out[:, at : at + column.width])
            at += column.width

    def forget(self) -> None:
        """Tells the OS that the files' pages are not needed: a copy was made."""
        for file in self.files:
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _break(self, what: str) -> None:
        """From now on every gather fails: the rows are no longer to be trusted."""
        self.fault = what
        logger.error("table %s: %s", self.name, what)

    def check(self) -> None:
        """Raises TableError if a file is not what it was when opened, and from then on always."""
        if self.fault is None:
            for file in self.files:
                change = file.change()
                if change:
                    self._break(f"table file {file.path} {change} while in use; restart the server to read it anew")
                    break
        if self.fault is not None:
            raise TableError(self.fault)

    def page_in(self, ids: Ids) -> int:
        """Asks the OS for the distinct pages of rows ids[N], runs of neighbours at once; returns how many pages.

        The calls only queue reads (and block when the disk's queue is full), each without the interpreter lock.
        Measured on 20,000 cold pages: 9 times demand faults, as fast as process_madvise or as four threads, twice a
        pool of readers. Raises TableError if an id is no row.
        """
        if self.fault is not None or not len(ids):
            return 0
        check_range(self, ids)
        total = 0
        for column in self._columns:
            for file, pages in column.pages(ids):
                watch = file.watch
                if watch is not None:  # under a limit: no more than there is room for
                    pages = pages[: watch.room()]
                    watch.touch(pages, pages)
                total += len(pages)
                starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
                lengths = np.diff(starts, append=len(pages)) * PAGE
                with suppress(OSError):  # advice; the table may be closed meanwhile
                    for offset, length in zip((pages[starts] * PAGE).tolist(), lengths.tolist(), strict=True):
                        os.posix_fadvise(file.fd, offset, length, os.POSIX_FADV_WILLNEED)
        return total

    def close(self) -> None:
        self.fault = self.fault or f"table {self.name} is closed"
        self._columns.clear()
        for file in self.files:
            file.close()


def check_range(table: Table, ids: Ids) -> None:
    """Raises TableError, naming the first, if an id is no row. At least one id."""
    if int(ids.view(np.uint64).max()) >= table.rows:  # a negative one is a very large one there
        wrong = int(ids[(ids < 0) | (ids >= table.rows)][0])
        raise TableError(f"table {table.name} has rows 0..{table.rows - 1}; asked for {wrong}")
