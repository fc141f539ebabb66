"""RowTable: the right bytes for every id, in every layout and way of reading, or a TableError; never another row."""

from __future__ import annotations

import gc
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cache.row_table import RowTable
from server.errors import TableError
from tests.cache.files import Bytes, float_table, random_bytes, split_evenly, write_safetensors

ROWS, DIM = 300, 64
READS = ["mmap", "pread"]
PREFIX = "model.layers.1.ngram_embedding"


def one_tensor(folder: Path) -> tuple[Path, str, Bytes]:
    rows = random_bytes(ROWS, DIM * 2)
    return write_safetensors(folder / "t.safetensors", {"table": ("BF16", (ROWS, DIM), rows.tobytes())}), "table", rows


def shards(folder: Path) -> tuple[Path, str, Bytes]:
    """Eleven shards over three files, shard 10 after shard 9, and a stranger in between."""
    rows = random_bytes(ROWS, DIM * 2)
    ends = np.cumsum(split_evenly(ROWS, 11))
    parts = np.split(rows, ends[:-1])
    for file in range(3):
        tensors = {"stranger": ("U8", (3,), b"abc")} if file == 1 else {}
        tensors |= {
            f"{PREFIX}.shard_{i}.weight": ("BF16", (len(parts[i]), DIM), parts[i].tobytes()) for i in range(file, 11, 3)
        }
        write_safetensors(folder / f"model-{file}.safetensors", tensors)
    return folder, PREFIX, rows


def int8_apart(folder: Path) -> tuple[Path, str, Bytes]:
    rows = random_bytes(ROWS, DIM + 4)
    values, scales = rows[:, :DIM].tobytes(), rows[:, DIM:].tobytes()
    tensors = {"table": ("I8", (ROWS, DIM), values), "table.scale": ("F32", (ROWS, 1), scales)}
    return write_safetensors(folder / "t.safetensors", tensors), "table", rows


def block_float8_apart(folder: Path) -> tuple[Path, str, Bytes]:
    """Weight and scale in different files, under the names DeepSeek-V4.1 gives them."""
    rows = random_bytes(ROWS, DIM + 2)
    values, scales = rows[:, :DIM].tobytes(), rows[:, DIM:].tobytes()
    write_safetensors(folder / "a.safetensors", {"engram.embed.weight": ("F8_E4M3", (ROWS, DIM), values)})
    write_safetensors(folder / "b.safetensors", {"engram.embed.scale": ("F8_E8M0", (ROWS, 2), scales)})
    return folder, "engram.embed.weight", rows


def int8_packed(folder: Path) -> tuple[Path, str, Bytes]:
    rows = random_bytes(ROWS, 80)  # 64 + 4, up to a multiple of 16
    metadata = {"engram.layout": "packed", "engram.row_type": "int8", "engram.dim": str(DIM)}
    path = write_safetensors(folder / "t.safetensors", {"table": ("U8", (ROWS, 80), rows.tobytes())}, metadata)
    return path, "table", rows


LAYOUTS: list[Callable[[Path], tuple[Path, str, Bytes]]] = [
    one_tensor, shards, int8_apart, block_float8_apart, int8_packed,
]  # fmt: skip


def gather(table: RowTable, ids: list[int]) -> Bytes:
    out = np.full((len(ids), table.row_bytes), 0xA5, np.uint8)
    table.gather(np.array(ids, np.int64), out)
    return out


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_read_as_it_stands(
    layout: Callable[[Path], tuple[Path, str, Bytes]], read: Literal["mmap", "pread"], tmp_path: Path
) -> None:
    path, tensor, rows = layout(tmp_path)
    table = RowTable.open(path, tensor=tensor, read=read)
    assert (table.rows, table.dim, table.row_bytes) == (ROWS, DIM, rows.shape[1])
    assert table.nbytes == rows.nbytes
    order = np.random.default_rng(5).permutation(ROWS).tolist()
    np.testing.assert_array_equal(gather(table, order), rows[order])
    assert gather(table, []).shape == (0, table.row_bytes)


@given(data=st.data())
def test_any_ids_over_any_shards_give_their_rows(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shards")
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    rows = random_bytes(sum(sizes), 4)
    tensors, at = {}, 0
    for i, size in enumerate(sizes):
        tensors[f"p.shard_{i}.weight"] = ("F32", (size, 1), rows[at : at + size].tobytes())
        at += size
    table = RowTable.open(write_safetensors(folder / "t.safetensors", tensors), tensor="p")
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=40))
    np.testing.assert_array_equal(gather(table, ids), rows[ids])
    table.close()


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("bad", [-1, ROWS, 2**62, -(2**63)])
def test_an_id_outside_the_table_is_refused_by_value(bad: int, read: Literal["mmap", "pread"], tmp_path: Path) -> None:
    path, tensor, _ = one_tensor(tmp_path)
    table = RowTable.open(path, tensor=tensor, read=read)
    with pytest.raises(TableError, match=rf"rows 0\.\.{ROWS - 1}; asked for {bad}$"):
        gather(table, [3, bad, 4])
    assert table.fault is None
    gather(table, [3])


def test_one_flipped_byte_changes_exactly_its_row(tmp_path: Path) -> None:
    path, tensor, _ = int8_packed(tmp_path)
    before = gather(RowTable.open(path, tensor=tensor), list(range(ROWS)))
    with path.open("r+b") as file:
        at = path.stat().st_size - (ROWS - 123) * 80 + 7
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    after = gather(RowTable.open(path, tensor=tensor), list(range(ROWS)))
    assert np.argwhere(before != after).tolist() == [[123, 7]]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def replace(path: Path) -> None:
    copy = path.with_suffix(".new")
    copy.write_bytes(path.read_bytes())
    stat = path.stat()
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(copy, path)


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (cut, "changed size from"),
        (empty, "changed size from .* to 0 bytes"),
        (grow, "changed size from"),
        (replace, "was replaced"),
        (touch, "was written to"),
        (Path.unlink, "cannot be found"),
    ],
)
def test_a_file_changed_while_open_is_named_and_never_read_again(
    change: Callable[[Path], None], named: str, read: Literal["mmap", "pread"], tmp_path: Path
) -> None:
    folder, tensor, _ = shards(tmp_path)
    table = RowTable.open(folder, tensor=tensor, read=read)
    gather(table, [0, 1])
    victim = folder / "model-1.safetensors"
    before = victim.read_bytes()
    change(victim)
    with pytest.raises(TableError, match=rf"model-1\.safetensors {named}") as error:
        gather(table, [0, 1])
    assert table.fault == str(error.value)
    victim.write_bytes(before)
    with pytest.raises(TableError, match="model-1"):
        gather(table, [0])


def test_a_short_read_behind_an_unchanged_size_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is cut between the check and the read: pread notices, and the table stays refused."""
    path, tensor, _ = one_tensor(tmp_path)
    table = RowTable.open(path, tensor=tensor, read="pread")
    monkeypatch.setattr(table, "check", lambda: os.truncate(path, path.stat().st_size - 5))
    with pytest.raises(TableError, match="ends within a row: 123 of 128 bytes"):
        gather(table, [ROWS - 1])
    assert table.fault is not None


def test_a_read_error_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensor, _ = one_tensor(tmp_path)
    table = RowTable.open(path, tensor=tensor, read="pread")

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(TableError, match="cannot be read at byte .*Input/output error"):
        gather(table, [0])
    assert "Input/output error" in str(table.fault)


def test_a_closed_table_refuses(tmp_path: Path) -> None:
    path, tensor, _ = one_tensor(tmp_path)
    table = RowTable.open(path, tensor=tensor)
    table.close()
    with pytest.raises(TableError, match="is closed"):
        gather(table, [0])


def test_opening_and_closing_leaves_no_descriptor_and_no_mapping(tmp_path: Path) -> None:
    folder, tensor, _ = shards(tmp_path)
    gc.collect()  # other tests' tables
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        table = RowTable.open(folder, tensor=tensor)
        gather(table, [0])
        table.close()
        del table
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_opening_costs_the_same_for_10_mb_and_100_gb(tmp_path: Path) -> None:
    """Header and mapping only: under 5 ms each, and within 3 ms of each other, the best of 20 on a busy machine."""
    best = {}
    for rows in (10_000_000 // 256, 100_000_000_000 // 256):
        path = write_safetensors(tmp_path / f"{rows}.safetensors", {})
        text = b'{"table":{"dtype":"F32","shape":[%d,64],"data_offsets":[0,%d]}}' % (rows, rows * 256)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + rows * 256)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            table = RowTable.open(path)
            times.append(time.perf_counter() - start)
            assert not gather(table, [0, rows - 1]).any()
            table.close()
            del table
        best[rows] = min(times)
    assert max(best.values()) < 5e-3
    assert max(best.values()) - min(best.values()) < 3e-3


def resident_pages(path: Path) -> int:
    """Pages of the file in the page cache, as mincore sees them."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        vector = (ctypes.c_ubyte * pages)()
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), vector) == 0, ctypes.get_errno()
        return sum(byte & 1 for byte in vector)


@pytest.mark.parametrize("read", READS)
def test_page_in_reads_the_distinct_pages_and_hardly_more(read: Literal["mmap", "pread"], tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    values = float_table(path, 64 * 1024, 64)  # 16 MiB
    table = RowTable.open(path, read=read)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold = resident_pages(path)
    if cold > 100:
        pytest.skip(f"this file system keeps {cold} pages whatever is advised")
    ids = np.random.default_rng(7).integers(0, len(values), 300)
    first = table.files[0].seen.st_size - values.nbytes + ids * 256
    distinct = len(np.union1d(first // mmap.PAGESIZE, (first + 255) // mmap.PAGESIZE))
    assert table.page_in(np.concatenate([ids, ids])) == distinct
    deadline = time.monotonic() + 5
    while (resident := resident_pages(path) - cold) < distinct * 0.95 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert distinct * 0.95 <= resident <= distinct * 1.05 + 8  # some were there before; the kernel may round up


def test_a_gather_that_met_the_disk_makes_the_next_one_ask_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensor, rows = one_tensor(tmp_path)
    table = RowTable.open(path, tensor=tensor)
    asked: list[list[int]] = []
    monkeypatch.setattr(table, "page_in", lambda ids: asked.append(ids.tolist()))
    clock = iter([0.0, 1e-5, 1.0, 1.1, 2.0, 2.00001, 3.0, 3.00001])  # the second of four gathers is slow
    monkeypatch.setattr("server.cache.row_table.time.perf_counter", lambda: next(clock))
    for ids in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]):
        np.testing.assert_array_equal(gather(table, ids), rows[ids])
    assert asked == [[7, 8, 9]]


def test_many_rows_split_over_threads_are_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cache.gather.SPLIT_ROWS", 10)
    monkeypatch.setattr("server.cache.gather.THREADS", 3)
    path, tensor, rows = one_tensor(tmp_path)
    table = RowTable.open(path, tensor=tensor)
    for count in (9, 10, 11, 1000):
        ids = np.random.default_rng(count).integers(0, ROWS, count).tolist()
        np.testing.assert_array_equal(gather(table, ids), rows[ids])


def test_a_table_closed_while_its_pages_are_asked_for_is_no_error(tmp_path: Path) -> None:
    """As a pack that is removed while the pager, or the cache's admission, still reads it."""
    path, tensor, _ = one_tensor(tmp_path)
    table = RowTable.open(path, tensor=tensor)

    class Leaving:
        def room(self) -> int:
            table.files[0].watch = None
            return 100

        def touch(self, first: np.ndarray, last: np.ndarray) -> None:
            table.close()

    table.files[0].watch = Leaving()
    assert table.page_in(np.arange(3)) > 0
    assert table.page_in(np.arange(3)) == 0


def test_a_table_that_nobody_closed_gives_its_descriptors_back(tmp_path: Path) -> None:
    """As those of a pack of which one table turned out not to be as its config says."""
    path, tensor, _ = one_tensor(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    tables = [RowTable.open(path, tensor=tensor) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) > before
    del tables
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
