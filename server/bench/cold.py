"""`bench cold`: what the first answer after a cold start waits for, beside what the disk can do.

Three memories: an Engram with two tables of more than 4 GB each, STEM rows for four layers, and both on one model,
every byte written. Before each cold measurement their pages are dropped, and mincore says that they are gone. Every
round takes, in turns and in random order:

    cold     time to the first token of a 2,048-token prompt, no page in memory
    warm     the same prompt again, its pages there, prefix cache off
    unasked  cold, and no page asked for ahead
    page in  all pages of that prompt's rows asked for at once, until each was read
    demand   the same pages read row by row, as they come, by the one thread that gathers
    disk     random 4 KiB reads of other pages at the best of the swept settings

added = cold − warm. The sweep over threads and depths comes first, on the same file. Before all that, whole loads in
turns: with a mapped table of 100 GB, full of holes, and with one of 1 GB.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from server.bench.big_pack import STRIDE, memories_on_disk, tables_of
from server.bench.disk import rate, sweep
from server.bench.page_cache import drop, resident_pages
from server.bench.paired import machine, ratio, write_json
from server.bench.sparse_packs import DIM, sparse_engram
from server.bench.text import prompts
from server.cache.row_table import RowTable
from server.cache.row_types import Ids
from server.memory.addressing import windows_of
from server.models.source import open_source
from server.runtime.engine import Engine
from server.runtime.load import load
from server.runtime.messages import SamplingParams, Submit
from server.runtime.process import build_engine
from server.settings import DEFAULT_MODEL, Settings, cache_folder

LAYERS = (1, 15)
TABLE_BYTES = 4_300_000_000
PROMPT_TOKENS = 2048
PIECE_ROWS = 8192
SWEEPS = 3
START_BYTES, STARTS = (10**9, 10**11), 5
ENOUGH_SECONDS = {"engram": 240, "stem": 60, "engram+stem": 150}  # of rounds
ONE = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


def run(
    *,
    model: str = DEFAULT_MODEL,
    rounds: int = 5,
    table_bytes: int = TABLE_BYTES,
    folder: Path | None = None,
    keep: bool = False,
    json: Path | None = None,
) -> dict[str, Any]:
    """Runs the experiment, prints its table, writes `json`. Returns what it wrote."""
    start = starts(model, folder)
    points: list[dict[str, Any]] = []
    arms: dict[str, Any] = {}
    with memories_on_disk(model, LAYERS, table_bytes, folder, keep) as memories:
        for name, memory in memories.items():
            with cold_engine(model, memory) as engine:
                pieces = prompts(open_source(model).tokenizer, rounds + 1, PROMPT_TOKENS)
                first_token(engine, pieces[-1])  # everything but the pages is warm from here on
                points = points or sweep_disk(mapped(engine))
                found = all_rounds(engine, pieces[:-1], best(points), ENOUGH_SECONDS[name])
                arms[name] = {
                    "table_bytes": [table.nbytes for table in tables_of(engine)],
                    **measured(found, points),
                }
    result = {
        "experiment": "cold",
        "machine": machine(),
        "model": model,
        "layers": list(LAYERS),
        "prompt_tokens": PROMPT_TOKENS,
        "start": start,
        "disk": points,
        **arms.pop("engram"),
        "arms": arms,
    }
    Console().print(table(result))
    write_json(json, result)
    return result


def starts(model: str, folder: Path | None) -> dict[str, Any]:
    """Seconds of whole loads with the small and the large sparse table, mapped, and their paired ratio."""
    parent = folder or cache_folder()
    parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[int, list[float]] = {nbytes: [] for nbytes in START_BYTES}
    with tempfile.TemporaryDirectory(prefix=".start-", dir=parent) as made:
        source = open_source(model)
        packs = {
            nbytes: sparse_engram(source, Path(made) / str(nbytes), LAYERS[:1], nbytes * DIM // STRIDE)
            for nbytes in START_BYTES
        }
        for turn in range(-1, STARTS):  # the first of each reads the weights from the disk
            for nbytes in START_BYTES[:: 1 if turn % 2 else -1]:
                begun = time.perf_counter()
                loaded = load(Settings(model=model, memory=(str(packs[nbytes]),), kv_bytes=64 << 20, max_model_len=512))
                if turn >= 0:
                    seconds[nbytes].append(time.perf_counter() - begun)
                assert loaded.memories is not None
                loaded.memories.close()
    small, large = START_BYTES
    return {
        "table_bytes": list(START_BYTES),
        "seconds": list(seconds.values()),
        "large_over_small": ratio(seconds[large], seconds[small]).as_json(),
    }


@contextmanager
def cold_engine(model: str, memory: tuple[str, ...]) -> Iterator[Engine]:
    settings = Settings(
        model=model,
        memory=memory,
        max_num_seqs=4,
        max_model_len=PROMPT_TOKENS + 64,
        prefix_cache="off",
        kv_bytes=512 << 20,
    )
    loaded = load(settings)
    try:
        yield build_engine(settings, loaded)
    finally:
        assert loaded.memories is not None
        loaded.memories.close()


def mapped(engine: Engine) -> list[RowTable]:
    return [table for table in tables_of(engine) if isinstance(table, RowTable)]


def sweep_disk(tables: list[RowTable]) -> list[dict[str, Any]]:
    """The sweep, each setting's best of several."""
    points = [sweep(tables[0].files[0].path, seed) for seed in range(SWEEPS)]
    return [{**same[0], "per_s": max(point["per_s"] for point in same)} for same in zip(*points, strict=True)]


def best(points: list[dict[str, Any]]) -> dict[str, Any]:
    return max(points, key=lambda point: float(point["per_s"]))


def first_token(engine: Engine, prompt: tuple[int, ...]) -> float:
    """Seconds from submitting the prompt to its first token."""
    begun = time.perf_counter()
    engine.submit(Submit(f"cold-{begun}", prompt, ONE, tuple(engine.packs)))
    while not engine.step().outputs:
        pass
    return time.perf_counter() - begun


def all_rounds(
    engine: Engine, pieces: list[tuple[int, ...]], setting: dict[str, Any], seconds: float
) -> list[dict[str, float]]:
    """One round for every prompt; fewer, but one at least, on a machine too busy for all of them."""
    begun, found = time.perf_counter(), []
    for number, piece in enumerate(pieces):
        found.append(one_round(engine, piece, setting, number))
        if time.perf_counter() - begun > seconds:
            break
    return found


def stalled(engine: Engine) -> float:
    """Seconds that layers have waited for rows so far."""
    return sum(counters.stall_s for counters in engine.stats().memory)


def one_round(engine: Engine, prompt: tuple[int, ...], setting: dict[str, Any], seed: int) -> dict[str, float]:
    """One measurement of every arm, in random order."""
    tables, found = mapped(engine), {}
    ids = rows_of(engine, prompt)
    generator = np.random.default_rng(seed)
    arms = ["cold", "unasked", "page_in", "demand", "disk"]
    random.Random(seed).shuffle(arms)
    ask = engine.runner.page_in
    for arm in arms:
        drop(tables)
        match arm:
            case "cold":
                for heat in ("cold", "warm"):
                    before = stalled(engine)
                    found[f"{heat}_s"] = first_token(engine, prompt)
                    found[f"{heat}_stall_s"] = stalled(engine) - before
            case "unasked":
                engine.runner.page_in = lambda sequence: None  # type: ignore[method-assign]
                found["unasked_s"] = first_token(engine, prompt)
                engine.runner.page_in = ask  # type: ignore[method-assign]
            case "page_in":
                found |= page_in(tables, ids)
            case "demand":
                found["demand_s"] = demand(tables, ids)
            case "disk":
                path = tables[0].files[0].path
                found["disk_per_s"] = rate(path, setting["threads"], setting["depth"], generator)
    return found


def rows_of(engine: Engine, prompt: tuple[int, ...]) -> list[Ids]:
    """The row ids of the prompt in every table, in the order of its tokens."""
    memories = engine.runner.memories
    assert memories is not None
    windows, blocked = windows_of(prompt, memories.window)
    return [rows.reshape(-1) for pack in memories.packs for rows, _ in pack.address(windows, blocked).values()]


def page_in(tables: list[RowTable], ids: list[Ids]) -> dict[str, float]:
    """Asks for all pages at once and waits until each is there; how many were wanted, and how many the OS read."""
    before = sum(resident_pages(file.path) for table in tables for file in table.files)
    begun = time.perf_counter()
    pages = sum(table.page_in(rows) for table, rows in zip(tables, ids, strict=True))
    read(tables, ids)
    seconds = time.perf_counter() - begun
    after = sum(resident_pages(file.path) for table in tables for file in table.files)
    return {"page_in_s": seconds, "pages": pages, "pages_read": after - before}


def demand(tables: list[RowTable], ids: list[Ids]) -> float:
    """As `read`, each page read when its row is: what tables do by themselves after a slow gather is switched off."""
    for one in tables:
        one.page_in = lambda ids: 0  # type: ignore[method-assign]
    seconds = read(tables, ids)
    for one in tables:
        del one.page_in
    return seconds


def read(tables: list[RowTable], ids: list[Ids]) -> float:
    """Seconds to gather the rows, in pieces as large as those of a step."""
    begun = time.perf_counter()
    for table, rows in zip(tables, ids, strict=True):
        for at in range(0, len(rows), PIECE_ROWS):
            piece = rows[at : at + PIECE_ROWS]
            table.gather(piece, np.empty((len(piece), table.row_bytes), np.uint8))
    return time.perf_counter() - begun


def measured(rounds: list[dict[str, float]], points: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios that the bars are about, each taken within its round."""

    def median(value: Any) -> float:
        return float(np.median([value(found) for found in rounds]))

    return {
        "rounds": rounds,
        "best_disk_setting": best(points),
        "median": {
            "cold_ttft_s": median(lambda r: r["cold_s"]),
            "warm_ttft_s": median(lambda r: r["warm_s"]),
            "unasked_ttft_s": median(lambda r: r["unasked_s"]),
            "cold_stall_s": median(lambda r: r["cold_stall_s"]),
            "warm_stall_s": median(lambda r: r["warm_stall_s"]),
            "added_s": median(lambda r: r["cold_s"] - r["warm_s"]),
            "page_in_s": median(lambda r: r["page_in_s"]),
            "page_in_per_s": median(lambda r: r["pages"] / r["page_in_s"]),
            "demand_per_s": median(lambda r: r["pages"] / r["demand_s"]),
            "disk_per_s": median(lambda r: r["disk_per_s"]),
        },
        "ratios": {
            "page_in_over_disk": median(lambda r: r["pages"] / r["page_in_s"] / r["disk_per_s"]),
            "page_in_over_demand": median(lambda r: r["demand_s"] / r["page_in_s"]),
            "pages_read_over_distinct": median(lambda r: r["pages_read"] / r["pages"]),
            "added_over_page_in": median(lambda r: (r["cold_s"] - r["warm_s"]) / r["page_in_s"]),
        },
    }


def table(result: dict[str, Any]) -> Table:
    made = Table(title=f"cold start of a {result['prompt_tokens']}-token prompt, {result['machine']['processor']}")
    made.add_column("median")
    arms = [result, *result["arms"].values()]
    for name in ("engram", *result["arms"]):
        made.add_column(name, justify="right")
    for kind in ("median", "ratios"):
        for name in result[kind]:
            seconds = name.endswith("_s") and not name.endswith("per_s")
            values = [arm[kind][name] for arm in arms]
            shown = [f"{value * 1e3:,.0f} ms" if seconds else f"{value:,.2f}" for value in values]
            made.add_row(name.replace("_", " "), *shown)
    setting = result["best_disk_setting"]
    start = result["start"]["large_over_small"]["median"]
    made.add_row("start with 100 GB over 1 GB", f"{start:.3f}")
    made.add_row("best disk setting", f"{setting['threads']} threads, depth {setting['depth']}")
    return made
