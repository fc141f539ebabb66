"""Edits as a pack of their own: the pack they were made for, with the edited rows in its tables.

The rows take the table's row type, so that an int8 pack rounds them; everything else is copied as it is. The folder
appears whole or not at all. Knows packs; nothing of whose edits these are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.batch import Ints
from server.cache.row_table import RowTable
from server.cache.row_types import Floats
from server.commands.folders import new_folder
from server.errors import PackError
from server.memory.pack import CONFIG, table_file
from server.training.start import Opened


def export_pack(
    source: Path, out: Path, opened: Opened, rows: Mapping[int, tuple[Ints, Floats]], about: dict[str, Any]
) -> None:
    """Writes the pack to `out`. Raises PackError if that is there already, or if the disk is full."""
    try:
        with new_folder(out) as folder:
            for file in source.iterdir():
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
            for layer, (ids, values) in rows.items():
                table = opened.tables[layer]
                assert isinstance(table, RowTable)
                (region,) = table.layout.columns[0]  # a pack's table is one tensor in one file
                with (folder / table_file(layer)).open("r+b") as stored:
                    for row, data in zip(ids.tolist(), table.row_type.encode(values), strict=True):
                        stored.seek(region.offset + row * region.stride)
                        stored.write(data.tobytes())
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            config["extra"] = {**config.get("extra", {}), "edits": about}
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise PackError(f"{out.name} cannot be written: {error.strerror or error}") from None
