"""What every attached pack has, whatever its rows are for: a name, a fingerprint, addresses and tables.

Knows nothing of the consumer: `attached.py` has Engram packs, `stem.py` STEM packs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from server.batch import Bools, Ints
from server.cache.device_table import DeviceTable
from server.cache.hot_rows import Source
from server.cache.row_table import RowTable, Table
from server.cache.table_files import ReadMode
from server.errors import PackError
from server.memory.addressing import Addresser
from server.memory.pack import table_file


class Attachment:
    """`name` as clients say it; `fingerprint` changes whenever what the pack answers could change."""

    def __init__(self, name: str, fingerprint: str, addresser: Addresser, tables: dict[int, Table]) -> None:
        self.name, self.fingerprint, self.addresser, self.tables = name, fingerprint, addresser, tables
        self.content = ""  # `identity.content_key`: which edits are its own

    @property
    def id(self) -> tuple[str, str]:
        """As a sequence's view names the pack."""
        return self.name, self.fingerprint

    @property
    def mapped(self) -> list[RowTable]:
        """The tables that are read in place."""
        return [table for table in self.tables.values() if isinstance(table, RowTable)]

    @property
    def conv_bytes_per_token(self) -> int:
        """Bytes that one token slot holds for this pack beside keys and values."""
        return 0

    def allocate_conv(self, num_slots: int, device: torch.device) -> None:
        """Makes room for them; shares the KV cache's block table."""

    def sources(self) -> list[Source]:
        """What of the pack a device cache can hold: the tables that are not on the device as a whole."""
        orders, heads = self.addresser.orders, self.addresser.heads
        cached = [(layer, table) for layer, table in self.tables.items() if not isinstance(table, DeviceTable)]
        return [Source(table, layer, orders, heads) for layer, table in cached]

    def address(self, windows: Ints, blocked: Bools) -> Mapping[int, tuple[Ints, Ints]]:
        """Per layer, the row ids [T, C] and the hash before the modulus [T, O]."""
        return self.addresser.address(windows, blocked)


def open_tables(folder: Path, addresser: Addresser, dim: int, name: str, read: ReadMode = "mmap") -> dict[int, Table]:
    """The table of every layer, called NAME/LAYER.

    Raises TableError, or PackError with both sizes if one is not as the config says.
    """
    tables: dict[int, Table] = {}
    for layer in addresser.layer_ids:
        path, rows = folder / table_file(layer), addresser.rows_per_table[layer]
        table = RowTable.open(path, name=f"{name}/{layer}", read=read)
        if table.rows != rows or table.dim != dim:
            raise PackError(
                f"{path} holds {table.rows} rows of {table.dim} values; config.json needs {rows} rows of {dim}"
            )
        tables[layer] = table
    return tables


def fingerprint(folder: Path, layers: Sequence[int]) -> str:
    """SHA-256 over config, modules and each table's size and modification time: no table byte is read."""
    digest = hashlib.sha256()
    small = sorted(folder.glob("*.json")) + sorted(folder.glob("modules.safetensors"))
    for path in small:
        digest.update(path.name.encode() + path.read_bytes())
    for layer in layers:
        status = (folder / table_file(layer)).stat()
        digest.update(f"{layer}:{status.st_size}:{status.st_mtime_ns};".encode())
    return digest.hexdigest()
