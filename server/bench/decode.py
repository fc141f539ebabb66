"""`bench decode`: our decode step beside transformers' on the same weights, in turns, in one process.

Both sides hold the same prompts of real text and continue greedily. A turn is four steps of each, and the first of the
four is not counted: the other side's weights have just gone through the processor's caches, which never happens in
serving. The step of transformers is its forward pass with its own cache and an argmax, without `generate`'s overhead: a
lower bound.
Then the same sequences once more over HTTP, to see what the server adds to a step.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from server.bench.http_streams import intervals, running_server, streams
from server.bench.paired import Ratio, machine, ratio, write_json
from server.bench.shares import step_timers
from server.bench.text import prompts
from server.commands.convert import convert
from server.errors import SettingsError
from server.runtime.engine import Engine
from server.runtime.load import Loaded, load
from server.runtime.messages import SamplingParams, Submit
from server.runtime.process import build_engine
from server.settings import DEFAULT_MODEL, Settings

PROMPT_TOKENS = 64
WARM_STEPS = 4
TURN_STEPS = 4
CONCURRENCY = (1, 8, 32)
HTTP_STREAMS = 64


def fill(engine: Engine, pieces: list[tuple[int, ...]], new_tokens: int) -> None:
    """Submits the prompts and steps until every one is decoding."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    for i, piece in enumerate(pieces):
        engine.submit(Submit(f"bench-{i}", piece, params))
    while engine.scheduler.waiting or any(s.pending > 1 for s in engine.scheduler.running):
        engine.step()


def clear(engine: Engine) -> None:
    for sequence in engine.scheduler.sequences():
        engine.abort(sequence.request_id)
    engine.pool.forget()


def transformers_model(loaded: Loaded, settings: Settings, folder: Path) -> Any:
    """transformers' model with the very same weights. Raises SettingsError if transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise SettingsError("bench decode compares with transformers; pip install 'engram-server[dev]'") from error
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = folder if loaded.source.kind == "gguf" else Path(loaded.source.path)
    if loaded.source.kind == "gguf":
        convert(settings.model, folder)
    return AutoModelForCausalLM.from_pretrained(source, dtype=loaded.dtype).eval()  # type: ignore[no-untyped-call]


def transformers_stepper(model: Any, pieces: list[tuple[int, ...]]) -> Callable[[], None]:
    """Prefills, and returns a function that decodes one token for every sequence."""
    ids = torch.tensor(pieces)
    state = {}
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    state["cache"], state["next"] = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def step() -> None:
        out = model(input_ids=state["next"], past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        state["next"] = out.logits[:, -1].argmax(-1, keepdim=True)

    return step


def timed(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def compare(engine: Engine, reference: Any, pieces: list[tuple[int, ...]], steps: int) -> tuple[Ratio, float, float]:
    """Paired speed-up of ours over transformers, and both median steps in ms, at concurrency len(pieces)."""
    turns = -(-steps // (TURN_STEPS - 1)) + 1
    fill(engine, pieces, turns * TURN_STEPS + 2)
    other = transformers_stepper(reference, pieces)
    ours_s: list[float] = []
    theirs_s: list[float] = []
    for turn in range(turns):
        arms: list[tuple[Callable[[], object], list[float]]] = [(engine.step, ours_s), (other, theirs_s)]
        for step, seconds in arms if turn % 2 else arms[::-1]:
            times = [timed(step) for _ in range(TURN_STEPS)]
            if turn:
                seconds += times[1:]
    clear(engine)
    return ratio(theirs_s, ours_s), float(np.median(ours_s)) * 1e3, float(np.median(theirs_s)) * 1e3


def profile(engine: Engine, pieces: list[tuple[int, ...]], steps: int) -> dict[str, float]:
    """Milliseconds per step by part."""
    fill(engine, pieces, steps + 2)
    with step_timers(engine) as timers:
        for _ in range(steps):
            engine.step()
    clear(engine)
    return timers.milliseconds()


def run(*, model: str = DEFAULT_MODEL, steps: int = 48, json: Path | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its tables, writes `json`. Returns what it wrote."""
    console = Console()
    settings = Settings(model=model, max_num_seqs=64, max_model_len=1024)
    loaded = load(settings)
    engine = build_engine(settings, loaded)
    pieces = prompts(loaded.source.tokenizer, max(CONCURRENCY), PROMPT_TOKENS)
    result: dict[str, Any] = {"experiment": "decode", "machine": machine(), "model": model, "steps": steps}
    result["ratios"], result["step_ms"], result["shares_ms"] = {"ours_over_transformers": {}}, {}, {}
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        reference = transformers_model(loaded, settings, Path(folder) / "model")
        for count in CONCURRENCY:
            console.print(f"[dim]{count} sequences: {steps} steps of each, in turns …[/dim]")
            speedup, ours_ms, theirs_ms = compare(engine, reference, pieces[:count], steps)
            result["ratios"]["ours_over_transformers"][str(count)] = speedup.as_json()
            result["step_ms"][str(count)] = {"ours": ours_ms, "transformers": theirs_ms}
            result["shares_ms"][str(count)] = profile(engine, pieces[:count], steps // 2)
        console.print(f"[dim]{HTTP_STREAMS} streams over HTTP, beside the same sequences in process …[/dim]")
        result["http"] = over_http(engine, model, prompts(loaded.source.tokenizer, HTTP_STREAMS, PROMPT_TOKENS), steps)
    console.print(table(result))
    http = result["http"]
    console.print(
        f"{HTTP_STREAMS} streams over HTTP: {http['http_ms']:.1f} ms between tokens, in process "
        f"{http['in_process_ms']:.1f} ms: {http['ratio']:.3f}x"
    )
    write_json(json, result)
    return result


def over_http(engine: Engine, model: str, pieces: list[tuple[int, ...]], steps: int) -> dict[str, Any]:
    """Median ms between a stream's tokens over HTTP and median step in process, in turns, two rounds of each."""
    over, inside = [], []
    flags = ("--model", model, "--max-num-seqs", str(len(pieces)), "--max-model-len", "1024")
    with running_server(*flags) as served:
        for _ in range(2):
            fill(engine, pieces, steps + WARM_STEPS + 2)
            for turn in range(steps + WARM_STEPS):
                seconds = timed(engine.step)
                if turn >= WARM_STEPS:
                    inside.append(seconds)
            clear(engine)
            over += intervals(asyncio.run(streams(served.port, pieces, steps + WARM_STEPS + 16)))
    http_ms, in_process_ms = float(np.median(over)) * 1e3, float(np.median(inside)) * 1e3
    return {
        "streams": len(pieces),
        "http_ms": http_ms,
        "in_process_ms": in_process_ms,
        "ratio": http_ms / in_process_ms,
        "intervals": len(over),
    }


def table(result: dict[str, Any]) -> Table:
    """What a person reads: one row per concurrency."""
    parts = ("matmul", "attention", "elementwise", "sampling", "scheduling")
    made = Table(title=f"decode, {result['model']}, {result['machine']['processor']}")
    for column in ("sequences", "over transformers", "95 %", "ours ms", "transformers ms", *parts):
        made.add_column(column, justify="right")
    for count, pair in result["ratios"]["ours_over_transformers"].items():
        step, shares = result["step_ms"][count], result["shares_ms"][count]
        low, high = pair["ci95"]
        made.add_row(
            count,
            f"{pair['median']:.2f}x",
            f"{low:.2f}–{high:.2f}",
            f"{step['ours']:.1f}",
            f"{step['transformers']:.1f}",
            *(f"{shares[p]:.1f} ({shares[p] / shares['total']:.0%})" for p in parts),
        )
    return made
