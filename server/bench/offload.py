"""`bench offload`: what it costs to keep a table in host memory instead of on the device, and to have one at all.

    none       the backbone alone
    resident   every row on the device: looked up by the layer that reads it
    offload    rows in a mapped file, fetched ahead, as the server does by itself
    cached     the same, with hot rows on the device

One process, one backbone, a KV cache per arm. All arms take one step each per turn, in random order, over the same
forced tokens of real text: the token is sampled, then replaced by the text's. Two groups of arms: an Engram memory of
10B parameters (int8, sparse, its pages in the page cache as in a server that has run for a while), and a second
backbone without some up-projections for STEM, alone and with the Engram.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from server.bench.arms import PROMPT_TOKENS, ROUND, Arm, Text, alternate, build_arm, close, device_tables, pieces_of
from server.bench.paired import machine, middle_half, ratio, write_json
from server.bench.sparse_packs import sparse_engram, sparse_stem, stem_layers
from server.cache.prefetcher import Fetch, Lookup
from server.cache.tally import Tally
from server.models.attention.kv_cache import kv_bytes_per_token
from server.models.source import open_source
from server.runtime.host import available_memory, cpu_quota
from server.runtime.load import choose_device, choose_dtype, load
from server.settings import DEFAULT_MODEL, GIB, MIB, Settings

CONCURRENCY = (1, 8, 32)
PARAMETERS = 10_000_000_000
ROW_OVERHEAD = 80 / 64  # bytes per parameter of a packed int8 row of 64 values
SPARE = 5 * GIB  # left to KV caches, weights, page cache and others beside the resident table
# Of measuring at each concurrency: longer where single steps scatter more. With STEM besides within 15 minutes.
SECONDS, STEM_SHARE = {1: 60.0, 8: 110.0, 32: 340.0}, 0.3
CACHE = 64 * MIB


def memory_figures(arm: Arm, sequences: int) -> dict[str, float]:
    """What the arm's tables did in the steps measured; seconds as shares, rows and bytes per token."""
    stall, fetch, rows, hits, read = (
        sum(getattr(after, name) - getattr(before, name) for before, after in arm.counted)
        for name in ("stall_s", "fetch_s", "rows", "device_hits", "bytes")
    )
    tokens = len(arm.seconds) * sequences
    return {
        "stall_share": stall / sum(arm.seconds),
        "overlap": 1 - stall / fetch if fetch else 1.0,
        "fetch_ms_per_step": fetch / len(arm.seconds) * 1e3,
        "hit_rate": hits / rows if rows else 0.0,
        "bytes_per_token": read / tokens,
    }


def counting_share(arm: Arm, sequences: int) -> float:
    """The share of a median step that counting takes: two fetches added up, and the step's statistics put together."""
    engine, repeats = arm.engine, 500
    memories = engine.runner.memories
    assert memories is not None
    pack, tokens = memories.packs[0], np.zeros((sequences, memories.window), np.int64)
    addresses = pack.address(tokens, np.zeros_like(tokens, bool))
    fetches = [
        Fetch(
            memories.prefetcher, Lookup(pack.tables[layer], layer, rows, keys, orders=pack.addresser.orders), 0, 0, 0.0
        )
        for layer, (rows, keys) in addresses.items()
    ]
    tally = Tally("", 0, 0, pack.addresser.orders)
    begun = time.perf_counter()
    for _ in range(repeats):
        for fetch in fetches:
            tally.add(fetch, 0.0)
        engine.stats()
    return (time.perf_counter() - begun) / repeats / float(np.median(arm.seconds))


def measure(
    arms: Mapping[str, Arm], pairs: Sequence[tuple[str, str]], pieces: Sequence[Text], seconds: Mapping[int, float]
) -> dict[str, Any]:
    """At each concurrency for so many seconds, the arms in turn; their ratios (a, b): throughput of a over b."""
    found: dict[str, Any] = {"ratios": {f"{a}_over_{b}": {"throughput": {}} for a, b in pairs}}
    found |= {"step_ms": {}, "memory": {}}
    for count in CONCURRENCY:
        alternate(arms, pieces, count, seconds[count])
        for a, b in pairs:
            times = arms[b].seconds, arms[a].seconds
            measured = {**ratio(*times).as_json(), "middle_half": middle_half(*times)}
            found["ratios"][f"{a}_over_{b}"]["throughput"][str(count)] = measured
        found["step_ms"][str(count)] = {name: float(np.median(arm.seconds)) * 1e3 for name, arm in arms.items()}
        found["memory"][str(count)] = {name: memory_figures(arm, count) for name, arm in arms.items() if arm.counted}
    return found


def resident_parameters(wanted: int) -> int:
    """As many parameters as fit into free memory with room to spare."""
    free = available_memory() - SPARE
    return min(wanted, max(int(free / ROW_OVERHEAD), 1_000_000))


def run(
    *, model: str = DEFAULT_MODEL, parameters: int = PARAMETERS, seconds: float | None = None, json: Path | None = None
) -> dict[str, Any]:
    """Runs the experiment, prints its tables, writes `json`. Returns what it wrote. `seconds` per concurrency; None:
    what makes the interval narrow."""
    spans = {count: SECONDS[count] if seconds is None else seconds for count in CONCURRENCY}
    console = Console()
    torch.set_num_threads(cpu_quota())
    bare = settings_for(model)
    loaded = load(bare)
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        count = loaded.source.config.num_layers
        layers, middle = (1, count // 2), stem_layers(loaded.source)
        engram = sparse_engram(loaded.source, Path(folder) / "engram", layers, parameters)
        held = resident_parameters(parameters)
        resident = engram
        if held < parameters:
            console.print(
                f"free memory holds {held / 1e9:.1f} of {parameters / 1e9:.1f}B parameters: resident is smaller"
            )
            resident = sparse_engram(loaded.source, Path(folder) / "resident", layers, held)
        stem = sparse_stem(loaded.source, Path(folder) / "stem", middle)
        mapped, in_memory = f"engram={engram}", f"engram={resident}"
        pieces = pieces_of(loaded.source.tokenizer, 8 * max(CONCURRENCY), bare.max_model_len)
        console.print("[dim]copying the resident table …[/dim]")
        arms = {
            "none": build_arm(loaded, bare, "mapped"),
            "resident": build_arm(loaded, replace(bare, memory=(in_memory,)), "device"),
            "offload": build_arm(loaded, replace(bare, memory=(mapped,)), "mapped"),
            "cached": build_arm(loaded, replace(bare, memory=(mapped,), device_cache=CACHE), "mapped"),
        }
        console.print(f"[dim]{', '.join(arms)}: {said(spans)} …[/dim]")
        pairs = [("offload", "resident"), ("offload", "none"), ("resident", "none"), ("cached", "resident")]
        result: dict[str, Any] = {
            "experiment": "offload",
            "machine": machine(),
            "model": model,
            "parameters": parameters,
            "resident_parameters": held,
            "table_bytes": int(parameters * ROW_OVERHEAD),
            "layers": list(layers),
            "rows_per_token": 32,
            "device_cache": CACHE,
            **measure(arms, pairs, pieces, spans),
            "counting_share_of_step": counting_share(arms["offload"], max(CONCURRENCY)),
        }
        tables = device_tables(arms["resident"])
        close(arms.pop("offload"), arms.pop("cached"))
        stem_loaded = load(replace(bare, memory=(f"stem={stem}",)))
        both = replace(bare, memory=(f"stem={stem}", mapped)), replace(bare, memory=(f"stem={stem}", in_memory))
        only = replace(bare, memory=(f"stem={stem}",))
        stems = {
            "none": arms["none"],
            "stem resident": build_arm(stem_loaded, only, "device"),
            "stem offload": build_arm(stem_loaded, only, "mapped"),
            "engram+stem offload": build_arm(stem_loaded, both[0], "mapped"),
            "engram+stem resident": build_arm(stem_loaded, both[1], "device", tables),
        }
        short = {count: STEM_SHARE * span for count, span in spans.items()}
        console.print(f"[dim]{', '.join(stems)}: {said(short)} …[/dim]")
        pairs = [(f"{kind} offload", f"{kind} resident") for kind in ("stem", "engram+stem")]
        pairs += [(f"{kind} offload", "none") for kind in ("stem", "engram+stem")]
        result["stem"] = {"layers": list(middle), **measure(stems, pairs, pieces, short)}
        close(arms["resident"], *stems.values())
    for found, title in ((result, "an Engram memory"), (result["stem"], "STEM memories")):
        console.print(table_of(found, f"{title}, {result['machine']['processor']}"))
    console.print(f"counting takes {result['counting_share_of_step']:.2%} of a step")
    write_json(json, result)
    return result


def said(spans: Mapping[int, float]) -> str:
    return ", ".join(f"{seconds:.0f} s at {count}" for count, seconds in spans.items()) + " sequences"


def settings_for(model: str) -> Settings:
    """Room for the most sequences of one round's length, and no more: every arm has a KV cache of its own."""
    length = PROMPT_TOKENS + ROUND + 2
    settings = Settings(model=model, max_num_seqs=max(CONCURRENCY), max_model_len=length, kv_bytes=MIB)
    source = open_source(model)
    token = kv_bytes_per_token(source.config, choose_dtype(settings, source, choose_device(settings)))
    blocks = max(CONCURRENCY) * (-(-length // settings.block_size) + 1) + 1
    return replace(settings, kv_bytes=blocks * settings.block_size * token)


def table_of(found: Mapping[str, Any], title: str) -> Table:
    made = Table(title=title)
    for column in ("sequences", *(name.replace("_", " ") for name in found["ratios"])):
        made.add_column(column, justify="right")
    for count in map(str, CONCURRENCY):
        pairs = [pair["throughput"][count]["middle_half"] for pair in found["ratios"].values()]
        made.add_row(count, *("{:.4f}\n{:.4f}–{:.4f}".format(pair["mean"], *pair["ci95"]) for pair in pairs))
    lines = []
    for count, memory in found["memory"].items():
        for name, figures in memory.items():
            stall, overlap, hits = figures["stall_share"], figures["overlap"], figures["hit_rate"]
            lines.append(f"{name} at {count}: stall {stall:.2%}, hidden {overlap:.1%}, hits {hits:.0%}")
    made.caption = "\n".join(lines)
    return made
