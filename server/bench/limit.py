"""`bench limit`: a memory four times as large as the RAM it may hold, under load, beside the same memory all in RAM.

The memories: an Engram of gigabytes, STEM rows for four layers, and both on one model. For each, two engines over the
same weights and the same table files take one step each per turn, in random order, on the same requests:

    limited    mapped, --host-memory-limit a quarter of the tables' bytes
    resident   the tables copied to the device

Prompts of real text come one after another, so that most steps read rows nobody read before: the limit is under
pressure all the time. Every turn both must have sampled the same tokens; between turns rows are compared byte for
byte, and mincore counts what of the files is in memory.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from server.bench.big_pack import memories_on_disk, tables_of
from server.bench.page_cache import resident_pages
from server.bench.paired import machine, ratio, write_json
from server.bench.text import prompts
from server.cache.row_table import Table as StoredTable
from server.cache.table_files import PAGE
from server.runtime.engine import Engine
from server.runtime.load import load
from server.runtime.messages import SamplingParams, Submit
from server.runtime.process import build_engine
from server.settings import DEFAULT_MODEL, Settings

LAYERS = (1, 15)
TABLE_BYTES = 2_150_000_000
BUDGET = 512  # tokens a step
SHARE = 4  # table bytes over the limit
SEQUENCES, PROMPT_TOKENS, NEW_TOKENS, PIECES = 8, 256, 16, 300
LOOK_TURNS, CHECKED_ROWS = 4, 500
SECONDS = {"engram": 1.0, "stem": 0.4, "engram+stem": 0.5}  # shares of the time asked for


def run(
    *,
    model: str = DEFAULT_MODEL,
    seconds: int = 240,
    table_bytes: int = TABLE_BYTES,
    folder: Path | None = None,
    keep: bool = False,
    json: Path | None = None,
) -> dict[str, Any]:
    """Runs the experiment, prints its table, writes `json`. Returns what it wrote."""
    with memories_on_disk(model, LAYERS, table_bytes, folder, keep) as memories:
        found = {name: under_limit(model, memory, SECONDS[name] * seconds) for name, memory in memories.items()}
    result = {
        "experiment": "limit",
        "machine": machine(),
        "model": model,
        "layers": list(LAYERS),
        **found.pop("engram"),
        "arms": found,
    }
    Console().print(table(result))
    write_json(json, result)
    return result


def under_limit(model: str, memory: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Both engines over these packs for so many seconds: what is measured, with the bytes of tables and limit."""
    base = Settings(model=model, memory=memory, max_num_seqs=SEQUENCES, max_model_len=512, kv_bytes=256 << 20)
    base = replace(base, prefix_cache="off", max_num_batched_tokens=BUDGET)
    resident = load(replace(base, placement=("device",)))
    total = resident.plan.copied("device")
    limit = total // SHARE
    limited = load(replace(base, host_memory_limit=limit))
    engines = {"resident": build_engine(base, resident), "limited": build_engine(base, limited)}
    pieces = prompts(resident.source.tokenizer, PIECES, PROMPT_TOKENS)
    found = {"table_bytes": total, "limit_bytes": limit, **measure(engines, pieces, seconds)}
    for loaded in (limited, resident):
        assert loaded.memories is not None
        loaded.memories.close()
    return found


def measure(arms: dict[str, Engine], pieces: list[tuple[int, ...]], seconds: float) -> dict[str, Any]:
    """Steps both engines in turns until the time is over."""
    draw, generator = random.Random(0), np.random.default_rng(0)
    steps: dict[str, list[float]] = {name: [] for name in arms}
    paths = [file.path for table in tables_of(arms["limited"]) for file in getattr(table, "files", ())]
    resident, tokens, checked, wrong, submitted = [], 0, 0, 0, 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(steps["limited"]) < 2 * LOOK_TURNS:
        while len(arms["limited"].scheduler.sequences()) < SEQUENCES:
            for engine in arms.values():
                submit(engine, submitted, pieces[submitted % len(pieces)])
            submitted += 1
        sampled = {}
        for name in draw.sample(list(arms), len(arms)):
            before = time.perf_counter()
            outputs = arms[name].step().outputs
            steps[name].append(time.perf_counter() - before)
            sampled[name] = [(output.request_id, output.token_ids) for output in outputs]
        tokens += len(sampled["limited"])
        wrong += sampled["limited"] != sampled["resident"]
        if len(steps["limited"]) % LOOK_TURNS == 0:
            for one, other in zip(tables_of(arms["limited"]), tables_of(arms["resident"]), strict=True):
                wrong += not same_rows(one, other, generator)
                checked += CHECKED_ROWS
            resident.append(sum(resident_pages(path) for path in paths) * PAGE)
    memories = arms["limited"].runner.memories
    assert memories is not None and memories.residency is not None
    half = resident[len(resident) // 2 :]
    return {
        "seconds": time.perf_counter() - begun,
        "turns": len(steps["limited"]),
        "prompts": submitted,
        "tokens_sampled": tokens,
        "rows_compared": checked,
        "turns_or_checks_that_differed": wrong,
        "pages_dropped": memories.residency.dropped_pages,
        "waits_for_room": memories.residency.waits,
        "resident_bytes": {
            "most": max(resident),
            "second_half_least": min(half),
            "second_half_most": max(half),
            "samples": resident,
        },
        "step_ms": {name: float(np.median(values)) * 1e3 for name, values in steps.items()},
        "ratios": {"limited_over_resident_throughput": ratio(steps["resident"], steps["limited"]).as_json()},
        "total_seconds_ratio": sum(steps["resident"]) / sum(steps["limited"]),
    }


def submit(engine: Engine, number: int, prompt: tuple[int, ...]) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    engine.submit(Submit(f"limit-{number}", prompt, params, tuple(engine.packs)))


def same_rows(one: StoredTable, other: StoredTable, generator: np.random.Generator) -> bool:
    """Whether random rows are the same in both, byte for byte."""
    ids = generator.integers(0, one.rows, CHECKED_ROWS)
    raws = [np.empty((len(ids), table.row_bytes), np.uint8) for table in (one, other)]
    one.gather(ids, raws[0])
    other.gather(ids, raws[1])
    return np.array_equal(raws[0], raws[1])


def table(result: dict[str, Any]) -> Table:
    made = Table(title=f"tables {SHARE} times their limit, {result['machine']['processor']}")
    made.add_column("figure")
    arms = {"engram": result, **result["arms"]}
    for name in arms:
        made.add_column(name, justify="right")
    columns = [lines(arm) for arm in arms.values()]
    for figure in columns[0]:
        made.add_row(figure, *(column[figure] for column in columns))
    return made


def lines(found: dict[str, Any]) -> dict[str, str]:
    """One memory's figures, as the table shows them."""
    bytes_of, pair = found["resident_bytes"], found["ratios"]["limited_over_resident_throughput"]
    return {
        "tables, bytes": f"{found['table_bytes']:,}",
        "limit, bytes": f"{found['limit_bytes']:,}",
        "most resident, bytes": f"{bytes_of['most']:,}",
        "resident in the second half": f"{bytes_of['second_half_least']:,} to {bytes_of['second_half_most']:,}",
        "pages dropped": f"{found['pages_dropped']:,}",
        "waits for room": f"{found['waits_for_room']:,}",
        "turns, rows compared": f"{found['turns']:,}, {found['rows_compared']:,}",
        "that differed": f"{found['turns_or_checks_that_differed']:,}",
        **{f"step, {name}": f"{value:.1f} ms" for name, value in found["step_ms"].items()},
        "throughput, limited over resident": "{:.3f} ({:.3f} to {:.3f})".format(pair["median"], *pair["ci95"]),
        "the same over all steps": f"{found['total_seconds_ratio']:.3f}",
    }
