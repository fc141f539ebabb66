"""Table files: open, watched for change, and read in columns: one run of bytes per row, by mapping or system call.

read="mmap"    a warm row costs a memory copy; a page that is not in memory is faulted in
read="pread"   one system call per row

Rows are read here and there, so that read-ahead is switched off for both. Why np.take: it copies whole rows without the
interpreter lock, and mode="clip" keeps it from buffering `out`; ids are therefore checked before (`row_table`).

Shapes: N rows asked for, a column of `width` bytes each. Knows offsets, nothing of values.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from server.cache.gather import take_rows
from server.cache.layouts import Region
from server.cache.row_types import Bytes, Ids
from server.errors import TableError

ReadMode = Literal["mmap", "pread"]
PAGE = mmap.PAGESIZE
READ_BYTES = 8 << 20  # of one sequential read


class PageWatch(Protocol):
    """Who keeps the resident pages of a file under a limit (`residency`)."""

    def touch(self, first: Ids, last: Ids) -> None:
        """Pages first[i] to last[i] are about to be read. May wait for room."""

    def room(self) -> int:
        """How many pages may be asked for ahead."""


class TableFile:
    """One open file and what it looked like when opened. Closed at the latest when nobody holds it any more."""

    fd = -1

    def __init__(self, path: Path, read: ReadMode) -> None:
        self.path = Path(os.path.realpath(path))
        self._name = str(self.path)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.seen = os.fstat(self.fd)
        self.map = None if read == "pread" else mmap.mmap(self.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self.watch: PageWatch | None = None
        # Rows are read here and there: what the OS would read around them is waste.
        if self.map is not None:
            self.map.madvise(mmap.MADV_RANDOM)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def unmap(self, offset: int, nbytes: int) -> None:
        """Takes the pages out of the mapping, that the OS may forget them; a later read finds them again."""
        mapped = self.map
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED, offset, nbytes)

    def change(self) -> str | None:
        """What is no longer as it was when opened; None if nothing. One system call."""
        try:
            now = os.stat(self._name)
        except OSError as error:
            return f"cannot be found any more: {error.strerror}"
        seen = self.seen
        if (now.st_ino, now.st_dev) != (seen.st_ino, seen.st_dev):
            return "was replaced by another file"
        if now.st_size != seen.st_size:
            return f"changed size from {seen.st_size} to {now.st_size} bytes"
        if now.st_mtime_ns != seen.st_mtime_ns:
            return "was written to"
        return None

    def close(self) -> None:
        """The mapping goes when the last view of it does."""
        self.map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class Column:
    """One run of `width` bytes per row, spread over regions that hold the rows in order."""

    def __init__(self, regions: Sequence[Region], files: dict[Path, TableFile]) -> None:
        self.width = regions[0].stride
        self.files = [files[region.path] for region in regions]
        self.offsets = [region.offset for region in regions]
        self.first_rows = np.cumsum([0] + [region.rows for region in regions])
        self.views = [_view(file, region) for file, region in zip(self.files, regions, strict=True)]
        # The most pages that one row touches: rows that divide a page and begin with it never cross into the next.
        aligned = PAGE % self.width == 0 and all(offset % self.width == 0 for offset in self.offsets)
        self.pages_per_row = 1 if aligned else 2 + (self.width - 2) // PAGE

    def split(self, ids: Ids) -> list[tuple[int, Ids | slice, Ids]]:
        """(region, where in `ids`, ids within the region) for each region that holds some of them."""
        if len(self.files) == 1:
            return [(0, slice(None), ids)]
        region_of = np.searchsorted(self.first_rows, ids, side="right") - 1
        parts: list[tuple[int, Ids | slice, Ids]] = []
        for region in np.unique(region_of).tolist():
            where = np.flatnonzero(region_of == region)
            parts.append((region, where, ids[where] - self.first_rows[region]))
        return parts

    def read(self, ids: Ids, out: Bytes) -> None:
        """Rows ids[N] → out[N, width], of any row stride."""
        for region, where, local in self.split(ids):
            view, watch = self.views[region], self.files[region].watch
            if watch is not None:
                watch.touch(*self._page_range(region, local))
            if view is None:
                self._pread(region, where, local, out)
            elif isinstance(where, slice) and out.flags.c_contiguous:
                take_rows(view, local, out)
            else:
                out[where] = np.take(view, local, axis=0, mode="clip")

    def _pread(self, region: int, where: Ids | slice, local: Ids, out: Bytes) -> None:
        file, offsets = self.files[region], self.offsets[region] + local * self.width
        rows = range(len(local)) if isinstance(where, slice) else where.tolist()
        for row, offset in zip(rows, offsets.tolist(), strict=True):
            try:
                got = os.preadv(file.fd, [out[row].data], offset)
            except OSError as error:
                raise TableError(f"{file.path} cannot be read at byte {offset}: {error.strerror}") from None
            if got != self.width:
                raise TableError(f"{file.path} ends within a row: {got} of {self.width} bytes at byte {offset}")

    def read_run(self, first: int, out: Bytes) -> None:
        """The len(out) rows from `first` on → out[n, width], of any row stride: long reads, never the map."""
        done = 0
        for region, (file, offset) in enumerate(zip(self.files, self.offsets, strict=True)):
            begin, end = int(self.first_rows[region]), int(self.first_rows[region + 1])
            low, high = max(first, begin), min(first + len(out), end)
            if low >= high:
                continue
            part = out[done : done + high - low]
            done += high - low
            run = part if part.flags.c_contiguous else np.empty(part.shape, np.uint8)
            _read_whole(file, offset + (low - begin) * self.width, run)
            if run is not part:
                part[:] = run

    def _page_range(self, region: int, local: Ids) -> tuple[Ids, Ids]:
        """The first and the last page of each row; one and the same array where no row crosses into another page."""
        start = self.offsets[region] + local * self.width
        first = start // PAGE
        return first, first if self.pages_per_row == 1 else (start + self.width - 1) // PAGE

    def pages(self, ids: Ids) -> list[tuple[TableFile, Ids]]:
        """The distinct page numbers rows ids[N] stand on, ascending, per file region."""
        found = []
        for region, _, local in self.split(ids):
            first, last = self._page_range(region, local)
            spans = [first + i for i in range(int((last - first).max(initial=0)) + 1)]
            pages = np.sort(np.concatenate([np.minimum(span, last) for span in spans]))
            found.append((self.files[region], pages[np.flatnonzero(np.diff(pages, prepend=-1))]))
        return found


def _read_whole(file: TableFile, offset: int, out: Bytes) -> None:
    """Bytes from `offset` on → out, contiguous. Raises TableError."""
    left = out.reshape(-1).data
    while left:
        try:
            got = os.preadv(file.fd, [left[:READ_BYTES]], offset)
        except OSError as error:
            raise TableError(f"{file.path} cannot be read at byte {offset}: {error.strerror}") from None
        if not got:
            raise TableError(f"{file.path} ends at byte {offset}, {len(left)} bytes too early")
        left, offset = left[got:], offset + got


def _view(file: TableFile, region: Region) -> Bytes | None:
    """[rows, stride] bytes of the mapping; None where the file is not mapped."""
    if file.map is None:
        return None
    flat = np.frombuffer(file.map, np.uint8, region.rows * region.stride, region.offset)
    return flat.reshape(region.rows, region.stride)
