"""`bench cache`: the hit rate of the product's own hot rows, beside the best that is possible and what others reach.

Zipf traces over 200,000 rows (warmed up with ten times as many lookups, measured over four times as many), the same
after a tenth of the ranks changed (30 cache capacities later), and the n-grams of real text. Lookups come in steps, and
the cache learns every few steps with its usual settings. Besides: what a step's rows cost through the cache and
straight from a warm mapped table, which decides whether a cache pays on this machine.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from server.batch import Ints
from server.bench.paired import machine, write_json
from server.bench.traces import Zipf, belady, distinct, fitted_alpha, lru, text_keys, texts
from server.cache.hot_rows import HotRows, Source
from server.cache.lookup import Lookup
from server.cache.prefetcher import Prefetcher
from server.cache.row_table import Ids, RowTable
from server.cache.row_types import Bytes, Plain, RowType, row_type
from server.cache.table_writer import write_sparse_table
from server.memory.addressing import from_config
from server.models.source import open_source
from server.settings import DEFAULT_MODEL

ROWS = 200_000
ALPHAS = (0.7, 0.9, 1.0, 1.1)
FRACTIONS = (0.001, 0.01, 0.1)
WARM, MEASURED = 10, 4  # times ROWS
STEP = 32  # lookups: 16 sequences' n-grams of two orders
DRIFT, SETTLE = 0.1, 30  # share of ranks; capacities
TEXT_TOKENS = 600_000
CPU = torch.device("cpu")
BARS = {"zipf": -0.015, "drift": -0.02}


class NumberedTable:
    """Row i holds the number i."""

    def __init__(self, rows: int) -> None:
        self.name, self.rows, self.dim, self.row_bytes = "numbers", rows, 2, 8
        self.row_type: RowType = Plain(torch.float32)
        self.nbytes = rows * self.row_bytes
        self.fault: str | None = None

    def gather(self, ids: Ids, out: Bytes) -> None:
        out.view(np.int64)[:, 0] = ids

    def page_in(self, ids: Ids) -> int:
        return 0

    def close(self) -> None:
        pass


def through_hot_rows(trace: Ints, rows: int, entries: int, windows: list[slice]) -> tuple[list[float], float]:
    """Hit rates in each window, and rows that entered per lookup over the whole trace."""
    table = NumberedTable(rows)
    hot = HotRows(entries * table.row_bytes, [Source(table, 0, (1,), 1)], CPU)
    hits = np.zeros(len(trace), bool)
    for step, at in enumerate(range(0, len(trace), STEP)):
        ids = trace[at : at + STEP, None]
        found = hot.find(table, 0, ids)
        assert found is not None
        hits[at + found.hits] = True
        hot.remember(found, ids, None)
        hot.learn_if_due(step)
    ((entered, _),) = hot.moves(("numbers", 0))
    return [float(hits[window].mean()) for window in windows], entered / len(trace)


def zipf_points(alpha: float, fraction: float) -> list[dict[str, Any]]:
    """The steady point and the one after the drift."""
    zipf, entries = Zipf.of(alpha, ROWS, seed=int(alpha * 10)), int(ROWS * fraction)
    before = zipf.draw((WARM + MEASURED) * ROWS)
    zipf.drift(DRIFT)
    after = zipf.draw(SETTLE * entries + MEASURED * ROWS)
    trace = np.concatenate([before, after])
    windows = [slice(WARM * ROWS, len(before)), slice(len(trace) - MEASURED * ROWS, len(trace))]
    ours, entered = through_hot_rows(trace, ROWS, entries, windows)
    others = zip(lru(trace, entries, windows), belady(trace, entries, windows), strict=True)
    return [
        {
            "trace": name,
            "alpha": alpha,
            "cache_fraction": fraction,
            "hit_rate": hit_rate,
            "static_optimum": zipf.optimum(entries),
            "lru": by_lru,
            "belady": by_belady,
            "entered_per_lookup": entered,
        }
        for name, hit_rate, (by_lru, by_belady) in zip(("zipf", "drift"), ours, others, strict=True)
    ]


def text_points(name: str, keys: Ints) -> list[dict[str, Any]]:
    """A point per cache size; the fraction is of the distinct n-grams of the whole trace."""
    trace = distinct(keys)
    rows = int(trace.max()) + 1
    window = slice(len(trace) * WARM // (WARM + MEASURED), len(trace))
    counts = np.sort(np.bincount(trace[window]))[::-1]
    points = []
    for fraction in FRACTIONS:
        entries = int(rows * fraction)
        (hit_rate,), entered = through_hot_rows(trace, rows, entries, [window])
        points.append(
            {
                "trace": "text",
                "text": name,
                "alpha": fitted_alpha(trace),
                "rows": rows,
                "lookups": len(trace),
                "cache_fraction": fraction,
                "hit_rate": hit_rate,
                "static_optimum": float(counts[:entries].sum() / counts.sum()),
                "lru": lru(trace, entries, [window])[0],
                "belady": belady(trace, entries, [window])[0],
                "entered_per_lookup": entered,
            }
        )
    return points


def cost(keys: Ints, folder: Path) -> dict[str, float]:
    """µs per step of 16 tokens: n-grams of 8 int8 rows of 64 values, from a warm mapped table with and without a cache.

    The cache holds a tenth of the distinct n-grams; both read the same real text.
    """
    orders, heads, rows = keys.shape[1], 8, 8_000_000
    write_sparse_table(folder / "table.safetensors", rows, 64, row_type("int8"), layout="packed")
    table = RowTable.open(folder / "table.safetensors")
    ids = (keys[:, :, None] * 2654435761 + np.arange(heads) * 97) % rows
    lookups = [
        Lookup(table, 1, ids[at : at + 16].reshape(16, -1), keys[at : at + 16], orders=(2, 3)[:orders])
        for at in range(0, len(keys) - 15, 16)
    ]
    source = Source(table, 1, (2, 3)[:orders], heads)
    hot = HotRows((int(distinct(keys).max()) + 1) // 10 * source.entry_bytes, [source], CPU)
    arms = {
        "direct": Prefetcher(torch.bfloat16, CPU, 1 << 22),
        "cached": Prefetcher(torch.bfloat16, CPU, 1 << 22, hot=hot),
    }
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for lookup in lookups:
        for name, prefetcher in arms.items():
            begun = time.perf_counter()
            prefetcher.begin([lookup])[0].wait()
            spent[name].append((time.perf_counter() - begun) * 1e6)
    for prefetcher in arms.values():
        prefetcher.close()
    (counted,) = arms["cached"].counters()
    table.close()
    measured = len(lookups) // 2  # by then pages are mapped and the cache is filled
    hits = sum(order.device_hits for order in counted.orders) / sum(order.looked_up for order in counted.orders)
    return {
        "direct_us": float(np.median(spent["direct"][measured:])),
        "cached_us": float(np.median(spent["cached"][measured:])),
        "cached_mean_us": float(np.mean(spent["cached"][measured:])),
        "direct_mean_us": float(np.mean(spent["direct"][measured:])),
        "hit_rate": hits,
    }


def run(*, model: str = DEFAULT_MODEL, json: Path | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its table, writes `json`. Returns what it wrote."""
    console = Console()
    points: list[dict[str, Any]] = []
    for alpha in ALPHAS:
        for fraction in FRACTIONS:
            console.print(f"[dim]zipf {alpha}, cache {fraction:.1%} …[/dim]")
            points += zipf_points(alpha, fraction)
    source = open_source(model)
    constants = {"layer_ids": [1], "max_ngram_size": 3, "n_head_per_ngram": 8, "engram_vocab_size": [20_000] * 2}
    addresser = from_config({**constants, "pad_id": 0, "seed": 0}, tokenizer=source.tokenizer.backend)
    for name, text in texts():
        console.print(f"[dim]text: {name} …[/dim]")
        keys = text_keys(text, source.tokenizer, addresser, TEXT_TOKENS)
        points += text_points(name, keys)
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        costs = cost(keys, Path(folder))
    result = {"experiment": "cache", "machine": machine(), "rows": ROWS, "points": points, "cost": costs}
    console.print(table_of(result))
    console.print(
        f"16 tokens' rows from a warm mapped table: {costs['direct_us']:.0f} µs without a cache, "
        f"{costs['cached_us']:.0f} µs with one that hits {costs['hit_rate']:.0%}"
    )
    write_json(json, result)
    return result


def table_of(result: dict[str, Any]) -> Table:
    made = Table(title=f"hot rows, {result['rows']:,} rows")
    for column in ("trace", "α", "cache", "hits", "static", "over it", "bar", "LRU", "Belady"):
        made.add_column(column, justify="right", no_wrap=True)
    for point in result["points"]:
        difference, bar = point["hit_rate"] - point["static_optimum"], BARS.get(point["trace"])
        made.add_row(
            point.get("text", point["trace"]).split()[0],
            f"{point['alpha']:.2f}",
            f"{point['cache_fraction']:.1%}",
            f"{point['hit_rate']:.4f}",
            f"{point['static_optimum']:.4f}",
            f"{difference:+.4f}",
            "" if bar is None else "met" if difference >= bar else "missed",
            f"{point['lru']:.4f}",
            f"{point['belady']:.4f}",
        )
    return made
