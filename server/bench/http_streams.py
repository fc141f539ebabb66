"""Many streams over HTTP, by a client that costs next to nothing: raw sockets, arrival times, no parsing of JSON.

On two cores the client's own work would otherwise be measured as the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import server
from server.errors import NotReady

START_SECONDS = 120.0
PAGE = os.sysconf("SC_PAGE_SIZE")
TIMING = re.compile(rb"server-timing: engine;dur=([0-9.]+)", re.IGNORECASE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Server:
    port: int
    process: subprocess.Popen[bytes]


@dataclass(slots=True)
class Exchange:
    """One request: its status, the times it was sent, answered and ended, those of its events, the engine's share."""

    sent: float
    status: int = 0
    first: float = 0.0  # its answer's first byte
    ended: float = 0.0
    engine_s: float = 0.0
    events: list[float] = field(default_factory=list)


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[Server]:
    """`engram-server serve` as its own process, ready; ends it with SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--log-level", "warning", *flags]
    process = subprocess.Popen(command, cwd=Path(server.__file__).parent.parent, stdout=subprocess.DEVNULL)
    try:
        _await_ready(process, port)
        yield Server(port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _await_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NotReady(f"the server ended with exit code {process.returncode} before it was ready")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
            link.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if b" 200 " in link.recv(64):
                return
        time.sleep(0.1)
    raise NotReady(f"the server was not ready within {START_SECONDS:.0f} s")


async def ask(port: int, body: dict[str, object]) -> Exchange:
    """Posts one streaming completion over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    exchange = Exchange(time.perf_counter())
    writer.write(_request("POST", "/v1/completions", body))
    tail = b""
    try:
        while data := await reader.read(1 << 16):
            now = time.perf_counter()
            if not exchange.first:
                exchange.first, exchange.status = now, int(data[9:12])
                timing = TIMING.search(data)
                exchange.engine_s = float(timing[1]) / 1e3 if timing else 0.0
            tail += data
            exchange.events += [now] * tail.count(b"\ndata: {")
            tail = tail[tail.rfind(b"\n") :]
    except ConnectionError:  # refused while the body was still being sent
        pass
    exchange.ended = time.perf_counter()
    writer.close()
    return exchange


async def call(port: int, method: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
    """A small JSON answer. Raises NotReady for any status that is no success."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(method, path, body))
    data = await reader.read()
    writer.close()
    head, _, content = data.partition(b"\r\n\r\n")
    if head[9:10] != b"2":
        raise NotReady(f"{method} {path} gave {content[:300]!r}")
    answer: dict[str, Any] = json.loads(content)
    return answer


def _request(method: str, path: str, body: dict[str, object] | None) -> bytes:
    payload = b"" if body is None else json.dumps(body).encode()
    head = (f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close")
    return "\r\n".join((*head, f"Content-Length: {len(payload)}", "", "")).encode() + payload


def resident_bytes(pid: int) -> int:
    """Resident set of a process and all below it."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return own + sum(resident_bytes(int(child)) for child in below)


async def streams(port: int, prompts: list[tuple[int, ...]], tokens: int) -> list[list[float]]:
    """All prompts at once, to the default model; the arrival times of each."""
    bodies = [
        {
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        for prompt in prompts
    ]
    return [exchange.events for exchange in await asyncio.gather(*[ask(port, body) for body in bodies])]


def intervals(arrivals: list[list[float]], skip: int = 8) -> list[float]:
    """Seconds between neighbouring tokens of a stream, once all streams are decoding."""
    latest_start = max(times[0] for times in arrivals)
    gaps = []
    for times in arrivals:
        for before, after in zip(times[skip:], times[skip + 1 :], strict=False):
            if before > latest_start:
                gaps.append(after - before)
    return gaps
