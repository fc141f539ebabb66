"""Residency: pages stay under the limit whatever is read, hot ones stay longest, and no row is ever wrong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from server.cache.file_pages import FilePages
from server.cache.residency import Residency
from server.cache.row_table import RowTable
from server.cache.table_files import PAGE
from tests.cache.files import float_table
from tests.cache.test_row_table import resident_pages

ROWS, DIM = 64 * 1024, 64  # 256 bytes a row: 16 MiB, 4,096 pages
LIMIT, STEP = 4 << 20, 1 << 20


@pytest.fixture
def cold(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A table file of which no page is in RAM, and its rows."""
    path = tmp_path / "t.safetensors"
    values = float_table(path, ROWS, DIM)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(path) > 100:
        pytest.skip("this file system keeps pages whatever is advised")
    return path, values


def read(table: RowTable, ids: np.ndarray) -> np.ndarray:
    out = np.empty((len(ids), table.row_bytes), np.uint8)
    table.gather(ids, out)
    return out.view(np.float32)


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("mode", ["mmap", "pread"])
def test_resident_bytes_stay_under_the_limit_and_rows_are_right(mode: str, cold: tuple[Path, np.ndarray]) -> None:
    path, values = cold
    table = RowTable.open(path, read="pread" if mode == "pread" else "mmap")
    residency = Residency([table], LIMIT, STEP)
    generator, most = np.random.default_rng(1), 0
    for step in range(200):
        ids = generator.integers(0, ROWS, 100)
        if step % 3 == 0:
            table.page_in(ids)
        np.testing.assert_array_equal(read(table, ids), values[ids])
        if step % 10 == 0:
            most = max(most, resident_pages(path))
    assert residency.dropped_pages > 10_000
    assert LIMIT // 2 < most * PAGE <= LIMIT + 32 * PAGE  # the header's page, and folios the kernel drops a bit later
    residency.close()
    table.close()


def test_hot_pages_stay_while_cold_ones_stream_by(cold: tuple[Path, np.ndarray]) -> None:
    path, _ = cold
    table = RowTable.open(path)
    residency = Residency([table], LIMIT, STEP)
    hot = np.arange(0, 256 * 16, 16)  # 256 pages, read at every step: a quarter of the limit
    generator = np.random.default_rng(1)
    for _ in range(100):
        read(table, hot)
        read(table, generator.integers(8192, ROWS, 100))
    (pages,) = residency._files.values()
    assert pages.state is not None
    assert np.count_nonzero(pages.state[:257]) > 230
    assert residency.dropped_pages > 5_000
    residency.close()
    table.close()


def test_without_a_limit_mincore_counts_and_nothing_is_dropped(cold: tuple[Path, np.ndarray]) -> None:
    path, _ = cold
    table = RowTable.open(path)
    residency = Residency([table], 0, STEP)
    read(table, np.arange(0, 2048 * 16, 16))
    for pages in residency._files.values():
        pages.look()
    found = residency.figures()[table.name]
    assert found.counted == "mincore"
    assert found.nbytes // PAGE == resident_pages(path) >= 2048
    assert residency.dropped_pages == 0
    residency.close()
    table.close()


def test_what_the_bookkeeping_missed_mincore_finds(cold: tuple[Path, np.ndarray]) -> None:
    path, _ = cold
    table = RowTable.open(path)
    residency = Residency([table], LIMIT, STEP)
    with path.open("rb") as stranger:  # reads a part of the file into RAM behind our back
        stranger.read(2 << 20)
    (pages,) = residency._files.values()
    pages.look()
    assert pages.count() >= 512
    residency.close()
    table.close()


def test_a_limit_that_cannot_be_held_is_said(
    cold: tuple[Path, np.ndarray], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = cold
    table = RowTable.open(path)
    residency = Residency([table], LIMIT, STEP)
    monkeypatch.setattr("server.cache.residency.ROOM_SECONDS", 0.01)
    for pages in residency._files.values():
        monkeypatch.setattr(pages, "sweep", lambda window: 0)  # as if another process held every page
    for first in range(0, ROWS, 4096):
        read(table, np.arange(first, first + 4096, 16))
    assert eventually(lambda: "another process maps them" in caplog.text)
    assert residency.note is not None and residency.note in caplog.text
    residency.close()
    table.close()


def test_closing_ends_the_thread_and_gives_the_descriptors_back(cold: tuple[Path, np.ndarray]) -> None:
    path, _ = cold
    handles, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for limit in (0, LIMIT):
        table = RowTable.open(path)
        residency = Residency([table], limit, STEP)
        read(table, np.arange(100))
        residency.close()
        table.close()
        del table, residency
    assert len(os.listdir("/proc/self/fd")) <= handles
    assert threading.active_count() <= threads


def test_pages_dropped_while_their_reader_waits_for_room_still_count(cold: tuple[Path, np.ndarray]) -> None:
    table = RowTable.open(cold[0])

    class Full:
        def admit(self, new: int) -> None:
            for _ in range(2):  # recent to cold, cold to dropped
                for window in range(pages.windows):
                    pages.sweep(window)

        def room(self) -> int:
            return 0

    pages = FilePages(table.files[0], Full())
    wanted = np.arange(10, 20)
    pages.touch(wanted, wanted)
    assert pages.count() == 10
    pages.close()
    table.close()


def test_a_table_that_leaves_does_not_take_along_the_figures_of_its_successor(cold: tuple[Path, np.ndarray]) -> None:
    """A pack attached again under the name of one that is still being read."""
    old, new = RowTable.open(cold[0]), RowTable.open(cold[0])
    residency = Residency([old], LIMIT, STEP)
    residency.add([new], STEP)
    residency.remove([old], STEP)
    assert list(residency.figures()) == [new.name]
    residency.close()
    old.close()
    new.close()
