"""`bench facts`: facts taught over HTTP while streams decode: what the streams keep, how long each fact takes.

    quiet ─ facts ─ quiet ─ facts ─ … ─ quiet      8 streams decode all the while; some facts, one after the other
                                                   each is asked for, word for word, as soon as it is taught

A window with facts is held against the mean of the quiet ones beside it: the machine's speed moves. A wait is the time
between two tokens of a stream, the next request's first token included. The teaching process starts in the first window
with facts.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from server.bench.edits import invented
from server.bench.http import body, go
from server.bench.http_streams import ask, call, running_server
from server.bench.paired import machine, write_json
from server.bench.text import prompts
from server.commands.evaluate import shipped
from server.models.source import open_source
from server.training.recall import Fact, read_facts
from server.training.run import FACTS

STREAMS, PROMPT_TOKENS, ANSWER = 8, 64, 256
POLL_SECONDS = 0.1


@dataclass(slots=True)
class Load:
    """Streams that ask again as soon as they are answered. `arrivals`: per stream the times of its tokens."""

    port: int
    pieces: Sequence[tuple[int, ...]]
    arrivals: list[list[float]] = field(default_factory=lambda: [[] for _ in range(STREAMS)])
    stopped: bool = False

    async def stream(self, number: int) -> None:
        for piece in itertools.cycle(self.pieces[number::STREAMS]):
            if self.stopped:
                return
            self.arrivals[number] += (await ask(self.port, body(piece, ANSWER))).events

    def tokens_per_s(self, begun: float, ended: float) -> float:
        """Of all streams together, between two times."""
        counts = (bisect.bisect(times, ended) - bisect.bisect(times, begun) for times in self.arrivals)
        return sum(counts) / (ended - begun)

    def longest_wait(self, windows: Sequence[tuple[float, float]]) -> float:
        """Seconds: the longest time between two tokens of a stream that touches one of the windows."""
        waits = (
            later - earlier
            for times in self.arrivals
            for earlier, later in itertools.pairwise(times)
            if any(earlier < ended and later > begun for begun, ended in windows)
        )
        return max(waits, default=0.0)


async def taught(port: int, fact: Fact) -> dict[str, Any]:
    """Teaches one fact and asks for it. Raises NotReady where the server refuses it."""
    begun = time.perf_counter()
    job = await call(port, "POST", "/v1/memory/facts", {"prompt": fact.prompt, "completion": fact.completion})
    while job["status"] in ("queued", "running"):
        await asyncio.sleep(POLL_SECONDS)
        job = await call(port, "GET", f"/v1/memory/jobs/{job['id']}")
    seconds = time.perf_counter() - begun
    asked = {"prompt": fact.prompt, "max_tokens": len(fact.completion), "temperature": 0}
    answer = (await call(port, "POST", "/v1/completions", asked))["choices"][0]["text"]
    return {
        "seconds": seconds,
        "core_seconds": job["report"].get("core_seconds", 0.0),
        "done": job["status"] == "done",
        "completed": answer.startswith(fact.completion),
    }


async def measure(
    port: int, pieces: Sequence[tuple[int, ...]], facts: Sequence[Fact], each: int, quiet_s: float
) -> dict[str, Any]:
    load = Load(port, pieces)
    streams = [asyncio.create_task(load.stream(number)) for number in range(STREAMS)]
    await asyncio.sleep(quiet_s / 2)  # until all decode
    quiet, busy, results = [await rest(quiet_s)], list[tuple[float, float]](), list[dict[str, Any]]()
    for first in range(0, len(facts), each):
        begun = time.perf_counter()
        results += [await taught(port, fact) for fact in facts[first : first + each]]
        busy.append((begun, time.perf_counter()))
        quiet.append(await rest(quiet_s))
    load.stopped = True
    await asyncio.gather(*streams)
    speeds = [load.tokens_per_s(*window) for window in quiet]
    beside = [(before + after) / 2 for before, after in itertools.pairwise(speeds)]
    kept = [load.tokens_per_s(*window) / speed for window, speed in zip(busy, beside, strict=True)]
    seconds, cores = ([result[key] for result in results] for key in ("seconds", "core_seconds"))
    return {
        "streams": STREAMS,
        "facts": len(facts),
        "done": sum(result["done"] for result in results),
        "completed": sum(result["completed"] for result in results),
        "seconds": {"median": float(np.median(seconds)), "most": max(seconds)},
        "core_seconds": {"median": float(np.median(cores)), "most": max(cores)},
        "kept": {"windows": kept, "median": float(np.median(kept)), "least": min(kept)},
        "quiet_tokens_per_s": speeds,
        "longest_wait_s": {"with_facts": load.longest_wait(busy), "quiet": load.longest_wait(quiet)},
    }


async def rest(seconds: float) -> tuple[float, float]:
    """The window of nothing but streams."""
    begun = time.perf_counter()
    await asyncio.sleep(seconds)
    return begun, time.perf_counter()


def run(*, model: str, memory: Path | None, facts: int, each: int, seconds: float, json: Path | None) -> dict[str, Any]:
    """Raises SettingsError where no memory is, NotReady where the server cannot serve it. `seconds`: a quiet window."""
    console, folder = Console(), memory or shipped()
    words = [fact.prompt.removesuffix(":") for fact in read_facts(folder / FACTS)]
    pieces = prompts(open_source(model).tokenizer, 8 * STREAMS, PROMPT_TOKENS)
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as place:
        flags = ("--model", model, "--memory", f"memory={folder}", "--edits-db", str(Path(place) / "edits.db"))
        with running_server(*flags, "--max-model-len", "1024") as server:
            console.print(f"[dim]{facts} facts, {each} at a time, beside {STREAMS} streams …[/dim]")
            figures = go(measure(server.port, pieces, invented(words, facts), each, seconds))
    result = {"experiment": "facts", "machine": machine(), "model": model, **figures}
    console.print(table(result))
    write_json(json, result)
    return result


def table(result: dict[str, Any]) -> Table:
    found = Table(title=f"facts taught beside {result['streams']} streams, {result['machine']['processor']}")
    for column in ("figure", "result", "bar"):
        found.add_column(column, justify="left" if column == "figure" else "right")
    kept, waits, seconds = result["kept"], result["longest_wait_s"], result["seconds"]
    found.add_row("completed word for word", f"{result['completed']} of {result['facts']}", "80 %")
    found.add_row("seconds a fact, median and most", f"{seconds['median']:.1f}, {seconds['most']:.1f}", "under 60")
    found.add_row("throughput kept, median and least window", f"{kept['median']:.2f}, {kept['least']:.2f}", "0.65")
    found.add_row("longest wait, with facts and without, s", f"{waits['with_facts']:.2f}, {waits['quiet']:.2f}", "2")
    return found
