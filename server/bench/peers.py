"""`bench peers`: our HTTP server beside vLLM's CPU build and llama.cpp, on the same weights, prompts and client.

    servers   all started, each stopped (SIGSTOP) while another is measured, so that none disturbs and none restarts
    rounds    every server in turn: 1, 8 and 32 streams, then single prompts of 512 tokens; prompts never repeat

The peers live in environments of their own, outside this one; how to make them stands in docs/performance.md. An arm
"ours + memory" carries a fresh Engram pack, its table mapped from disk. The client is `http_streams`: it shares the two
cores with whoever serves, the same for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import server
from server.bench.decode import CONCURRENCY, PROMPT_TOKENS
from server.bench.http_streams import ask, free_port, intervals
from server.bench.paired import machine, write_json
from server.bench.text import prompts
from server.commands.attach import attach
from server.commands.convert import convert
from server.errors import NotReady, SettingsError
from server.models.source import open_source
from server.settings import DEFAULT_MODEL

OURS, WITH_MEMORY = "ours", "ours + memory"
LONG_PROMPT = 512
START_SECONDS = 300.0
MAX_LEN = "2048"


@dataclass(slots=True)
class Peer:
    """One server: how it is started, where it says that it is ready, the model's name in its requests."""

    name: str
    command: list[str]
    model: str
    ready: str
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self, log: Path) -> None:
        """Raises NotReady if it ends or takes longer than START_SECONDS."""
        environment = {**os.environ, **self.environment}
        root = Path(server.__file__).parent.parent
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command, env=environment, cwd=root, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if self._answers():
                return
            time.sleep(0.5)
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise NotReady(f"{self.name} was not ready within {START_SECONDS:.0f} s; its last words: {last[0]}")

    def _answers(self) -> bool:
        request = f"GET {self.ready} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as link:
            link.sendall(request.encode())
            return b" 200 " in link.recv(64)
        return False

    def signal(self, number: int) -> None:
        """To the server and every process it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Runs within the block and stands still after it."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def end(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        if self.process is not None:
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)


def ours(name: str, folder: Path, memory: Path | None = None) -> Peer:
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--log-level", "warning"]
    command += ["--model", str(folder), "--served-model-name", "peer", "--dtype", "bfloat16"]
    command += ["--max-num-seqs", str(max(CONCURRENCY)), "--max-model-len", MAX_LEN]
    if memory is None:
        return Peer(name, command, "peer", "/ready", port)
    return Peer(name, [*command, "--memory", f"memory={memory}"], "peer+memory", "/ready", port)


def vllm(python: Path, folder: Path) -> Peer:
    """By its module: the CPU build's own `vllm` command asks for a package name that it is not installed under."""
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "peer", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", MAX_LEN, "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    return Peer("vLLM", command, "peer", "/health", port, environment)


def llama_cpp(executable: Path, file: Path) -> Peer:
    port, slots = free_port(), max(CONCURRENCY)
    command = [str(executable), "-m", str(file), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * 1024), "--threads", str(os.cpu_count())]
    return Peer("llama.cpp", command, "peer", "/health", port)


@dataclass(slots=True)
class Texts:
    """Prompts of real text, none handed out twice: a prefix cache must not answer for the model."""

    pieces: list[tuple[int, ...]]

    def take(self, count: int, length: int) -> list[tuple[int, ...]]:
        """Raises SettingsError when the corpus is used up."""
        if len(self.pieces) < count:
            raise SettingsError("the corpus has no more prompts; use fewer --rounds")
        taken, self.pieces = self.pieces[:count], self.pieces[count:]
        return [piece[:length] for piece in taken]


async def _streams(peer: Peer, pieces: list[tuple[int, ...]], tokens: int) -> list[list[float]]:
    body = {"model": peer.model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    exchanges = await asyncio.gather(*[ask(peer.port, {**body, "prompt": list(piece)}) for piece in pieces])
    return [exchange.events for exchange in exchanges]


def measure(peer: Peer, pieces: list[tuple[int, ...]], tokens: int) -> dict[str, float]:
    """All prompts at once: tokens per second over all, TTFT and time between tokens, in ms. Raises NotReady."""
    begun = time.perf_counter()
    arrivals = asyncio.run(_streams(peer, pieces, tokens))
    if not all(arrivals):
        raise NotReady(f"{peer.name} answered a stream without tokens; look at its log")
    firsts = [times[0] - begun for times in arrivals]
    gaps = intervals(arrivals, skip=1) or [0.0]
    return {
        "tokens_per_s": len(pieces) * tokens / (max(times[-1] for times in arrivals) - begun),
        "ttft_ms": float(np.median(firsts)) * 1e3,
        "itl_p50_ms": float(np.percentile(gaps, 50)) * 1e3,
        "itl_p99_ms": float(np.percentile(gaps, 99)) * 1e3,
    }


def round_of(peer: Peer, texts: Texts, tokens: int) -> dict[str, dict[str, float]]:
    """One turn of one server; a short request first wakes what was stopped."""
    with peer.awake():
        measure(peer, texts.take(1, 16), 8)
        figures = {str(n): measure(peer, texts.take(n, PROMPT_TOKENS), tokens) for n in CONCURRENCY}
        long = [measure(peer, texts.take(1, LONG_PROMPT), 2)["ttft_ms"] for _ in range(3)]
        figures["long prompt"] = {"ttft_ms": float(np.median(long))}
    return figures


def summary(rounds: list[dict[str, dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Per server the median of each figure over the rounds, and ours over the others round by round."""
    names, loads = list(rounds[0]), [*map(str, CONCURRENCY), "long prompt"]
    figures = {
        name: {
            load: {key: float(np.median([r[name][load][key] for r in rounds])) for key in rounds[0][name][load]}
            for load in loads
        }
        for name in names
    }
    ratios: dict[str, Any] = {}
    for ahead in (OURS, WITH_MEMORY):
        for other in names:
            if ahead in names and other not in (OURS, WITH_MEMORY):
                pairs = {
                    load: [r[ahead][load]["tokens_per_s"] / r[other][load]["tokens_per_s"] for r in rounds]
                    for load in loads[:-1]
                }
                pairs["ttft of 512"] = [r[other][loads[-1]]["ttft_ms"] / r[ahead][loads[-1]]["ttft_ms"] for r in rounds]
                ratios[f"{ahead} over {other}"] = {
                    load: {"median": float(np.median(values)), "least": min(values), "most": max(values)}
                    for load, values in pairs.items()
                }
    return {"figures": figures, "ratios": ratios}


def run(
    *,
    model: str = DEFAULT_MODEL,
    vllm_python: Path | None = None,
    llama_server: Path | None = None,
    llama_model: Path | None = None,
    memory: bool = True,
    rounds: int = 3,
    tokens: int = 48,
    json: Path | None = None,
) -> dict[str, Any]:
    """Runs the experiment, prints its tables, writes `json`. Returns what it wrote. Raises NotReady, SettingsError."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as place, contextlib.ExitStack() as stack:
        # so that no server outlives the run
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = Path(place) / "model"
        convert(model, folder, dtype="bfloat16")
        peers = [ours(OURS, folder)]
        if memory:
            pack = attach(model=str(folder), out=Path(place) / "pack", layers=(1, 15), rows=20_000, dim=64, heads=8)
            peers.append(ours(WITH_MEMORY, folder, pack))
        if vllm_python is not None:
            peers.append(vllm(vllm_python, folder))
        if llama_server is not None:
            if llama_model is None:
                raise SettingsError("--llama-server needs --llama-model: the same weights as a .gguf file")
            peers.append(llama_cpp(llama_server, llama_model))
        each = rounds * (sum(CONCURRENCY) + 4)
        texts = Texts(prompts(open_source(model).tokenizer, len(peers) * each, LONG_PROMPT, overlap=True))
        for peer in peers:
            console.print(f"[dim]starting {peer.name} …[/dim]")
            stack.callback(peer.end)
            peer.start(Path(place) / f"{peer.name}.log")
            peer.signal(signal.SIGSTOP)
        taken = []
        for turn in range(rounds):
            console.print(f"[dim]round {turn + 1} of {rounds} …[/dim]")
            order = peers if turn % 2 == 0 else peers[::-1]
            taken.append({peer.name: round_of(peer, texts, tokens) for peer in order})
    result = {
        "experiment": "peers",
        "machine": machine(),
        "model": model,
        "rounds": rounds,
        "tokens": tokens,
        **summary([{peer.name: figures[peer.name] for peer in peers} for figures in taken]),
        "commands": {peer.name: " ".join(Path(part).name for part in peer.command) for peer in peers},
    }
    for table in tables(result):
        console.print(table)
    write_json(json, result)
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    """What a person reads: the figures of every server, then ours over the others."""
    figures = Table(title=f"over HTTP, {result['model']}, {result['machine']['processor']}")
    for column in ("server", "streams", "tokens/s", "TTFT ms", "between tokens p50 ms", "p99 ms"):
        figures.add_column(column, justify="left" if column == "server" else "right")
    for name, loads in result["figures"].items():
        for load, values in loads.items():
            cells = (values.get(key) for key in ("tokens_per_s", "ttft_ms", "itl_p50_ms", "itl_p99_ms"))
            figures.add_row(name, load, *("" if value is None else f"{value:.1f}" for value in cells))
    ratios = Table(title="ours over the others: throughput, and their TTFT over ours")
    for column in ("pair", "load", "median", "rounds"):
        ratios.add_column(column)
    for pair, loads in result["ratios"].items():
        for load, values in loads.items():
            ratios.add_row(
                pair, load, f"{values['median']:.2f}x", "{:.2f}–{:.2f}".format(values["least"], values["most"])
            )
    return [figures, ratios]
