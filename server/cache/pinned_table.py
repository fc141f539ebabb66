"""PinnedTable: a table's rows copied once into memory of our own, which a GPU may read itself where there is one.

    file ──(once, several threads)──▶ memfd, mapped shared: raw[rows, R]  ──▶ registered in chunks (CUDA)

A file on a disk's file system cannot be registered in place, a memfd can, and unlike /dev/shm it has no size limit of
its own. Huge pages are taken where the machine has a pool of free ones. The copy outlives the file: cutting, replacing
or removing it changes nothing. Registration that is refused is named in `note` and the log; rows are then gathered by
the host as ever. Knows ids, never tokens. Source of the limits: docs/tiers.md.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from server.cache.device_table import copy_rows
from server.cache.gather import take_rows
from server.cache.row_table import check_range
from server.cache.row_types import Bytes, Ids, RowType
from server.errors import CapacityError, TableError

logger = logging.getLogger(__name__)

CHUNK = 64 << 30  # one registration of 512 GiB or more fails, some hosts refuse above 96
HUGE_PAGE = 2 << 20
HUGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")

Register = Callable[[int, int], None]  # (address, bytes); raises OSError with the driver's words
Unregister = Callable[[int], None]


class Rows(Protocol):
    """What a table is made of: as RowTable's attributes, whether its rows lie in a file or are yet to be made up."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def row_type(self) -> RowType: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


Source = TypeVar("Source", bound=Rows)


class PinnedTable:
    """All rows of `source` in RAM. `register`, `unregister`: the GPU driver's, None without a GPU. `fill(source, out)`
    puts them there; `reserve`: RAM is asked for whole first, by one thread, so that too little of it is refused here.

    Attributes as RowTable's, and `note`: how the memory is held, for the start-up report. Raises TableError if the file
    changes while it is copied, CapacityError without room.
    """

    def __init__(
        self,
        source: Source,
        register: Register | None = None,
        unregister: Unregister | None = None,
        *,
        fill: Callable[[Source, Bytes], None] = copy_rows,  # type: ignore[assignment]  # of a RowTable
        reserve: bool = True,
    ) -> None:
        self.name, self.rows, self.dim, self.row_type = source.name, source.rows, source.dim, source.row_type
        self.row_bytes, self.nbytes = source.row_bytes, source.nbytes
        self.fault: str | None = None
        self.refusal: str | None = None  # of the driver, to register it
        self._unregister = unregister
        self._registered: list[int] = []
        self._map, kind = _anonymous_file(self.name, self.nbytes, reserve)
        flat = np.frombuffer(self._map, np.uint8, self.nbytes)
        self._view: Bytes = flat.reshape(self.rows, self.row_bytes)
        fill(source, self._view)
        self.note = f"{kind}, copied; not registered: there is no GPU"
        if register is not None:
            self.note = f"{kind}, copied; {self._register_all(register, flat)}"

    @property
    def raw(self) -> Tensor:
        """uint8[rows, R], the rows themselves: for a GPU to read, once they are registered."""
        return torch.from_numpy(self._view)

    @property
    def registered(self) -> bool:
        """Whether a GPU may read the rows itself."""
        return bool(self._registered)

    def gather(self, ids: Ids, out: Bytes) -> None:
        """Rows ids[N] → out uint8[N, R], C-contiguous. Raises TableError if an id is no row."""
        if self.fault is not None:
            raise TableError(self.fault)
        if len(ids):
            check_range(self, ids)
            take_rows(self._view, ids, out)

    def page_in(self, ids: Ids) -> int:
        """Everything is in RAM already."""
        return 0

    def close(self) -> None:
        self.fault = self.fault or f"table {self.name} is closed"
        while self._registered and self._unregister is not None:
            self._unregister(self._registered.pop())

    def _register_all(self, register: Register, flat: Bytes) -> str:
        """Registers every chunk, or none: the words for the report."""
        start = flat.ctypes.data
        try:
            for begin in range(0, self.nbytes, CHUNK):
                register(start + begin, min(CHUNK, self.nbytes - begin))
                self._registered.append(start + begin)
        except OSError as error:
            while self._registered and self._unregister is not None:
                self._unregister(self._registered.pop())
            self.refusal = f"table {self.name}: the GPU driver refused to register it ({error}); rows are staged"
            logger.warning("%s", self.refusal)
            return f"registration refused ({error}): rows are gathered by the host and staged"
        return f"registered in {len(self._registered)} chunks"


def _anonymous_file(name: str, nbytes: int, reserve: bool) -> tuple[mmap.mmap, str]:
    """A shared mapping of a file without a name, and what kind of memory it is. Raises CapacityError."""
    kinds: Sequence[tuple[int, str]] = ((0, "memfd"),)
    if _free_huge_pages() * HUGE_PAGE >= nbytes:
        kinds = ((os.MFD_HUGETLB, "memfd of huge pages"), *kinds)
    for flags, kind in kinds:
        size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE if flags else nbytes
        try:
            fd = os.memfd_create(f"engram-{name.replace('/', '-')}", os.MFD_CLOEXEC | flags)
            try:
                if reserve:
                    os.posix_fallocate(fd, 0, size)
                else:
                    os.ftruncate(fd, size)
                return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE), kind
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            refusal = error
    raise CapacityError(
        f"table {name} needs {nbytes} bytes of RAM and the system refuses them ({refusal}); "
        f"set --placement {name}=mapped"
    )


def _free_huge_pages() -> int:
    try:
        return int(HUGE_POOL.read_text())
    except (OSError, ValueError):
        return 0
