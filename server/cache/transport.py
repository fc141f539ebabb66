"""Transport: how a GPU gets a table's rows, told from where they lie. Knows tables and tiers only.

direct   kernels read the rows themselves, in decode steps within a CUDA graph: on the device, or in registered RAM
staged   the host gathers them and a side stream copies them, in decode steps between two parts of the graph: every
         other table, and those of the same pack
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from server.cache.device_table import DeviceTable
from server.cache.pinned_table import PinnedTable
from server.cache.row_table import Table

MAPPED = "a GPU cannot read a mapped file itself"
PLANNED = {
    "device": "decode steps look rows up on the GPU",
    "pinned": "decode steps look rows up on the GPU once its driver registers the copy",
    "mapped": f"rows are staged: {MAPPED}",
}
TOGETHER = "as other tables of its pack are"


class Transport(NamedTuple):
    direct: bool
    reason: str

    def __str__(self) -> str:
        return f"{'direct' if self.direct else 'staged'}: {self.reason}"


def transport(table: Table, device: torch.device) -> Transport:
    """For a model on `device`; on the CPU, whose kernels are torch's operators, RAM needs no registration."""
    if isinstance(table, DeviceTable):
        return Transport(True, "rows lie on the device")
    if not isinstance(table, PinnedTable):
        return Transport(False, MAPPED)
    if table.registered:
        return Transport(True, "the GPU reads registered memory")
    return Transport(device.type == "cpu", "the copy is not registered with a GPU")


def within_pack(tables: Mapping[str, Table], device: torch.device) -> dict[str, Transport]:
    """By name, of all tables of a pack: it is staged as a whole or not at all."""
    own = {name: transport(table, device) for name, table in tables.items()}
    if all(found.direct for found in own.values()):
        return own
    return {name: Transport(False, TOGETHER) if found.direct else found for name, found in own.items()}


def planned(tier: str, tiers: Collection[str]) -> str:
    """Before anything is loaded: of a table in `tier` whose pack has tables in `tiers`."""
    return f"rows are staged, {TOGETHER}" if tier != "mapped" and "mapped" in tiers else PLANNED[tier]
