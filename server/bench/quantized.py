"""`bench quantized`: the decode step with int8 and int4 weights beside the plain one, and what it costs in perplexity.

Three engines over the same model alternate step by step on the same prompts of real text. Perplexity is that of the
corpus (`text.py`) in pieces, each token scored by the engine itself under its own context.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from server.bench.decode import CONCURRENCY, PROMPT_TOKENS, clear, fill
from server.bench.memory import alternate
from server.bench.paired import machine, ratio, write_json
from server.bench.text import prompts
from server.runtime.engine import Engine
from server.runtime.load import load
from server.runtime.messages import SamplingParams, Submit
from server.runtime.process import build_engine
from server.settings import DEFAULT_MODEL, MIB, Settings

PIECE_TOKENS = 512
ARMS = ("none", "int8", "int4")


def perplexity(engine: Engine, pieces: list[tuple[int, ...]]) -> float:
    """exp of the mean negative log-probability of all tokens but each piece's first."""
    params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=True)
    total, count = 0.0, 0
    for i, piece in enumerate(pieces):
        engine.submit(Submit(f"score-{i}", piece, params))
        while not engine.idle:
            for output in engine.step().outputs:
                if output.error is not None:
                    raise output.error
                scored = [entry for entry in output.prompt_logprobs or () if entry is not None]
                total -= sum(entry.logprob for entry in scored)
                count += len(scored)
    return math.exp(total / count)


def run(*, model: str = DEFAULT_MODEL, turns: int = 60, pieces: int = 8, json: Path | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its table, writes `json`. Returns what it wrote."""
    plain = Settings(model=model, max_num_seqs=max(CONCURRENCY), max_model_len=1024, kv_bytes=256 * MIB)
    engines: dict[str, Engine] = {}
    for arm in ARMS:
        settings = replace(plain, quantize=arm)
        loaded = load(settings)
        engines[arm] = build_engine(settings, loaded)
    tokenizer = loaded.source.tokenizer
    texts = prompts(tokenizer, pieces, PIECE_TOKENS)
    result: dict[str, Any] = {
        "experiment": "quantized",
        "machine": machine(),
        "model": model,
        "perplexity": {arm: perplexity(engine, texts) for arm, engine in engines.items()},
        "tokens_scored": pieces * (PIECE_TOKENS - 1),
        "step_ms": {},
        "speedup": {},
    }
    starts = prompts(tokenizer, max(CONCURRENCY), PROMPT_TOKENS)
    for count in CONCURRENCY:
        for engine in engines.values():
            fill(engine, starts[:count], turns + 16)
        seconds = alternate(engines, turns)
        for engine in engines.values():
            clear(engine)
        result["step_ms"][str(count)] = {arm: float(np.median(s)) * 1e3 for arm, s in seconds.items()}
        result["speedup"][str(count)] = {arm: ratio(seconds["none"], seconds[arm]).as_json() for arm in ARMS[1:]}
    Console().print(table(result))
    write_json(json, result)
    return result


def table(result: dict[str, Any]) -> Table:
    """One row per kind of weights."""
    made = Table(title=f"weight-only quantisation, {result['model']}, {result['machine']['processor']}")
    made.add_column("weights")
    made.add_column("perplexity", justify="right")
    for count in result["step_ms"]:
        made.add_column(f"step ms at {count}", justify="right")
        made.add_column("speed-up, 95 %", justify="right")
    for arm in ARMS:
        cells = [f"{result['perplexity'][arm]:.3f}"]
        for count, steps in result["step_ms"].items():
            pair = result["speedup"][count].get(arm)
            cells.append(f"{steps[arm]:.1f}")
            cells.append("" if pair is None else "{:.2f} ({:.2f}–{:.2f})".format(pair["median"], *pair["ci95"]))
        made.add_row(arm if arm != "none" else "as loaded", *cells)
    return made
