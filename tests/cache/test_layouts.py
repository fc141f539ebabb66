"""What is not a table is refused, with the value found and the value needed."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from server.cache.row_table import RowTable
from server.errors import TableError
from tests.cache.files import float_table, write_safetensors


def refused(path: Path, match: str, tensor: str = "table") -> None:
    with pytest.raises(TableError, match=match) as error:
        RowTable.open(path, tensor=tensor)
    assert "\n" not in str(error.value)


def zeros(dtype: str, size: int, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
    count = 1
    for n in shape:
        count *= n
    return dtype, shape, bytes(count * size)


@pytest.mark.parametrize("lost", [1, 100, 12_000])
def test_a_truncated_file_is_refused_with_both_sizes(lost: int, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    float_table(path, 50, 64)
    size = path.stat().st_size
    os.truncate(path, size - lost)
    refused(path, rf"truncated: it has {size - lost} bytes, its header describes {size}")


def test_a_file_cut_within_its_header_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    float_table(path, 5, 4)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, 40)
    refused(path, rf"has 40 bytes; its safetensors header alone takes {header}")


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    float_table(path, 5, 4)
    size = path.stat().st_size
    os.truncate(path, size + 3)
    refused(path, rf"longer than it should be: it has {size + 3} bytes, its header describes {size}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"PK\x03\x04" + bytes(100),
        b"\x7fELF" + bytes(range(1, 200)),
        struct.pack("<Q", 20) + b"not json at all, sure",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 13) + b'{"table": 17}',
        struct.pack("<Q", 11) + b'{"table":{}',
        struct.pack("<Q", 12) + b'{"table":{}}',
        struct.pack("<Q", 8) + b'{"a": "\xff',
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    refused(path, rf"\({len(content)} bytes\) is no safetensors file|has {len(content)} bytes; its safetensors header")


def test_offsets_that_disagree_with_the_shape_are_refused_with_both_sizes(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "t.safetensors", {"table": ("F32", (10, 4), bytes(159))})
    refused(path, r"has 159 bytes; its shape \[10, 4\] of F32 needs 160")


def test_a_file_without_the_table_lists_what_it_has(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "t.safetensors", {f"w{i}": zeros("F32", 4, 2) for i in range(20)})
    refused(path, r"holds no table 'table'; its tensors are w0, w1, .* and 12 more")


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (zeros("I64", 8, 4, 4), "is I64; this server reads F32"),
        (zeros("F32", 4, 16), r"is F32 \[16\]"),
        (zeros("F32", 4, 2, 2, 4), r"is F32 \[2, 2, 4\]"),
        (zeros("F32", 4), r"is F32 \[\]; a table needs \[rows, values\] of one type, here F32 \[·\]"),
        (zeros("F32", 4, 1 << 62, 0), "has no rows"),
        (zeros("C64", 8, 2, 2), "is C64; this server reads F32"),
        (zeros("I8", 1, 4, 4), r"has no scales beside it \(looked for table.scale"),
    ],
)
def test_a_tensor_that_is_no_table_is_refused(
    tensor: tuple[str, tuple[int, ...], bytes], match: str, tmp_path: Path
) -> None:
    refused(write_safetensors(tmp_path / "t.safetensors", {"table": tensor}), match)


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (zeros("F32", 4, 9, 1), r"is F32 \[9, 1\]; 'table' needs F32 \[10, 1\]"),
        (zeros("F16", 2, 10, 1), r"is F16 \[10, 1\]; 'table' needs F32"),
    ],
)
def test_scales_of_another_shape_or_type_are_refused(
    scale: tuple[str, tuple[int, ...], bytes], match: str, tmp_path: Path
) -> None:
    tensors = {"table": zeros("I8", 1, 10, 4), "table.scale": scale}
    refused(write_safetensors(tmp_path / "t.safetensors", tensors), match)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tensors = {f"p.shard_{i}.weight": zeros("F32", 4, 3, 4) for i in (0, 1, 3)}
    refused(write_safetensors(tmp_path / "t.safetensors", tensors), "lacks shard 2 of 'p': it has 3 of 4", tensor="p")


def test_shards_of_different_width_are_refused(tmp_path: Path) -> None:
    tensors = {"p.shard_0.weight": zeros("F32", 4, 3, 4), "p.shard_1.weight": zeros("F32", 4, 3, 5)}
    refused(write_safetensors(tmp_path / "t.safetensors", tensors), r"is F32 \[3, 5\]", tensor="p")


def test_shards_whose_scales_differ_are_refused(tmp_path: Path) -> None:
    tensors = {}
    for i in range(2):
        tensors[f"p.shard_{i}.weight"] = zeros("F8_E4M3", 1, 3, 4)
        tensors[f"p.shard_{i}.weight_scale"] = ("F32", (1,), struct.pack("<f", 0.5 + i))
    refused(write_safetensors(tmp_path / "t.safetensors", tensors), r"scales differ \(0.5 to 1.5\)", tensor="p")


@pytest.mark.parametrize(
    "metadata",
    [
        {"engram.layout": "packed"},
        {"engram.layout": "packed", "engram.row_type": "int8", "engram.dim": "sixty"},
    ],
)
def test_a_packed_file_that_does_not_say_what_it_packs_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "t.safetensors", {"table": zeros("U8", 1, 4, 80)}, metadata)
    refused(path, "does not say engram.row_type and engram.dim")


def test_a_packed_row_of_another_width_is_refused_with_both(tmp_path: Path) -> None:
    metadata = {"engram.layout": "packed", "engram.row_type": "int8", "engram.dim": "96"}
    path = write_safetensors(tmp_path / "t.safetensors", {"table": zeros("U8", 1, 4, 80)}, metadata)
    refused(path, r"is U8 \[4, 80\]; int8 rows of 96 values need U8 \[rows, 112\]")


def test_a_table_of_no_rows_is_refused(tmp_path: Path) -> None:
    refused(write_safetensors(tmp_path / "t.safetensors", {"table": zeros("F32", 4, 0, 4)}), "has no rows")


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path, "holds no .safetensors file")


def test_a_shard_of_a_far_number_is_refused_at_once(tmp_path: Path) -> None:
    """The missing ones are not listed to find the first."""
    tensors = {"p.shard_0.weight": zeros("F32", 4, 3, 4), "p.shard_999999999.weight": zeros("F32", 4, 3, 4)}
    path = write_safetensors(tmp_path / "t.safetensors", tensors)
    refused(path, "lacks shard 1 of 'p': it has 2 of 1000000000", tensor="p")


def test_a_number_of_thousands_of_digits_is_no_shards(tmp_path: Path) -> None:
    tensors = {"p.shard_" + "9" * 5000 + ".weight": zeros("F32", 4, 3, 4)}
    refused(write_safetensors(tmp_path / "t.safetensors", tensors), "holds no table 'p'", tensor="p")


@pytest.mark.parametrize(
    "header",
    [
        '{"table": {"dtype": "F32", "shape": [Infinity, 4], "data_offsets": [0, 0]}}',
        '{"__metadata__": {"engram.layout": 1}}',
        '{"__metadata__": null}',
        "[" * 100_000,
    ],
)
def test_a_header_of_other_values_is_not_valid(header: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    refused(path, "its header is not valid")


def test_a_packed_row_of_less_than_no_values_is_refused(tmp_path: Path) -> None:
    metadata = {"engram.layout": "packed", "engram.row_type": "int8", "engram.dim": "-1"}
    path = write_safetensors(tmp_path / "t.safetensors", {"table": zeros("U8", 1, 4, 16)}, metadata)
    refused(path, "int8 rows of -1 values")
