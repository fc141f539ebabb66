"""Arms of the experiments with a memory: where its rows lie, and who fetches them.

none        the backbone alone
direct      rows in registered host memory, read by the step's own kernels; with a cache of so many GiB or without
staged      the same rows gathered by the host and sent ahead of the layer, in a graph that is cut before it
resident    the same rows in device memory
stem        Engram early, STEM in the middle and late layers, both direct; the backbone without those up-projections
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from server.bench.gpu.models import dtype_of
from server.bench.gpu.scene import DeviceArm, Scene
from server.bench.gpu.turns import Turns
from server.bench.gpu.warm import warm
from server.cache.device_table import DeviceTable
from server.cache.hot_rows import HotRows
from server.cache.hot_sources import Source
from server.cache.pinned_table import PinnedTable
from server.cache.prefetcher import Prefetcher
from server.cache.row_table import RowTable
from server.cache.row_types import Bytes
from server.errors import CapacityError
from server.memory.attached import AttachedPack
from server.memory.device_memory import DeviceMemory
from server.memory.memories import Memories
from server.memory.stem import StemPack
from server.models.decoder import Decoder
from server.view import BARE, MemoryView

STAGING = 256 << 20
Pack = AttachedPack | StemPack


@dataclass(slots=True)
class Memory:
    """The packs of one arm, opened over the scene's token slots."""

    memories: Memories
    view: MemoryView

    @classmethod
    def of(cls, packs: Sequence[Pack], scene: Scene, cache_bytes: int = 0) -> Memory:
        """Raises CapacityError where the device has no room for the cache. Slots for convolution inputs that a pack has
        already are kept: arms may share them, as each step writes before it reads."""
        for pack in packs:
            if isinstance(pack, AttachedPack) and not pack.conv_slots:
                pack.allocate_conv(scene.num_slots, scene.device)
        sources = [
            Source(table, layer, pack.addresser.orders, pack.addresser.heads)
            for pack in packs
            for layer, table in pack.tables.items()
            if not isinstance(table, DeviceTable)
        ]
        hot = None
        if cache_bytes:
            try:
                hot = HotRows(cache_bytes, sources, scene.device)
            except torch.cuda.OutOfMemoryError as error:
                free = torch.cuda.mem_get_info(scene.device)[0]
                raise CapacityError(
                    f"a cache of {cache_bytes / (1 << 30):g} GiB does not fit beside the model; "
                    f"{free / (1 << 30):.1f} GiB are free: leave its arm out of ARMS, or lower SEQUENCES"
                ) from error
            for pack in packs:
                if isinstance(pack, AttachedPack):
                    warm(hot, pack, scene.trace, scene.languages, scene.config.vocab_size)
        prefetcher = Prefetcher(dtype_of(scene.config, scene.device), scene.device, STAGING, True, hot)
        return cls(Memories(packs, prefetcher), MemoryView(packs=tuple(pack.id for pack in packs)))

    def close(self) -> None:
        """Ends its threads; tables are shared between arms and stay open."""
        self.memories.prefetcher.close()


def bare_arm(scene: Scene, model: Decoder, buckets: Sequence[int] = ()) -> Turns:
    return Turns(DeviceArm(scene, model, None, [BARE] * len(scene.lengths), 1, buckets))


def direct_arm(
    scene: Scene, model: Decoder, memory: Memory, buckets: Sequence[int] = (), *, direct: bool = True
) -> Turns:
    """Also of tables on the device. `direct` False: the host brings all rows."""
    count = len(scene.lengths)
    device_memory = DeviceMemory(memory.memories, count, direct=direct)
    views = [memory.view] * count
    if not device_memory.serves(views):
        raise CapacityError(f"the rows of {', '.join(memory.view.names)} cannot be read")
    if direct and device_memory.staged.packs:
        raise CapacityError(f"the device cannot read the rows of {', '.join(memory.view.names)} by itself")
    arm = DeviceArm(scene, model, device_memory, views, memory.memories.window, buckets)
    return Turns(arm, memory.memories.counters)


def staged_arm(scene: Scene, model: Decoder, memory: Memory) -> Turns:
    """The same step, cut before each layer that reads rows."""
    return direct_arm(scene, model, memory, direct=False)


class Copied:
    """A pinned table as the file that a device table is copied from."""

    def __init__(self, table: PinnedTable) -> None:
        self.name, self.rows, self.dim, self.row_type = table.name, table.rows, table.dim, table.row_type
        self.row_bytes, self.nbytes = table.row_bytes, table.nbytes
        self._rows: Bytes = table.raw.numpy()

    def read_run(self, first: int, out: Bytes) -> None:
        out[:] = self._rows[first : first + len(out)]

    def check(self) -> None:
        """It cannot change."""

    def forget(self) -> None:
        """It is no file."""


def on_device(pack: AttachedPack, device: torch.device) -> dict[int, DeviceTable]:
    """The pack's tables in device memory."""
    found = {}
    for layer, table in pack.tables.items():
        assert isinstance(table, PinnedTable)
        found[layer] = DeviceTable(cast(RowTable, Copied(table)), device)
    return found


def released(device: torch.device) -> None:
    """After an arm is dropped: what it held is free for the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
