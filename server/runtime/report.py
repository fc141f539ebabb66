"""The start-up report: what was loaded, where it lies, in bytes, and why. Knows what `load.py` made; loads nothing."""

from __future__ import annotations

import torch

from server.cache.pinned_table import PinnedTable
from server.cache.transport import within_pack
from server.memory.stem import StemPack
from server.models.prepack import can_prepack
from server.models.quantize import FEW
from server.runtime.load import Loaded, stem_layers, weight_bytes
from server.settings import Settings


def mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"


def describe(loaded: Loaded, settings: Settings) -> list[tuple[str, str]]:
    """The start-up report."""
    kv = loaded.kv
    tokens = (kv.blocks - 1) * settings.block_size
    threads = f", {torch.get_num_threads()} threads" if loaded.device.type == "cpu" else ""
    layout = " prepacked for oneDNN" if can_prepack(loaded.dtype, loaded.device) else ""
    if loaded.rows is not None:
        layout += f", and plain rows for steps of up to {loaded.rows.few} tokens (--cpu-weights)"
    few = FEW.get(settings.quantize)
    quantised = f"; {settings.quantize} for steps of up to {few} tokens" if few else ""
    return [
        ("model", f"{loaded.source.name} ({loaded.source.config.architecture}) from {loaded.source.path}"),
        ("device", f"{loaded.device}{threads}"),
        ("dtype", f"{str(loaded.dtype).removeprefix('torch.')}{layout}"),
        *([("kernels", loaded.kernels_note)] if loaded.device.type == "cpu" else []),
        ("weights", mebibytes(weight_bytes(loaded.model)) + quantised),
        (
            "KV cache",
            f"{mebibytes(kv.blocks * kv.block_bytes)} in {kv.blocks:,} blocks of {settings.block_size} tokens "
            f"= {tokens:,} tokens ({kv.reason})",
        ),
        ("context", f"{loaded.max_len:,} tokens, {settings.max_num_seqs} sequences at once"),
        *(loaded.device_path.report() if loaded.device_path is not None else []),
        *describe_memory(loaded, settings),
    ]


def describe_memory(loaded: Loaded, settings: Settings) -> list[tuple[str, str]]:
    if loaded.memories is None:
        return [("memory", "none; attach one with --memory PACK")]
    lines = []
    for pack in loaded.memories.packs:
        rows = sum(table.rows for table in pack.tables.values())
        size = sum(table.nbytes for table in pack.tables.values())
        layers = ", ".join(map(str, pack.config.layer_ids))
        kind = "STEM" if isinstance(pack, StemPack) else "Engram"
        lines.append(
            (
                f"memory {pack.name}",
                f"{kind} at layers {layers}: {rows:,} rows, {mebibytes(size)}; "
                f"{pack.addresser.columns * len(pack.tables)} rows per token; prefetch {settings.prefetch}",
            )
        )
    hot = loaded.memories.prefetcher.hot
    if hot is not None:
        pools = ", ".join(f"{pool.capacity:,} entries of {size:,} bytes" for size, pool in hot.pools.items())
        lines.append(
            ("device cache", f"{mebibytes(hot.nbytes)}: {pools}; {mebibytes(hot.host_bytes)} of tags in host memory")
        )
    lines += describe_places(loaded)
    replaced = stem_layers(loaded.memories.packs)
    if replaced:
        config = loaded.source.config
        size = (
            len(replaced)
            * config.intermediate_size
            * (config.hidden_size + config.features.mlp_bias)
            * loaded.dtype.itemsize
        )
        state = "not loaded" if loaded.model.without_up else "kept by --keep-up-projection"
        lines.append(("up-projections", f"{mebibytes(size)} at {len(replaced)} layers {state}: STEM rows replace them"))
    if loaded.token_budget < settings.max_num_batched_tokens:
        lines.append(("token budget", f"{loaded.token_budget} per step, lowered so that rows fit --staging"))
    return lines


def looked_up(loaded: Loaded) -> dict[str, str]:
    """Table → who looks it up, on a GPU, and why."""
    assert loaded.memories is not None
    path = loaded.device_path
    found: dict[str, str] = {}
    for pack in loaded.memories.packs:
        tables = {table.name: table for table in pack.tables.values()}
        if path is None or path.steps is None:
            found |= dict.fromkeys(tables, "staged: no decode step runs on the device")
        else:
            found |= {name: str(how) for name, how in within_pack(tables, loaded.device).items()}
    return found


def describe_places(loaded: Loaded) -> list[tuple[str, str]]:
    """Where every table went, and why; for copies, how the memory is held; beside a GPU, who looks rows up."""
    assert loaded.memories is not None
    tables = {table.name: table for pack in loaded.memories.packs for table in pack.tables.values()}
    lookups = looked_up(loaded) if loaded.device.type != "cpu" else {}
    lines = []
    if loaded.plan.room.host_limit:
        limit = f"at most {loaded.plan.room.host_limit:,} bytes, copies and resident pages (--host-memory-limit)"
        lines.append(("tables in RAM", limit))
    for found in loaded.plan.places:
        table = tables[found.need.name]
        note = f"; {table.note}" if isinstance(table, PinnedTable) else ""
        how = f"; {lookups[table.name]}" if lookups else ""
        lines.append((f"table {table.name}", f"{found.tier}, {found.need.nbytes:,} bytes ({found.reason}){note}{how}"))
    return lines
