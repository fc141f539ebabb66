"""`bench http`: what HTTP adds to a first token, and what happens beyond the server's capacity.

    calm       one request after the other
    half load  open loop: requests come at times of their own, about 64 in flight
    peak       as many clients as the server admits, each asking again at once: the capacity
    overload   open loop at five times the capacity
    packs      streams decode while a memory pack is attached and removed

What HTTP adds is paired within each request: the client's time from sending to its first event, less the time from the
request's leaving for the engine to its token there, which the answer's Server-Timing header tells. Client and server
share the machine.
"""

from __future__ import annotations

import asyncio
import json as jsonlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from server.api.serve import loop_factory
from server.bench.http_streams import Exchange, ask, call, resident_bytes, running_server
from server.bench.paired import machine, write_json
from server.bench.text import prompts
from server.commands.attach import attach
from server.models.source import open_source

T = TypeVar("T")

PROMPT_TOKENS, IN_FLIGHT, CALM = 32, 64, 40
RAMP = 3.0  # seconds until queues are full; not counted
SEQUENCES, WAITING = 16, 16  # of the overloaded server: what it admits is its capacity, whatever the machine


def run(*, model: str, seconds: int, json: Path | None) -> dict[str, Any]:
    """Runs the experiment, prints its table, writes its JSON. `seconds`: of the loaded parts, each."""
    console = Console()
    pieces = prompts(open_source(model).tokenizer, 256, PROMPT_TOKENS)
    result: dict[str, Any] = {"experiment": "http", "machine": machine(), "model": model}
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        attach(model=model, out=Path(folder) / "pack", layers=(1, 15), rows=20_000, dim=64, heads=8)
        flags = ("--model", model, "--max-model-len", "1024", "--packs-dir", folder)
        with running_server(*flags, "--max-num-seqs", "128") as server:
            go(calm(server.port, pieces, 4))
            console.print("[dim]one request after the other …[/dim]")
            result["calm"] = overheads(go(calm(server.port, pieces, CALM)))
            console.print(f"[dim]open loop, {IN_FLIGHT} in flight …[/dim]")
            result["half_load"] = go(half_load(server.port, pieces, seconds))
            console.print("[dim]packs come and go …[/dim]")
            result["packs"] = go(packs(server.port, pieces))
        with running_server(*flags, "--max-num-seqs", str(SEQUENCES), "--max-waiting", str(WAITING)) as server:
            console.print("[dim]peak …[/dim]")
            peak = go(closed_loop(server.port, pieces, SEQUENCES + WAITING, seconds))
            console.print("[dim]five times of it …[/dim]")
            result["overload"] = go(overload(server, pieces, peak, seconds))
    console.print(table(result))
    write_json(json, result)
    return result


def go(work: Coroutine[Any, Any, T]) -> T:
    """Runs the client on uvloop where there is one: it shares the cores with what it measures."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work)


def body(prompt: Sequence[int], tokens: int) -> dict[str, object]:
    return {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}


async def calm(port: int, pieces: Sequence[tuple[int, ...]], count: int) -> list[Exchange]:
    return [await ask(port, body(piece, 2)) for piece in pieces[:count]]


def length(number: int) -> int:
    """Answers of 8 to 24 tokens: of one length, they would all end and begin in step."""
    return 8 + number * 7 % 17


def overheads(exchanges: Sequence[Exchange]) -> dict[str, float]:
    """Milliseconds of the first event that are not the engine's."""
    added = [(e.first - e.sent - e.engine_s) * 1e3 for e in exchanges if e.status == 200 and e.events]
    return {
        "requests": len(added),
        "added_ms_median": float(np.median(added)),
        "added_ms_p95": float(np.percentile(added, 95)),
        "ttft_ms_median": float(np.median([(e.first - e.sent) * 1e3 for e in exchanges if e.events])),
    }


async def half_load(port: int, pieces: Sequence[tuple[int, ...]], seconds: int) -> dict[str, float]:
    """Poisson arrivals at the rate that keeps IN_FLIGHT requests in flight, measured once they are."""
    tokens, rng = 128, random.Random(0)
    asked: list[asyncio.Task[Exchange]] = [
        asyncio.create_task(ask(port, body(piece, rng.randint(8, tokens)))) for piece in pieces[:IN_FLIGHT]
    ]
    await asyncio.sleep(3)
    measured: list[asyncio.Task[Exchange]] = []
    flying: list[int] = []
    deadline, number = time.perf_counter() + seconds, IN_FLIGHT
    while time.perf_counter() < deadline:
        flying.append(sum(not task.done() for task in asked))
        # each comes at a moment of its own; the mean gap follows what is in flight
        gap = 0.3 * max(flying[-1] / IN_FLIGHT, 0.2) ** 4
        await asyncio.sleep(rng.expovariate(1 / gap))
        measured.append(asyncio.create_task(ask(port, body(pieces[number % len(pieces)], tokens))))
        asked.append(measured[-1])
        number += 1
    done = await asyncio.gather(*measured)
    return {**overheads(done), "in_flight_mean": float(np.mean(flying))}


async def closed_loop(port: int, pieces: Sequence[tuple[int, ...]], clients: int, seconds: float) -> float:
    """Answers per second that `clients` get who ask again as soon as they have one, once all are at it."""
    answered, asked, begun = 0, 0, time.perf_counter() + RAMP

    async def client() -> None:
        nonlocal answered, asked
        while time.perf_counter() < begun + seconds:
            asked += 1
            exchange = await ask(port, body(pieces[asked % len(pieces)], length(asked)))
            answered += exchange.status == 200 and begun < exchange.ended < begun + seconds

    await asyncio.gather(*[client() for _ in range(clients)])
    return answered / seconds


async def overload(server: Any, pieces: Sequence[tuple[int, ...]], peak: float, seconds: int) -> dict[str, Any]:
    """Five times `peak` requests a second, whatever becomes of them."""
    rng = random.Random(1)
    asked: list[asyncio.Task[Exchange]] = []
    due = time.perf_counter()
    begun = due + RAMP
    resident: list[int] = []
    while due < begun + seconds:
        due += rng.expovariate(5 * peak)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asked.append(asyncio.create_task(ask(server.port, body(pieces[len(asked) % len(pieces)], length(len(asked))))))
        if not resident and due > begun + seconds / 3:
            resident.append(resident_bytes(server.process.pid))
    resident.append(resident_bytes(server.process.pid))
    done = await asyncio.gather(*asked)
    refused = [(e.first - e.sent) * 1e3 for e in done if e.status == 429]
    answered = sum(e.status == 200 and begun < e.ended < begun + seconds for e in done)
    return {
        "peak_per_s": peak,
        "offered_per_s": len(done) / (RAMP + seconds),
        "goodput_per_s": answered / seconds,
        "goodput_over_peak": answered / seconds / peak,
        "statuses": {str(status): count for status, count in Counter(e.status for e in done).items()},
        "refusal_ms_median": float(np.median(refused)),
        "refusal_ms_p99": float(np.percentile(refused, 99)),
        "resident_growth_mib": (resident[1] - resident[0]) / (1 << 20),
    }


async def packs(port: int, pieces: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Eight streams; the gaps between a stream's tokens while nothing changes, and around each attachment."""
    streams = [asyncio.create_task(ask(port, body(piece, 260))) for piece in pieces[:8]]
    await asyncio.sleep(4)
    spans, changes = [], []
    for turn in range(4):
        begun = time.perf_counter()
        changes.append(await call(port, "POST", "/v1/memory/packs", {"name": f"p{turn}", "path": "pack"}))
        spans.append((begun, time.perf_counter() + 0.1))
        await asyncio.sleep(0.7)
        await call(port, "DELETE", f"/v1/memory/packs/p{turn}")
        await asyncio.sleep(0.7)
    gaps: list[float] = []
    during: list[float] = []
    for exchange in await asyncio.gather(*streams):
        for before, after in zip(exchange.events, exchange.events[1:], strict=False):
            if before < spans[0][0] - 3:
                continue
            inside = any(before < end and after > begun for begun, end in spans)
            (during if inside else gaps).append((after - before) * 1e3)
    return {
        "pause_ms": [change["pause_seconds"] * 1e3 for change in changes],
        "load_ms": [change["load_seconds"] * 1e3 for change in changes],
        "gap_ms_median": float(np.median(gaps)),
        "gap_ms_max": max(gaps),
        "gap_ms_median_attaching": float(np.median(during)),
        "gap_ms_max_attaching": max(during),
    }


def table(result: dict[str, Any]) -> Table:
    made = Table(title=f"http, {result['model']}, {result['machine']['processor']}")
    made.add_column("figure")
    made.add_column("value", justify="right")
    for part in ("calm", "half_load", "packs", "overload"):
        for name, value in result[part].items():
            shown = jsonlib.dumps(value) if isinstance(value, dict) else None
            numbers = value if isinstance(value, list) else [value]
            made.add_row(f"{part.replace('_', ' ')}: {name}", shown or ", ".join(f"{number:.2f}" for number in numbers))
    return made
