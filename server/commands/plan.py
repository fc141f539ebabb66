"""`plan`: what goes where, in bytes, and why, from headers alone. The plan is the one that `serve` then keeps to."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.cache.transport import planned
from server.memory.attached import AttachedPack
from server.runtime.load import Prepared, prepare, weight_bytes
from server.settings import Settings


def plan(settings: Settings) -> None:
    """Prints the plan. Raises what `serve` would: CapacityError, SettingsError, PackError or ModelError."""
    prepared = prepare(settings)
    made = Table(title=f"{escape(prepared.source.name)} on {prepared.device}", title_justify="left")
    for heading in ("what", "where", "bytes", "why"):
        made.add_column(heading, justify="right" if heading == "bytes" else "left", overflow="fold")
    for what, where, nbytes, why in lines(prepared, settings):
        made.add_row(escape(what), where, f"{nbytes:,}", escape(why))
    Console().print(made)
    for pack in prepared.packs:
        for table in pack.tables.values():
            table.close()


def lines(prepared: Prepared, settings: Settings) -> list[tuple[str, str, int, str]]:
    """(what, where, bytes, why) of everything that takes memory, and what is free."""
    plan, device = prepared.plan, str(prepared.device)
    dtype = str(prepared.dtype).removeprefix("torch.")
    found = [
        ("weights", device, plan.weights, dtype),
        ("KV cache", device, plan.kv.nbytes, f"{plan.kv.blocks:,} blocks: {plan.kv.reason}"),
    ]
    for pack in prepared.packs:
        if isinstance(pack, AttachedPack):
            nbytes = sum(weight_bytes(module) for module in pack.modules.values())
            found.append((f"layers of {pack.name}", device, nbytes, "beside the weights"))
    if plan.places:
        found.append(("staging", device, plan.staging, f"--staging; {plan.token_budget} tokens a step"))
    if plan.places and settings.device_cache:
        found.append(("hot rows", device, settings.device_cache, "--device-cache"))
    for place in plan.places:
        tiers = {other.tier for other in plan.places if other.need.pack == place.need.pack}
        how = f"; {planned(place.tier, tiers)}" if device != "cpu" else ""
        found.append((f"table {place.need.name}", place.tier, place.need.nbytes, place.reason + how))
    if plan.room.host_limit:
        found.append(("most that tables may hold", "RAM", plan.room.host_limit, "--host-memory-limit"))
    if device != "cpu":
        found.append(("left", device, plan.room.device_free - plan.copied("device"), "after all of this"))
    found.append(("left", "RAM", plan.room.host_free - plan.in_ram, "for the page cache of mapped tables"))
    return found
