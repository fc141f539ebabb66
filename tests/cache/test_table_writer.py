"""The writer, read back by the safetensors library and by RowTable; and what is left when it fails."""

from __future__ import annotations

import itertools
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from server.cache.row_table import RowTable
from server.cache.row_types import ROW_TYPES, row_type
from server.cache.table_writer import WriteLayout, random_rows, write_sparse_table, write_table
from server.errors import TableError

ROWS, DIM = 1001, 64


def rows_of(table: RowTable) -> torch.Tensor:
    raw = np.empty((table.rows, table.row_bytes), np.uint8)
    table.gather(np.arange(table.rows), raw)
    out = torch.empty(table.rows, table.dim)
    table.row_type.decode(torch.from_numpy(raw), out)
    return out


def in_chunks(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for at in range(0, len(values), size):
        yield values[at : at + size]


@pytest.mark.parametrize("layout", ["apart", "packed"])
@pytest.mark.parametrize("name", ROW_TYPES)
def test_what_is_written_in_chunks_is_read_back(name: str, layout: WriteLayout, tmp_path: Path) -> None:
    kind = row_type(name, 0.25)
    values = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    path = tmp_path / "t.safetensors"
    write_table(path, in_chunks(values, 300), ROWS, DIM, kind, layout=layout)
    table = RowTable.open(path)
    assert (table.rows, table.dim, table.row_type) == (ROWS, DIM, kind)
    want = torch.empty(ROWS, DIM)
    kind.decode(torch.from_numpy(kind.encode(values)), want)
    assert torch.equal(rows_of(table), want)
    # 3 mantissa bits: half a step is a 16th; e4m3 at scale 1/4 is subnormal below 2^-8. int8: half of absmax / 127.
    torch.testing.assert_close(want, torch.from_numpy(values), rtol=1 / 16, atol=0.02)


@pytest.mark.parametrize("layout", ["apart", "packed"])
@pytest.mark.parametrize("name", ROW_TYPES)
def test_the_library_reads_the_file_and_rows_and_scales_start_on_pages(
    name: str, layout: WriteLayout, tmp_path: Path
) -> None:
    path = tmp_path / "t.safetensors"
    write_table(path, random_rows(ROWS, DIM, 3), ROWS, DIM, row_type(name), layout=layout, metadata={"made": "here"})
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        assert file.metadata()["made"] == "here"
        for tensor in set(file.keys()) - {"table.padding"}:
            data = file.get_tensor(tensor).contiguous().view(torch.uint8).numpy().tobytes()
            offsets = [at for at in range(0, len(content), 4096) if content.startswith(data, at)]
            assert offsets, tensor


def test_a_table_can_be_written_beside_others_under_another_name(tmp_path: Path) -> None:
    write_table(tmp_path / "t.safetensors", random_rows(5, 8, 0), 5, 8, row_type("float32"), tensor="other.weight")
    assert RowTable.open(tmp_path / "t.safetensors", tensor="other.weight").rows == 5


@pytest.mark.parametrize(
    ("sizes", "match"),
    [([5, 5], "hold 11 rows; 10 came"), ([5, 7], r"hold 11 rows of 8; after 5 came a chunk \(7, 8\)")],
)
def test_chunks_that_do_not_add_up_leave_the_old_file(sizes: list[int], match: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TableError, match=match):
        write_table(path, (np.zeros((n, 8), np.float32) for n in sizes), 11, 8, row_type("int8"))
    assert os.listdir(tmp_path) == ["t.safetensors"]
    assert path.read_bytes() == b"old"


def test_an_error_in_the_source_of_rows_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield np.zeros((5, 8), np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path / "t.safetensors", broken(), 11, 8, row_type("int8"))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_with_the_room_needed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if offset + len(data) > 100_000:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TableError, match=r"no room for .*: it needs \d+ bytes, .* has \d+ free"):
        write_table(tmp_path / "t.safetensors", random_rows(9000, DIM, 0), 9000, DIM, row_type("float32"))
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_is_a_table_error_too(tmp_path: Path) -> None:
    """A real failure of the write, from the kernel: EFBIG."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        with pytest.raises(TableError, match="cannot be written: File too large"):
            write_table(tmp_path / "t.safetensors", random_rows(9000, DIM, 0), 9000, DIM, row_type("float32"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("layout", ["apart", "packed"])
def test_a_sparse_table_takes_no_room_and_reads_as_zeros(layout: WriteLayout, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    rows = 20_000_000_000 // 80
    write_sparse_table(path, rows, DIM, row_type("int8"), layout=layout)
    assert path.stat().st_blocks * 512 < 100_000
    table = RowTable.open(path)
    assert table.rows == rows
    raw = np.ones((3, table.row_bytes), np.uint8)
    table.gather(np.array([0, rows // 2, rows - 1]), raw)
    assert not raw.any()


def test_random_rows_are_those_of_their_seed_and_place() -> None:
    rows = np.concatenate(list(random_rows(10_000, 16, 7)))
    assert rows.shape == (10_000, 16)
    np.testing.assert_array_equal(rows, np.concatenate(list(random_rows(10_000, 16, 7))))
    np.testing.assert_array_equal(rows[:5000], np.concatenate(list(random_rows(5000, 16, 7))))
    assert not np.array_equal(rows, np.concatenate(list(random_rows(10_000, 16, 8))))
    assert len(np.unique(rows, axis=0)) == 10_000
    # 160,000 draws: the mean is off by 0.02 / 400 = 5e-5 or so, the deviation by 0.02 / 566; four times that.
    assert abs(rows.mean()) < 2e-4
    assert abs(rows.std() - 0.02) < 1.5e-4


def test_random_rows_come_in_chunks_of_little_memory() -> None:
    assert max(chunk.nbytes for chunk in itertools.islice(random_rows(10**9, 64, 0), 3)) <= 1 << 20
