"""Tables copied to the device or into pinned memory: the file's rows, bit for bit, whatever becomes of the file."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from server.cache import device_table
from server.cache.device_table import DeviceFetch, DeviceTable
from server.cache.pinned_table import PinnedTable
from server.cache.prefetcher import Lookup, Prefetcher
from server.cache.row_table import RowTable
from server.cache.row_types import row_type
from server.cache.table_writer import random_rows, write_table
from server.errors import CapacityError, TableError
from tests.cache.files import float_table
from tests.cache.test_row_table import LAYOUTS, ROWS, gather

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
COPIES: list[Callable[[RowTable], Any]] = [lambda table: DeviceTable(table, CPU), PinnedTable]


@pytest.mark.parametrize("copy", COPIES, ids=["device", "pinned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_holds_every_row_of_the_file(
    layout: Any, copy: Callable[[RowTable], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_table, "RUN_BYTES", 7 * 80)  # runs that end within shards
    path, tensor, rows = layout(tmp_path)
    table = copy(RowTable.open(path, tensor=tensor))
    order = np.random.default_rng(5).permutation(ROWS).tolist()
    np.testing.assert_array_equal(gather(table, order), rows[order])
    assert gather(table, []).shape == (0, table.row_bytes)
    for bad in (-1, ROWS):
        with pytest.raises(TableError, match=rf"rows 0\.\.{ROWS - 1}; asked for {bad}$"):
            gather(table, [3, bad])
    table.close()
    with pytest.raises(TableError, match="is closed"):
        gather(table, [0])


@pytest.mark.parametrize("copy", COPIES, ids=["device", "pinned"])
def test_a_copy_outlives_its_file(copy: Callable[[RowTable], Any], tmp_path: Path) -> None:
    path, tensor, rows = LAYOUTS[0](tmp_path)
    source = RowTable.open(path, tensor=tensor)
    table = copy(source)
    source.close()
    os.truncate(path, 0)
    path.unlink()
    np.testing.assert_array_equal(gather(table, list(range(ROWS))), rows)
    assert table.fault is None


@pytest.mark.parametrize("copy", COPIES, ids=["device", "pinned"])
def test_a_file_that_changes_while_it_is_copied_is_refused(
    copy: Callable[[RowTable], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensor, _ = LAYOUTS[0](tmp_path)
    source = RowTable.open(path, tensor=tensor)
    read = source.read_run

    def meanwhile(first: int, out: Any) -> None:
        read(first, out)
        path.touch()

    monkeypatch.setattr(source, "read_run", meanwhile)
    with pytest.raises(TableError, match="was written to while in use"):
        copy(source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "float8_e4m3", "float8_e4m3_e8m0"])
@pytest.mark.parametrize("layout", ["apart", "packed"])
def test_a_lookup_on_the_device_is_bit_for_bit_a_fetch(
    layout: Any, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_table(tmp_path / "t", random_rows(1000, 64, 1), 1000, 64, row_type(name), layout=layout)
    source = RowTable.open(tmp_path / "t")
    ids = np.random.default_rng(0).integers(0, 1000, (40, 6))
    prefetcher = Prefetcher(dtype, CPU, 4 << 20)
    with torch.inference_mode():
        (fetch,) = prefetcher.begin([Lookup(source, 1, ids)])
        fetched = fetch.wait().clone()
        table = DeviceTable(source, CPU)
        here = DeviceFetch(Lookup(table, 1, ids), dtype)
        assert torch.equal(here.wait(), fetched)
        assert torch.equal(here.wait(), fetched)
    assert (table.counters(1).rows, table.counters(1).stall_s) == (240, 0)
    prefetcher.close()


class Driver:
    """Stands in for the GPU driver: keeps what is registered, refuses the chunk it is told to."""

    def __init__(self, refuse: int = -1) -> None:
        self.refuse, self.held, self.calls = refuse, {}, 0

    def register(self, address: int, nbytes: int) -> None:
        self.calls += 1
        if self.calls - 1 == self.refuse:
            raise OSError(1, "invalid argument")
        self.held[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.held[address]


def test_registration_covers_the_table_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cache.pinned_table.CHUNK", 16_384)
    path, tensor, rows = LAYOUTS[0](tmp_path)
    driver = Driver()
    table = PinnedTable(RowTable.open(path, tensor=tensor), driver.register, driver.unregister)
    assert table.registered
    assert sum(driver.held.values()) == rows.nbytes
    starts = sorted(driver.held)
    assert all(a + driver.held[a] == b for a, b in itertools.pairwise(starts))
    assert "registered in 3 chunks" in table.note
    table.close()
    assert not driver.held


def test_a_refused_registration_is_undone_and_said_and_rows_still_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.cache.pinned_table.CHUNK", 16_384)
    path, tensor, rows = LAYOUTS[0](tmp_path)
    driver = Driver(refuse=2)
    table = PinnedTable(RowTable.open(path, tensor=tensor), driver.register, driver.unregister)
    assert not table.registered and not driver.held
    assert "registration refused" in table.note and "invalid argument" in table.note
    assert "refused to register" in caplog.text and table.refusal is not None and table.refusal in caplog.text
    np.testing.assert_array_equal(gather(table, [5, 299]), rows[[5, 299]])


def test_memory_that_the_system_refuses_is_a_capacity_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensor, rows = LAYOUTS[0](tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=rf"needs {rows.nbytes} bytes of RAM .*No space left.*=mapped"):
        PinnedTable(RowTable.open(path, tensor=tensor))


def test_huge_pages_that_turn_out_not_to_be_there_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool may be emptied between the look at it and the taking."""
    monkeypatch.setattr("server.cache.pinned_table._free_huge_pages", lambda: 1 << 20)
    path, tensor, rows = LAYOUTS[0](tmp_path)
    table = PinnedTable(RowTable.open(path, tensor=tensor))
    assert "memfd" in table.note
    np.testing.assert_array_equal(gather(table, [0, 299]), rows[[0, 299]])


SMALL_SHM = """
import os, shutil, sys
import numpy as np
from server.cache.pinned_table import PinnedTable
from server.cache.row_table import RowTable
assert shutil.disk_usage("/dev/shm").total == 65_536
table = PinnedTable(RowTable.open(sys.argv[1]))
rows = np.empty((table.rows, table.row_bytes), np.uint8)
table.gather(np.arange(table.rows), rows)
assert rows.tobytes() == open(sys.argv[1], "rb").read()[-table.nbytes:]
"""


def test_a_dev_shm_too_small_for_a_table_bounds_no_copy(tmp_path: Path) -> None:
    """In a mount namespace of its own, where /dev/shm holds 64 KB: copies are files without a name, not on it."""
    float_table(tmp_path / "t.safetensors", 16_384, 64)  # 4 MB
    shell = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec "$0" -c "$1" "$2"'
    command = ["unshare", "--mount", "sh", "-c", shell, sys.executable, SMALL_SHM, str(tmp_path / "t.safetensors")]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no mount namespace may be made here")
    assert done.returncode == 0, done.stderr
