"""Who looks rows up for a decode step, by where they lie."""

from __future__ import annotations

from pathlib import Path

import torch

from server.cache.device_table import DeviceTable
from server.cache.pinned_table import PinnedTable
from server.cache.row_table import RowTable
from server.cache.transport import transport
from tests.cache.files import float_table

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def refuse(address: int, nbytes: int) -> None:
    raise OSError(1, "operation not permitted")


def test_a_gpu_reads_its_own_rows_and_registered_ones_and_no_others(tmp_path: Path) -> None:
    float_table(tmp_path / "t.safetensors", 20, 8)
    mapped = RowTable.open(tmp_path / "t.safetensors")
    registered = PinnedTable(mapped, lambda address, nbytes: None, lambda address: None)
    refused = PinnedTable(mapped, refuse, lambda address: None)
    for table, direct in ((DeviceTable(mapped, CPU), True), (registered, True), (refused, False), (mapped, False)):
        assert transport(table, GPU).direct == direct
    assert str(transport(refused, GPU)) == "staged: the copy is not registered with a GPU"
    assert str(transport(mapped, GPU)).startswith("staged: ")
    assert transport(PinnedTable(mapped), CPU).direct and not transport(mapped, CPU).direct


def test_a_pinned_tables_raw_rows_are_those_it_gathers(tmp_path: Path) -> None:
    rows = float_table(tmp_path / "t.safetensors", 20, 8)
    table = PinnedTable(RowTable.open(tmp_path / "t.safetensors"))
    assert table.raw.view(torch.float32).equal(torch.from_numpy(rows))
