"""Placement: which tier each table lives in, decided from sizes alone, before anything is loaded.

    device   on the model's device, looked up by the layer that reads it            costs its bytes there
    pinned   a copy in RAM that the GPU may read itself (CPU: populated RAM)        costs its bytes of RAM
    mapped   the file, in place; the OS's page cache holds what is warm             costs what --host-memory-limit says

"auto" is mapped on CPU, where a copy gains nothing that the page cache does not give. Beside a GPU it is the first tier
with room: the device for tables that take little of it, then pinned, then mapped.
What does not fit is refused with the flag and the value that would. Knows sizes, nothing of files or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import CapacityError, SettingsError

DEVICE_SHARE = (
    16  # beside a GPU, "auto" gives a table at most this fraction of the free device memory: KV needs the rest
)
STEPS = 2  # steps whose pages a host memory limit has to hold: the one that reads, and the one asked for


@dataclass(frozen=True, slots=True)
class TableNeed:
    """`name` is PACK/LAYER. `step_bytes`: bytes of the pages that one step can touch, at most."""

    name: str
    nbytes: int
    step_bytes: int

    @property
    def pack(self) -> str:
        return self.name.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes free for tables. `device` is "cpu" or "cuda"; `host_limit` 0: none."""

    device: str
    device_free: int
    host_free: int
    host_limit: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where one table goes and why."""

    need: TableNeed
    tier: str
    reason: str


def place_tables(needs: Sequence[TableNeed], asked: Sequence[str], room: Room) -> tuple[Place, ...]:
    """A place for every table, in their order. `asked`: the values of --placement, TIER or NAME=TIER.

    Raises SettingsError for a name that no table has, CapacityError for what does not fit.
    """
    wanted = wishes(needs, asked)
    places: list[Place] = []
    on_device = in_ram = 0
    for need in needs:
        tier, origin = wanted[need.name]
        device_left = room.device_free - on_device
        ram_left = (min(room.host_free, room.host_limit) if room.host_limit else room.host_free) - in_ram
        if room.device == "cpu":
            device_left = min(device_left, ram_left)
        reason = f"asked for: {origin}"
        if tier == "auto":
            tier, reason = _choose(need, room, device_left, ram_left)
        if tier == "device":
            _refuse_above(device_left, need, f"on {room.device}", room, in_ram)
            on_device += need.nbytes
        if tier == "pinned":
            _refuse_above(ram_left, need, "in RAM", room, in_ram)
        if tier == "pinned" or (tier == "device" and room.device == "cpu"):
            in_ram += need.nbytes
        places.append(Place(need, tier, reason))
    check_limit([place.need for place in places if place.tier == "mapped"], in_ram, room.host_limit)
    return tuple(places)


def wishes(needs: Sequence[TableNeed], asked: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Table → (tier, the flag that said so). Of several that apply the narrowest counts."""
    packs = {need.pack for need in needs}
    named = dict(spec.rpartition("=")[::2] for spec in asked)
    for name in named:
        if name and name not in packs and name not in {need.name for need in needs}:
            raise SettingsError(
                f"--placement names {name!r}, which is no table; there are {', '.join(need.name for need in needs)}"
            )
    found = {}
    for need in needs:
        keys = (need.name, need.pack, "")
        key = next((key for key in keys if key in named), None)
        tier = "auto" if key is None else named[key]
        found[need.name] = tier, f"--placement {f'{key}=' if key else ''}{tier}"
    return found


def _choose(need: TableNeed, room: Room, device_left: int, ram_left: int) -> tuple[str, str]:
    if room.device == "cpu":
        return "mapped", "beside a CPU the page cache serves as well as a copy"
    if need.nbytes <= device_left // DEVICE_SHARE:
        return "device", f"takes under 1/{DEVICE_SHARE} of the {device_left} bytes free on the device"
    if need.nbytes <= ram_left:
        return "pinned", f"fits into {ram_left} bytes of RAM"
    return "mapped", f"larger than the {ram_left} bytes of RAM it may take"


def _refuse_above(left: int, need: TableNeed, where: str, room: Room, in_ram: int) -> None:
    if need.nbytes <= left:
        return
    cure = f"set --placement {need.name}=mapped"
    if room.host_limit and in_ram + need.nbytes <= room.host_free and where != "on cuda":
        cure += f" or --host-memory-limit {in_ram + need.nbytes}"
    raise CapacityError(
        f"table {need.name} takes {need.nbytes} bytes and {max(left, 0)} are left for it {where}; {cure}"
    )


def check_limit(mapped: Sequence[TableNeed], in_ram: int, limit: int) -> None:
    """Raises CapacityError, with the value that would do, if these tables cannot be read under what the `in_ram` bytes
    of copied ones leave of --host-memory-limit; 0: none."""
    if not limit or not mapped:
        return
    least = minimum(mapped)
    if limit - in_ram < least:
        raise CapacityError(
            f"--host-memory-limit is {limit} bytes; {in_ram} go to copied tables and the pages that {STEPS} steps read "
            f"of mapped ones take up to {least}: set it to {in_ram + least}, or lower --max-num-batched-tokens"
        )


def minimum(mapped: Sequence[TableNeed]) -> int:
    """The least that mapped tables can do with: every page of STEPS steps, or of the whole tables."""
    return sum(min(STEPS * need.step_bytes, need.nbytes) for need in mapped)
