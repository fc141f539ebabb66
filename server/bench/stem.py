"""`bench stem`: a decode step with STEM rows in place of a third of the up-projections, and with Engram besides.

    dense     the model as it is
    stem      every third layer's up-projection gone, its table on disk and mapped
    engram    the model, and an Engram of 16 heads at two layers
    hybrid    both memories on one model

Four engines, each with its own KV cache, take one step each per turn in random order, over the same forced tokens of
real text: the token is sampled, then replaced by the text's. The rows' values are random; a step's time does not depend
on them. A hybrid that costs no more than its parts has `hybrid + dense` at most `stem + engram`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from server.bench.arms import start
from server.bench.memory import PROMPT_TOKENS, WARM_TURNS, alternate, arm
from server.bench.paired import machine, ratio, write_json
from server.bench.text import prompts
from server.cache.row_types import Floats, row_type
from server.cache.table_writer import SIGMA, random_rows, write_table
from server.commands.attach import attach
from server.memory.pack import StemConfig, table_file
from server.models.config import ModelConfig
from server.models.source import open_source
from server.runtime.engine import Engine
from server.runtime.load import load
from server.settings import DEFAULT_MODEL, Settings

SEQUENCES = (1, 8)
ENGRAM_ROWS = 20_000  # base rows per head and order
EVERY = 3  # of the layers, from layer 1 on, one has STEM rows
SETTLED = 8  # steps that a sequence may take beyond those that are counted

Text = tuple[int, ...]


def random_stem(folder: Path, model: ModelConfig) -> Path:
    """A STEM pack of every third layer. One block of random rows is written again and again."""
    layers = tuple(range(1, model.num_layers, EVERY))
    rows, width = model.vocab_size, model.intermediate_size
    block = next(random_rows(4096, width, seed=0, sigma=SIGMA))
    folder.mkdir()
    for layer in layers:
        write_table(folder / table_file(layer), repeated(block, rows), rows, width, row_type("bfloat16"))
    about = {"name": "bench", "fingerprint": "", "num_layers": model.num_layers}
    StemConfig(layers, rows, model.hidden_size, width, about).write(folder)
    return folder


def repeated(block: Floats, rows: int) -> Iterator[Floats]:
    whole, rest = divmod(rows, len(block))
    yield from islice(cycle([block]), whole)
    if rest:
        yield block[:rest]


def arms_over(model: str, stem: Path, engram: Path, longest: int) -> dict[str, Engine]:
    """The four engines; two backbones in memory, with all up-projections and without a third of them."""
    bare = Settings(model=model, max_num_seqs=max(SEQUENCES), max_model_len=longest)
    with_stem, with_engram = replace(bare, memory=(str(stem),)), replace(bare, memory=(str(engram),))
    both = replace(bare, memory=(str(stem), str(engram)))
    dense, without_up = load(bare), load(with_stem)
    return {
        "dense": arm(dense, bare),
        "stem": arm(without_up, with_stem),
        "engram": arm(dense, with_engram),
        "hybrid": arm(without_up, both),
    }


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios of throughput over dense, and of the hybrid over the sum of its parts."""
    dense = seconds["dense"]
    found = {f"{name}_over_dense": ratio(dense, seconds[name]).as_json() for name in ("stem", "engram", "hybrid")}
    both = np.add(seconds["hybrid"], dense).tolist()
    parts = np.add(seconds["stem"], seconds["engram"]).tolist()
    return {**found, "hybrid_over_sum_of_parts": ratio(both, parts).as_json()}


def run(*, model: str = DEFAULT_MODEL, turns: int = 160, json: Path | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its table, writes `json`. Returns what it wrote."""
    source = open_source(model)
    length = PROMPT_TOKENS + WARM_TURNS + turns + SETTLED
    pieces = prompts(source.tokenizer, max(SEQUENCES), length)
    result: dict[str, Any] = {"experiment": "stem", "machine": machine(), "model": model, "turns": turns}
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        stem = random_stem(Path(folder) / "stem", source.config)
        layers = (1, source.config.num_layers // 2)
        engram = attach(model=model, out=Path(folder) / "engram", layers=layers, rows=ENGRAM_ROWS, dim=64, heads=8)
        arms = arms_over(model, stem, engram, length + 1)
        steps: dict[str, Any] = {}
        result |= {"ratios": {}, "ratios_by_sequences": {}, "step_ms": steps}
        for count in SEQUENCES:
            for engine in arms.values():
                start(engine, pieces[:count])
            seconds = alternate(arms, turns)
            steps[str(count)] = {name: float(np.median(values)) * 1e3 for name, values in seconds.items()}
            result["ratios_by_sequences"][str(count)] = compared(seconds)
        result["ratios"] = result["ratios_by_sequences"][str(SEQUENCES[0])]
    Console().print(table(result))
    write_json(json, result)
    return result


def table(result: dict[str, Any]) -> Table:
    made = Table(title=f"STEM at every third layer, {result['machine']['processor']}")
    for column in ("sequences", "figure", "median", "95 %"):
        made.add_column(column, justify="left" if column == "figure" else "right")
    for count, ratios in result["ratios_by_sequences"].items():
        for name, value in result["step_ms"][count].items():
            made.add_row(count, f"step, {name}", f"{value:.2f} ms", "")
        for name, pair in ratios.items():
            made.add_row(count, name.replace("_", " "), f"{pair['median']:.4f}", "{:.4f}–{:.4f}".format(*pair["ci95"]))
    return made
