"""`bench memory`: what an attached Engram costs a decode step, and how much of a slow table its prefetch hides.

Four engines over one backbone, each with its own KV cache, take one step each per turn in random order:

    bare       no memory
    fast       the pack's tables as they are: mapped, warm
    slow       every read of a table takes 2 ms more
    slow, off  the same, read when the layer asks for it

The host's bookkeeping (address all layers, queue the fetches) is timed beside it at 32 sequences.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from server.bench.paired import machine, ratio, write_json
from server.bench.text import prompts
from server.cache.prefetcher import Prefetcher
from server.cache.row_table import Ids
from server.cache.row_table import Table as StoredTable
from server.cache.row_types import Bytes
from server.commands.attach import attach
from server.memory.memories import Memories
from server.models.attention.kv_cache import KVCache
from server.models.c_kernels import attention_over
from server.runtime.engine import Engine
from server.runtime.load import Loaded, load, open_packs, prepack_modules
from server.runtime.messages import SamplingParams, Submit
from server.runtime.process import build_engine
from server.settings import DEFAULT_MODEL, Settings

LAYERS = (1, 15)
READ_SECONDS = 0.002
PROMPT_TOKENS = 64
WARM_TURNS = 4


class SlowTable:
    """A table whose every read takes READ_SECONDS more."""

    def __init__(self, table: StoredTable) -> None:
        self._table = table
        self.name, self.rows, self.dim = table.name, table.rows, table.dim
        self.row_type, self.row_bytes, self.nbytes = table.row_type, table.row_bytes, table.nbytes
        self.fault = table.fault

    def gather(self, ids: Ids, out: Bytes) -> None:
        time.sleep(READ_SECONDS)
        self._table.gather(ids, out)

    def page_in(self, ids: Ids) -> int:
        return self._table.page_in(ids)

    def close(self) -> None:
        self._table.close()


def arm(loaded: Loaded, settings: Settings, *, slow: bool = False) -> Engine:
    """An engine over the loaded weights with a KV cache, and memories, of its own."""
    cache = KVCache(loaded.source.config, loaded.kv.blocks, settings.block_size, loaded.dtype, loaded.device)
    packs = open_packs(settings, loaded.source, loaded.dtype, loaded.device)
    for pack in packs:
        prepack_modules(pack, loaded.dtype, loaded.device, loaded.kernels, loaded.rows)
        pack.allocate_conv(loaded.kv.blocks * settings.block_size, loaded.device)
        if slow:
            pack.tables = {layer: SlowTable(table) for layer, table in pack.tables.items()}
    prefetcher = Prefetcher(loaded.dtype, loaded.device, settings.staging, settings.prefetch == "on")
    memories = Memories(packs, prefetcher) if packs else None
    attention = attention_over(loaded.source.config, cache, loaded.kernels)
    return build_engine(settings, replace(loaded, attention=attention, memories=memories))


def start(engine: Engine, pieces: list[tuple[int, ...]], new_tokens: int) -> None:
    """All prompts decoding, each seeing every pack of the engine."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    for i, piece in enumerate(pieces):
        engine.submit(Submit(f"bench-{i}", piece, params, tuple(engine.packs)))
    while engine.scheduler.waiting or any(s.pending > 1 for s in engine.scheduler.running):
        engine.step()


def alternate(arms: dict[str, Engine], turns: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per step of each arm, `turns` of each, the order drawn anew every turn."""
    order, draw = list(arms), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(turns + WARM_TURNS):
        draw.shuffle(order)
        for name in order:
            begun = time.perf_counter()
            arms[name].step()
            if turn >= WARM_TURNS:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def bookkeeping(engine: Engine, pieces: list[tuple[int, ...]], steps: int) -> dict[str, float]:
    """Median µs per step of addressing and of the whole of `begin`, decoding len(pieces) sequences."""
    memories = engine.runner.memories
    assert memories is not None
    spent: dict[str, list[float]] = {"hash_us": [], "begin_us": []}
    pack = memories.packs[0]

    def timed(name: str, function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            begun = time.perf_counter()
            answer = function(*args)
            spent[name].append((time.perf_counter() - begun) * 1e6)
            return answer

        return wrapper

    start(engine, pieces, steps + 8)
    memories.begin = timed("begin_us", memories.begin)  # type: ignore[method-assign]
    pack.address = timed("hash_us", pack.address)  # type: ignore[method-assign]
    for _ in range(steps):
        engine.step()
    return {name: float(np.median(values)) for name, values in spent.items()}


def run(*, model: str = DEFAULT_MODEL, turns: int = 150, json: Path | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its table, writes `json`. Returns what it wrote."""
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        pack = attach(model=model, out=Path(folder) / "pack", layers=LAYERS, rows=20_000, dim=64, heads=8)
        settings = Settings(model=model, max_num_seqs=32, max_model_len=512, memory=(str(pack),))
        loaded = load(settings)
        bare, off = replace(settings, memory=()), replace(settings, prefetch="off")
        arms = {
            "bare": arm(loaded, bare),
            "fast": arm(loaded, settings),
            "slow": arm(loaded, settings, slow=True),
            "slow, off": arm(loaded, off, slow=True),
        }
        pieces = prompts(loaded.source.tokenizer, 32, PROMPT_TOKENS)
        for engine in arms.values():
            start(engine, pieces[:8], turns + WARM_TURNS + 8)
        seconds = alternate(arms, turns)
        result: dict[str, Any] = {
            "experiment": "memory",
            "machine": machine(),
            "model": model,
            "layers": list(LAYERS),
            "rows_per_token": 32,
            "step_ms": {name: float(np.median(values)) * 1e3 for name, values in seconds.items()},
            "ratios": {
                "bare_over_fast": ratio(seconds["bare"], seconds["fast"]).as_json(),
                "slow_over_fast_throughput": ratio(seconds["fast"], seconds["slow"]).as_json(),
                "slow_off_over_fast_throughput": ratio(seconds["fast"], seconds["slow, off"]).as_json(),
            },
            "bookkeeping": bookkeeping(arm(loaded, settings), pieces, 100),
        }
    Console().print(table(result))
    write_json(json, result)
    return result


def table(result: dict[str, Any]) -> Table:
    made = Table(title=f"memory at batch 8, {result['machine']['processor']}")
    made.add_column("figure")
    made.add_column("median", justify="right")
    made.add_column("95 %", justify="right")
    for name, value in result["step_ms"].items():
        made.add_row(f"step, {name}", f"{value:.2f} ms", "")
    for name, pair in result["ratios"].items():
        made.add_row(name.replace("_", " "), f"{pair['median']:.4f}", "{:.4f}–{:.4f}".format(*pair["ci95"]))
    for name, value in result["bookkeeping"].items():
        made.add_row(f"{name.removesuffix('_us')} at 32 sequences", f"{value:.0f} µs", "")
    return made
